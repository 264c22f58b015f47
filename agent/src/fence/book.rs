//! What was done about a copy of a VM, on disk: one JSON file per VM in the state folder, so that it outlives the agent,
//! libvirt and the host. Promises: a record is replaced whole and synced; daemon and commands change it one at a time; one
//! that can't be read is an error and never an empty one. Called by `keeper` and `orders`.

use lifeboat::{
    durable,
    id::VmId,
    units::{Generation, UnixMs},
};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// All that is remembered of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub fenced: Option<Fenced>,
    /// When it was paused because the site did not answer.
    pub isolated: Option<UnixMs>,
    pub allowed: Option<Allowed>,
}

/// The VM runs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    pub current: Generation,
    pub at: UnixMs,
    /// What only this copy knew is kept in this folder.
    pub saved: Option<PathBuf>,
}

/// An operator's word that this copy is the right one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowed {
    pub at: UnixMs,
    pub by: String,
    /// The failover that it overrules; 0 if none was known.
    pub up_to: Generation,
}

#[derive(Clone, Debug)]
pub struct Book {
    dir: PathBuf,
}

impl Book {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    pub fn load(&self, vm: VmId) -> io::Result<Record> {
        let path = self.path(vm);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| unreadable(&path, &error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            Err(error) => Err(error),
        }
    }

    /// Returns the record as it is on disk when this returns.
    pub fn update(&self, vm: VmId, change: impl FnOnce(&mut Record)) -> io::Result<Record> {
        let lock = File::create(self.dir.join(LOCK))?;
        let _locked =
            Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
        let before = self.load(vm)?;
        let mut record = before.clone();
        change(&mut record);
        if record != before {
            durable::replace(&self.path(vm), &serde_json::to_vec_pretty(&record)?, 0o600)?;
        }
        Ok(record)
    }

    /// The VMs that have a record.
    pub fn vms(&self) -> io::Result<Vec<VmId>> {
        let names = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name());
        let mut vms: Vec<VmId> =
            names.filter_map(|name| name.to_str()?.strip_suffix(".json")?.parse().ok()).collect();
        vms.sort();
        Ok(vms)
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.json"))
    }
}

fn unreadable(path: &Path, error: &serde_json::Error) -> io::Error {
    let why = format!(
        "{} can't be read ({error}); move it away if you know what this VM's copy is",
        path.display()
    );
    io::Error::new(io::ErrorKind::InvalidData, why)
}

const LOCK: &str = ".lock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_outlives_the_agent_and_a_damaged_one_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let book = Book::open(dir.path().join("fence")).unwrap();
        let vm = VmId::from_bytes([3; 16]);
        assert_eq!(book.load(vm).unwrap(), Record::default());
        let fenced = Fenced { current: Generation(2), at: UnixMs(7), saved: None };
        book.update(vm, |record| record.fenced = Some(fenced.clone())).unwrap();
        let again = Book::open(dir.path().join("fence")).unwrap();
        assert_eq!(again.load(vm).unwrap().fenced, Some(fenced));
        assert_eq!(again.vms().unwrap(), [vm]);
        fs::write(again.path(vm), "{").unwrap();
        assert!(again.load(vm).is_err());
        assert!(again.update(vm, |record| record.fenced = None).is_err());
    }
}
