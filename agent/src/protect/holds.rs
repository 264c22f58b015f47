//! Guests that stand for a planned failover, remembered across restarts: one small file per VM.
//! Promises: what is to be undone is written down before it is done; a guest of which the site was told that it is held
//! stays so until the site has decided, whatever becomes of this process or its host. Kept by the VM's actor.

use lifeboat::{
    durable,
    id::{CutId, PointId, VmId},
};
use serde::{Deserialize, Serialize};
use std::{fs, io, path::PathBuf};

/// One guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub cut: CutId,
    /// It ran until we had it stand.
    pub ran: bool,
    /// The point that the site holds of it; `None` as long as nobody was told that it is held.
    pub point: Option<PointId>,
}

/// The folder of them.
#[derive(Clone, Debug)]
pub struct Holds {
    dir: PathBuf,
}

impl Holds {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// What is remembered of `vm`. One that can't be read counts as a guest that is held: it stands, and somebody has to
    /// look.
    pub fn load(&self, vm: VmId) -> io::Result<Option<Hold>> {
        match fs::read(self.path(vm)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns once it would survive a power cut.
    pub fn save(&self, vm: VmId, hold: &Hold) -> io::Result<()> {
        durable::replace(&self.path(vm), &serde_json::to_vec(hold)?, 0o600)
    }

    pub fn remove(&self, vm: VmId) -> io::Result<()> {
        match fs::remove_file(self.path(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::File::open(&self.dir)?.sync_all()
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.hold"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_outlives_the_agent_and_one_that_cannot_be_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let holds = Holds::open(dir.path().join("holds")).unwrap();
        let vm = VmId::from_bytes([1; 16]);
        assert_eq!(holds.load(vm).unwrap(), None);
        let hold = Hold { cut: CutId::from_bytes([2; 16]), ran: true, point: None };
        holds.save(vm, &hold).unwrap();
        assert_eq!(holds.load(vm).unwrap(), Some(hold));
        fs::write(holds.path(vm), "{").unwrap();
        assert!(holds.load(vm).is_err());
        holds.remove(vm).unwrap();
        holds.remove(vm).unwrap();
        assert_eq!(holds.load(vm).unwrap(), None);
    }
}
