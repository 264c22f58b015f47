//! The folders that failovers made for their replicas: who needs each, and removing those that nobody does.
//! Promises: a folder is removed only if nothing that libvirt has defined here names a file in it, or has a disk that is
//! based on one, and if no failover or undo may come back to it. Whatever can't be told, by a host that does not answer above
//! all, is taken for needed. Called by `api`.

use super::{
    attempt::{blocking, remove_dir},
    error::FailoverError,
    hosts::HostError,
    journal::Record,
    replica_xml,
    runbook::Runbook,
};
use lifeboat::{
    hypervisor::{
        domain_xml::DomainSpec,
        libvirt::{Hypervisor, HypervisorError, XmlView},
    },
    id::VmId,
    qemu::qcow2::{self, CHAIN_MAX},
    units::UnixMs,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Who needs a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "by")]
pub enum Needed {
    /// What libvirt has defined here, running or not. Of one that is off they are what a hand-over starts from.
    Domain {
        name: String,
        running: bool,
    },
    /// A failover that is under way, or was not taken back.
    Failover,
    /// An undo set it aside, or has made it to go on from; it is removed by itself then.
    Undo {
        until: UnixMs,
    },
    /// Perhaps by what a host has defined that could not be looked at.
    Unknown {
        host: String,
    },
    Nobody,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Folder {
    pub vm: VmId,
    pub dir: PathBuf,
    /// What it takes of the disk.
    pub bytes: u64,
    pub needed: Needed,
}

/// A file that a domain names or stands on, and the domain.
#[derive(Debug)]
struct Used {
    file: PathBuf,
    domain: String,
    running: bool,
}

impl Runbook {
    pub async fn folders(&self) -> Result<Vec<Folder>, FailoverError> {
        let root = self.replica_dir.clone();
        let mut records = BTreeMap::new();
        for vm in self.journal.vms()? {
            records.extend(self.journal.load(vm)?.map(|mut record| {
                record.aside.extend(self.staged_aside(&record));
                (vm, record)
            }));
        }
        let attempts: BTreeMap<VmId, PathBuf> =
            records.iter().map(|(vm, record)| (*vm, self.attempt_dir(record))).collect();
        let (mut used, mut unknown) = (Vec::new(), None);
        for host in self.hosts.all() {
            let (ours, root) = (host.is_local() || !self.hosts.are_several(), root.clone());
            match host.work(move |hypervisor| seen(hypervisor, &root, ours)).await {
                Ok((found, known)) => {
                    used.extend(found);
                    unknown = unknown.or((!known).then(|| host.name.clone()));
                }
                Err(FailoverError::Host(HostError::Away { host, .. })) => unknown = unknown.or(Some(host)),
                Err(error) => return Err(error),
            }
        }
        blocking(move || {
            let mut found = Vec::new();
            for (vm, dir) in
                listed(&root).map_err(|source| FailoverError::File { path: root.clone(), source })?
            {
                let mut needed = by(&dir, &used, records.get(&vm), attempts.get(&vm));
                if let (Needed::Nobody, Some(host)) = (&needed, &unknown) {
                    needed = Needed::Unknown { host: host.clone() };
                }
                found.push(Folder { vm, bytes: size(&dir), dir, needed });
            }
            Ok(found)
        })
        .await
    }

    /// Removes what nobody needs; gives what it removed.
    pub async fn remove_unneeded(&self) -> Result<Vec<Folder>, FailoverError> {
        let unneeded = |folder: &Folder| folder.needed == Needed::Nobody;
        let vms: BTreeSet<VmId> =
            self.folders().await?.into_iter().filter(unneeded).map(|folder| folder.vm).collect();
        // From here on no failover of these begins. One that is under way may not have said yet what it needs.
        let claims: BTreeMap<VmId, _> =
            vms.into_iter().filter_map(|vm| Some((vm, self.claim(vm).ok()?))).collect();
        let mut gone = Vec::new();
        for folder in self.folders().await?.into_iter().filter(unneeded) {
            if !claims.contains_key(&folder.vm) {
                continue;
            }
            let dir = folder.dir.clone();
            blocking(move || remove_dir(&dir)).await?;
            tracing::info!(vm = %folder.vm, dir = %folder.dir.display(), "a replica's folder that nobody needs is removed");
            gone.push(folder);
        }
        Ok(gone)
    }
}

fn by(dir: &Path, used: &[Used], record: Option<&Record>, attempt: Option<&PathBuf>) -> Needed {
    let canonical = dir.canonicalize();
    let real = canonical.as_deref().unwrap_or(dir);
    if let Some(used) = used.iter().find(|used| used.file.starts_with(real) || used.file.starts_with(dir)) {
        return Needed::Domain { name: used.domain.clone(), running: used.running };
    }
    if let Some(aside) = record.and_then(|record| record.aside.iter().find(|aside| aside.dir == dir)) {
        return Needed::Undo { until: aside.until };
    }
    if attempt.is_some_and(|attempt| attempt == dir) { Needed::Failover } else { Needed::Nobody }
}

/// Every file that a host's domains name, and what those are based on; and whether that is all there is. `ours`: what they name
/// by path lies here. Otherwise only what lies in `root`, which all hosts share, does.
fn seen(hypervisor: &Hypervisor, root: &Path, ours: bool) -> Result<(Vec<Used>, bool), FailoverError> {
    let (mut used, mut known) = (Vec::new(), true);
    for domain in hypervisor.domains()? {
        let seen = || -> Result<_, HypervisorError> {
            let running = domain.state()?.is_active();
            let active = if running { Some(domain.xml(XmlView::Active)?) } else { None };
            // A transient domain has no other.
            let inactive = domain.xml(XmlView::Inactive);
            Ok((domain.name().to_owned(), running, active, inactive))
        };
        let (name, running, active, inactive) = match seen() {
            Err(HypervisorError::NotFound { .. }) => continue,
            found => found?,
        };
        let inactive = if active.is_some() { inactive.ok() } else { Some(inactive?) };
        // libvirt knows what an image is based on while it runs.
        known &= ours || running || inactive.as_deref().is_none_or(|xml| !may_have_bases(xml, root));
        for xml in active.into_iter().chain(inactive) {
            for file in replica_xml::files(&xml)? {
                if !ours && !file.starts_with(root) {
                    continue;
                }
                let stack = with_bases(&file).map_err(|source| FailoverError::File { path: file, source })?;
                used.extend(stack.into_iter().map(|file| Used { file, domain: name.clone(), running }));
            }
        }
    }
    Ok((used, known))
}

/// Whether a definition has an image outside of this folder that may be based on another.
fn may_have_bases(xml: &str, root: &Path) -> bool {
    let Ok(spec) = DomainSpec::read(xml) else { return true };
    spec.disks.iter().any(|disk| disk.driver_format != "raw" && !Path::new(&disk.source).starts_with(root))
}

/// A file, and if it is a qcow2 overlay, those it is based on. What is not there, or is no image, is based on nothing.
fn with_bases(file: &Path) -> io::Result<Vec<PathBuf>> {
    let mut stack = vec![file.to_owned()];
    while let Some(base) = base_of(&stack[stack.len() - 1])? {
        if stack.len() > CHAIN_MAX {
            return Err(io::Error::other(format!("it stands on more than {CHAIN_MAX} images")));
        }
        stack.push(base);
    }
    let real = stack.iter().map(|file| file.canonicalize().unwrap_or_else(|_| file.clone()));
    Ok(real.collect())
}

fn base_of(file: &Path) -> io::Result<Option<PathBuf>> {
    // Not of a device that may be slow, nor of a socket.
    if !fs::metadata(file).is_ok_and(|meta| meta.is_file()) {
        return Ok(None);
    }
    let leads = qcow2::read(&File::open(file)?)?.unwrap_or_default();
    Ok(leads.base.and_then(|named| qcow2::beside(file, &named)))
}

/// The folders that are named as failovers name theirs; whatever else lies there is somebody else's.
fn listed(root: &Path) -> io::Result<Vec<(VmId, PathBuf)>> {
    let mut found = Vec::new();
    for of_vm in fs::read_dir(root)? {
        let of_vm = of_vm?;
        let Some(vm) = of_vm.file_name().to_str().and_then(|name| name.parse::<VmId>().ok()) else {
            continue;
        };
        for attempt in fs::read_dir(of_vm.path())? {
            let attempt = attempt?;
            let name = attempt.file_name();
            let numbers = name.to_str().and_then(|name| name.split_once('-'));
            let is_ours =
                numbers.is_some_and(|(one, two)| one.parse::<u64>().is_ok() && two.parse::<u32>().is_ok());
            if is_ours && attempt.file_type()?.is_dir() {
                found.push((vm, attempt.path()));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// For people; what can't be read counts nothing.
fn size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::journal::{Aside, tests::record};

    fn overlay(file: &Path, base: &str) {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.extend(104u64.to_be_bytes());
        bytes.extend((base.len() as u32).to_be_bytes());
        bytes.resize(104, 0);
        bytes.extend(base.as_bytes());
        fs::write(file, bytes).unwrap();
    }

    #[test]
    fn a_folder_is_needed_by_whoever_names_a_file_in_it_or_stands_on_one() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmId::from_bytes([4; 16]);
        let of = |name: &str| dir.path().join(vm.to_string()).join(name);
        for name in ["2-1", "2-2", "3-1", "4-1", "x-1", "5"] {
            fs::create_dir_all(of(name)).unwrap();
            fs::write(of(name).join("vda.raw"), [1; 4096]).unwrap();
        }
        fs::create_dir_all(dir.path().join("drill-7/1-1")).unwrap();
        let (top, middle) = (dir.path().join("top.qcow2"), of("2-1").join("mine.qcow2"));
        overlay(&middle, "../2-2/vda.raw");
        let long =
            format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"filename\":\"{}\"}}}}", middle.display());
        overlay(&top, &long);
        let xml =
            format!("<domain><devices><disk><source file='{}'/></disk></devices></domain>", top.display());
        let mut used = Vec::new();
        for file in replica_xml::files(&xml).unwrap() {
            let stack = with_bases(&file).unwrap().into_iter();
            used.extend(stack.map(|file| Used { file, domain: "web".into(), running: true }));
        }
        let mut record = record();
        record.aside.push(Aside { dir: of("3-1"), until: UnixMs(9) });
        let found: Vec<_> = listed(dir.path()).unwrap().into_iter().map(|(_, dir)| dir).collect();
        assert_eq!(found, ["2-1", "2-2", "3-1", "4-1"].map(of));
        let web = Needed::Domain { name: "web".into(), running: true };
        let needed = |attempt: &str| {
            found.iter().map(|dir| by(dir, &used, Some(&record), Some(&of(attempt)))).collect::<Vec<_>>()
        };
        let undo = Needed::Undo { until: UnixMs(9) };
        assert_eq!(needed("4-1"), [web.clone(), web.clone(), undo.clone(), Needed::Failover]);
        assert_eq!(needed("5-1"), [web.clone(), web, undo, Needed::Nobody]);
        assert_eq!(by(&of("3-1"), &[], None, None), Needed::Nobody);
        assert!(size(&of("4-1")) >= 4096);
    }

    #[test]
    fn an_image_that_stands_on_itself_or_names_nonsense_is_an_error_and_no_image_stands_on_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.qcow2");
        overlay(&file, "a.qcow2");
        assert!(with_bases(&file).is_err());
        overlay(&file, &"x".repeat(1024));
        assert!(with_bases(&file).is_err());
        for bytes in [&b"QFI\xfb\0\0\0\x03"[..], b"", &[0; 512]] {
            fs::write(&file, bytes).unwrap();
            assert_eq!(with_bases(&file).unwrap().len(), 1);
        }
        assert_eq!(with_bases(Path::new("/nowhere/at-all")).unwrap().len(), 1);
        assert_eq!(with_bases(Path::new("/dev/null")).unwrap().len(), 1);
    }
}
