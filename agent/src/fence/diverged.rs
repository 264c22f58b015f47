//! What only a fenced copy knows: its memory and devices in a save image of libvirt's, its XML, and where its disks are,
//! which stay untouched where they lie. One folder per VM and generation in the state folder.
//! Promises: a guest is ended only when its memory is in the file, whole; where there is no room nothing is begun; nothing
//! is removed but at an operator's word, or when the guest goes on from it. Called by `keeper` and `orders`.

use super::FenceError;
use lifeboat::{
    durable, fault,
    hypervisor::{
        domain_xml::DomainSpec,
        libvirt::{Domain, XmlView},
    },
    id::VmId,
    units::{Generation, UnixMs},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// What is kept of one copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub vm: VmId,
    pub name: String,
    /// The failover that fenced it.
    pub generation: Generation,
    /// When its memory was put away.
    pub at: UnixMs,
    pub folder: PathBuf,
    /// Its disks, where they were and are.
    pub disks: Vec<KeptDisk>,
    /// Bytes of the save image; `None` if it is not whole.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptDisk {
    pub target: String,
    pub source: String,
}

#[derive(Clone, Debug)]
pub struct Shelf {
    dir: PathBuf,
}

impl Shelf {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub fn folder(&self, vm: VmId, generation: Generation) -> PathBuf {
        self.dir.join(format!("{vm}-{generation}"))
    }

    /// Puts a guest that stands into a folder; it is off afterwards. Returns the folder.
    pub fn save(&self, domain: &Domain, generation: Generation, now: UnixMs) -> Result<PathBuf, FenceError> {
        let xml = domain.xml(XmlView::Active)?;
        let spec = DomainSpec::read(&xml);
        let memory = spec.as_ref().map_or(0, |spec| spec.memory_bytes);
        let folder = self.folder(domain.uuid(), generation);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(file("making a folder for the guest's state"))?;
        self.room(memory)?;
        let disks = spec.map(|spec| spec.disks).unwrap_or_default();
        let disks = disks.into_iter().map(|disk| KeptDisk { target: disk.target, source: disk.source });
        let kept = Kept {
            vm: domain.uuid(),
            name: domain.name().to_owned(),
            generation,
            at: now,
            folder: folder.clone(),
            disks: disks.collect(),
            memory_bytes: None,
        };
        let about = serde_json::to_vec_pretty(&kept).map_err(io::Error::from);
        about
            .and_then(|about| durable::replace(&folder.join(ABOUT), &about, 0o600))
            .and_then(|()| durable::replace(&folder.join("domain.xml"), xml.as_bytes(), 0o600))
            .map_err(file("writing down what the guest's state is"))?;
        fault::point("fence.saving");
        let image = folder.join(MEMORY);
        // An earlier try that did not come to its end: libvirt lets the guest stand then.
        remove(&image).map_err(file("removing a state that is not whole"))?;
        domain.save_paused(&image.to_string_lossy())?;
        // libvirt says it is done; the disk is asked as well. The guest is gone: failing now would help nobody.
        if let Err(error) = File::open(&image).and_then(|image| image.sync_all()) {
            tracing::warn!(path = %image.display(), %error, "the guest's state could not be synced");
        }
        fault::point("fence.saved");
        Ok(folder)
    }

    /// The folder of a state that is whole.
    pub fn whole(&self, vm: VmId, generation: Generation) -> Option<PathBuf> {
        let folder = self.folder(vm, generation);
        is_whole(&folder.join(MEMORY)).then_some(folder)
    }

    /// All that is kept; what can't be read is passed over.
    pub fn list(&self) -> Vec<Kept> {
        let folders = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut all: Vec<Kept> = folders.filter_map(|folder| read(&folder)).collect();
        all.sort_by(|a, b| (&a.name, a.generation).cmp(&(&b.name, b.generation)));
        all
    }

    /// Everything that is kept of a VM; how many folders went.
    pub fn discard(&self, vm: VmId) -> io::Result<usize> {
        let of_it: Vec<Kept> = self.list().into_iter().filter(|kept| kept.vm == vm).collect();
        for kept in &of_it {
            fs::remove_dir_all(&kept.folder)?;
        }
        Ok(of_it.len())
    }

    fn room(&self, memory: u64) -> Result<(), FenceError> {
        let needed = memory.saturating_add(MARGIN);
        let free = nix::sys::statvfs::statvfs(&self.dir).map_err(io::Error::from);
        let free = free.map_err(file("asking how much room there is"))?;
        let free = free.fragment_size().saturating_mul(free.blocks_available());
        if free < needed {
            let (free_mib, needed_mib) = (free >> 20, needed >> 20);
            return Err(FenceError::NoRoom { dir: self.dir.clone(), free_mib, needed_mib });
        }
        Ok(())
    }
}

impl Kept {
    pub fn image(&self) -> PathBuf {
        self.folder.join(MEMORY)
    }
}

fn read(folder: &Path) -> Option<Kept> {
    let mut kept: Kept = serde_json::from_slice(&fs::read(folder.join(ABOUT)).ok()?).ok()?;
    // Where it was found, wherever it was made.
    kept.folder = folder.to_owned();
    let image = kept.image();
    kept.memory_bytes = is_whole(&image).then(|| fs::metadata(&image).map_or(0, |data| data.len()));
    Some(kept)
}

/// libvirt gives the file its name last.
fn is_whole(image: &Path) -> bool {
    let mut begins = [0; WHOLE.len()];
    File::open(image).and_then(|mut image| image.read_exact(&mut begins)).is_ok() && begins == *WHOLE
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn file(what: &'static str) -> impl Fn(io::Error) -> FenceError {
    move |source| FenceError::File { what, source }
}

const ABOUT: &str = "about.json";
const MEMORY: &str = "memory.save";
/// How a save image begins that is whole; one that is not begins with `LibvirtQemudPart`.
const WHOLE: &[u8; 16] = b"LibvirtQemudSave";
/// Devices, video memory, and what others need of the file system.
const MARGIN: u64 = 512 << 20;
