//! Guests that are held for a planned failover, remembered across restarts: one small file per VM.
//! Promises: a guest of which the site was told that it is held stays so until the site or an operator has decided,
//! whatever becomes of this process or its host. That the file is there is what decides: the watchdog, the fence and libvirt's
//! hook look for it as well. Kept by the VM's actor.

use lifeboat::{
    durable,
    id::{CutId, PointId, VmId},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// One guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub cut: CutId,
    /// It ran until we had it stand.
    pub ran: bool,
    /// The point that the site holds of it.
    pub point: PointId,
}

/// The folder of them.
#[derive(Clone, Debug)]
pub struct Holds {
    dir: PathBuf,
}

/// Whether the VM is held by the agent with this `state_dir`.
pub fn is_held(state_dir: &Path, vm: VmId) -> bool {
    Holds { dir: state_dir.join(FOLDER) }.is_held(vm)
}

impl Holds {
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join(FOLDER);
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// One that can't be read counts as held: somebody has to look.
    pub fn is_held(&self, vm: VmId) -> bool {
        self.file(vm).try_exists().unwrap_or(true)
    }

    pub fn load(&self, vm: VmId) -> io::Result<Option<Hold>> {
        match fs::read(self.file(vm)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The VMs that are held.
    pub fn vms(&self) -> io::Result<Vec<VmId>> {
        let names = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.file_name());
        Ok(names.filter_map(|name| name.to_str()?.strip_suffix(SUFFIX)?.parse().ok()).collect())
    }

    /// Returns once it would survive a power cut.
    pub fn save(&self, vm: VmId, hold: &Hold) -> io::Result<()> {
        durable::replace(&self.file(vm), &serde_json::to_vec(hold)?, 0o600)
    }

    pub fn remove(&self, vm: VmId) -> io::Result<()> {
        durable::remove(&self.file(vm))
    }

    /// It is there as long as the VM is held.
    pub fn file(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}{SUFFIX}"))
    }
}

/// In the state folder. packaging/libvirt-hook.sh knows both.
const FOLDER: &str = "holds";
const SUFFIX: &str = ".hold";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_outlives_the_agent_and_one_that_cannot_be_read_is_a_hold() {
        let dir = tempfile::tempdir().unwrap();
        let holds = Holds::open(dir.path()).unwrap();
        let vm = VmId::from_bytes([1; 16]);
        assert_eq!((holds.load(vm).unwrap(), is_held(dir.path(), vm)), (None, false));
        let hold = Hold { cut: CutId::from_bytes([2; 16]), ran: true, point: PointId::from_bytes([3; 16]) };
        holds.save(vm, &hold).unwrap();
        assert_eq!(Holds::open(dir.path()).unwrap().load(vm).unwrap(), Some(hold));
        assert_eq!((holds.vms().unwrap(), is_held(dir.path(), vm)), (vec![vm], true));
        fs::write(holds.file(vm), "{").unwrap();
        assert!(holds.load(vm).is_err() && holds.is_held(vm));
        holds.remove(vm).unwrap();
        holds.remove(vm).unwrap();
        assert_eq!((holds.load(vm).unwrap(), holds.is_held(vm)), (None, false));
    }
}
