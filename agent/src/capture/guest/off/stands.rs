//! What stands there while a guest is off, told by a cheap look: its files with their times, and its XML.
//! Promises: two looks that are alike, the first of them [`super::SETTLES`] before anything was read, mean that no byte of its
//! disks changed in between: a file's times change with each write, a block device counts what is written to it. All files
//! of a chain are looked at, as their headers name them; a header is believed only as far as it says where to look.

use lifeboat::{
    boot,
    chunk::digest::Digest,
    hypervisor::domain_xml::DomainSpec,
    qemu::qcow2::{self, CHAIN_MAX},
};
use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

/// A disk of a guest that is off, and the file that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffDisk {
    pub target: String,
    pub path: PathBuf,
    /// `raw` or `qcow2`, as libvirt says.
    pub format: String,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stands {
    files: Vec<Stamp>,
    xml: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    /// Device and inode; of a block device its number.
    which: (u64, u64),
    bytes: u64,
    /// Last written and last changed; of a block device what was written to it since which boot.
    times: Vec<String>,
}

impl Stands {
    pub fn look(disks: &[OffDisk], xml: &str) -> Result<Self, String> {
        let mut files = Vec::new();
        for disk in disks {
            let (mut next, mut links) = (Some(disk.path.clone()), 0);
            while let Some(path) = next.take() {
                let told = |error: io::Error| format!("disk {}, {}: {error}", disk.target, path.display());
                files.push(Stamp::of(&path).map_err(told)?);
                links += 1;
                if links > CHAIN_MAX {
                    return Err(format!("disk {}: its chain of images has no end", disk.target));
                }
                // The disk itself is what its definition says; what it is made over is read as QEMU reads it, and here only its
                // own base is asked for.
                let (is_top, layered) = (links == 1, disk.format == "qcow2");
                if is_top && !layered {
                    continue;
                }
                let leads = File::open(&path).and_then(|file| qcow2::read(&file)).map_err(told)?;
                let Some(leads) = leads else {
                    if is_top {
                        return Err(format!(
                            "disk {}, {}: it is no qcow2 image",
                            disk.target,
                            path.display()
                        ));
                    }
                    continue;
                };
                if leads.data_elsewhere {
                    let path = path.display();
                    return Err(format!(
                        "disk {}: what is in {path} lies in another file (`data_file`)",
                        disk.target
                    ));
                }
                if let Some(named) = leads.base {
                    let below = qcow2::beside(&path, &named).ok_or_else(|| {
                        format!("disk {} is made over `{named}`, which is no file of this host", disk.target)
                    })?;
                    next = Some(below);
                }
            }
        }
        Ok(Self { files, xml: Digest::of(xml.as_bytes()).to_string() })
    }

    /// Whether the disks are the same, whatever became of the XML.
    pub fn same_files(&self, other: &Self) -> bool {
        self.files == other.files
    }
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        let path = path.to_owned();
        if found.file_type().is_block_device() {
            let device = found.rdev();
            let node = format!("/sys/dev/block/{}:{}", major(device), minor(device));
            let read = |name: &str| fs::read_to_string(format!("{node}/{name}"));
            // Fields 5 to 7: writes, those merged, sectors written.
            let written: Vec<String> =
                read("stat")?.split_whitespace().skip(4).take(3).map(str::to_owned).collect();
            let bytes = read("size")?.trim().parse::<u64>().unwrap_or(0).saturating_mul(512);
            let times = written.into_iter().chain([boot::id()?]).collect();
            return Ok(Self { path, which: (device, 0), bytes, times });
        }
        let times = vec![
            format!("{}.{:09}", found.mtime(), found.mtime_nsec()),
            format!("{}.{:09}", found.ctime(), found.ctime_nsec()),
        ];
        Ok(Self { path, which: (found.dev(), found.ino()), bytes: found.len(), times })
    }
}

/// The files of the disks, by the domain's inactive definition.
pub fn disks_of(spec: &DomainSpec) -> Result<Vec<OffDisk>, String> {
    let file = |disk: &lifeboat::hypervisor::domain_xml::DiskSpec| {
        let (path, format) = disk.image_file()?;
        Ok(OffDisk { target: disk.target.clone(), path: path.to_owned(), format: format.to_owned() })
    };
    spec.replicated_disks().map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::FileExt, process::Command};

    fn qemu_img(words: &[&str]) {
        let made = Command::new("qemu-img").args(words).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }

    fn disk(path: &Path, format: &str) -> OffDisk {
        OffDisk { target: "vda".into(), path: path.into(), format: format.into() }
    }

    /// Goal: a write to any file of a chain is seen. Method: a raw base, a qcow2 image over it by a relative name, one over
    /// that by a whole path; each is written to in turn.
    #[test]
    fn a_write_to_any_file_of_a_chain_is_seen_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let text = |name: &str| path(name).to_string_lossy().into_owned();
        qemu_img(&["create", "-q", "-f", "raw", &text("base"), "1M"]);
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", &text("mid.qcow2")]);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            &text("mid.qcow2"),
            &text("top,1.qcow2"),
        ]);
        let disks = [disk(&path("top,1.qcow2"), "qcow2")];
        let first = Stands::look(&disks, "<domain/>").unwrap();
        assert_eq!(first.files.len(), 3, "{first:?}");
        fs::read(path("base")).unwrap();
        assert_eq!(first, Stands::look(&disks, "<domain/>").unwrap(), "reading is no change");
        assert_ne!(first, Stands::look(&disks, "<domain a='1'/>").unwrap());
        let mut before = first;
        for name in ["base", "mid.qcow2", "top,1.qcow2"] {
            let file = fs::OpenOptions::new().write(true).open(path(name)).unwrap();
            file.write_all_at(b"x", 600_000).unwrap();
            let now = Stands::look(&disks, "<domain/>").unwrap();
            assert_ne!(before, now, "{name}");
            before = now;
        }
        let kept: Stands = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
        assert_eq!(kept, before, "it can be remembered");
    }

    #[test]
    fn an_image_without_a_file_below_it_is_refused_and_one_that_is_its_own_base_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.qcow2");
        let text = image.to_string_lossy().into_owned();
        let over = |base: &str| {
            qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base, &text, "1M"])
        };
        let look = || Stands::look(&[disk(&image, "qcow2")], "").unwrap_err();
        over("nbd://there/disk");
        assert!(look().contains("no file of this host"), "{}", look());
        over("missing");
        assert!(look().contains("No such file"), "{}", look());
        over("a.qcow2");
        assert!(look().contains("no end"), "{}", look());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &format!("data_file={text}.data"), &text, "1M"]);
        assert!(look().contains("another file"), "{}", look());
        // A raw disk that pretends to be more is not looked into.
        assert_eq!(Stands::look(&[disk(&image, "raw")], "").unwrap().files.len(), 1);
    }
}
