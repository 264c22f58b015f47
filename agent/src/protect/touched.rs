//! The VMs in whose QEMU this agent may have left something, remembered across restarts: one that was taken out of the
//! configuration while no agent ran is still put in order at the next start. One small file per VM.

use lifeboat::{durable, id::VmId};
use std::{fs, io, path::PathBuf};

#[derive(Clone, Debug)]
pub struct Touched {
    dir: PathBuf,
}

impl Touched {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// To be called before anything is done to the VM; `name` is what the configuration calls it.
    pub fn add(&self, vm: VmId, name: &str) -> io::Result<()> {
        let path = self.path(vm);
        if fs::read_to_string(&path).is_ok_and(|known| known == name) {
            return Ok(());
        }
        durable::replace(&path, name.as_bytes(), 0o600)
    }

    /// Nothing of ours is left in it.
    pub fn remove(&self, vm: VmId) -> io::Result<()> {
        match fs::remove_file(self.path(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All VMs but those that the configuration names, by name or UUID.
    pub fn no_longer_named(&self, configured: &[&str]) -> io::Result<Vec<VmId>> {
        let mut orphans = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let id =
                path.file_name().and_then(|name| name.to_str()?.strip_suffix(".vm")?.parse::<VmId>().ok());
            let Some(vm) = id else { continue };
            // A name that can't be read is no name that is configured; what is configured is only looked at more often.
            let name = fs::read_to_string(&path).unwrap_or_default();
            if !configured.iter().any(|known| *known == name || *known == vm.to_string()) {
                orphans.push(vm);
            }
        }
        Ok(orphans)
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.vm"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_was_touched_and_is_no_longer_configured_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let touched = Touched::open(dir.path().join("t")).unwrap();
        let (web, db) = (VmId::from_bytes([1; 16]), VmId::from_bytes([2; 16]));
        touched.add(web, "web").unwrap();
        touched.add(db, "db").unwrap();
        touched.add(db, "db").unwrap();
        let uuid = db.to_string();
        assert_eq!(touched.no_longer_named(&["web", &uuid]).unwrap(), []);
        assert_eq!(touched.no_longer_named(&["db"]).unwrap(), [web]);
        touched.remove(web).unwrap();
        touched.remove(web).unwrap();
        assert_eq!(touched.no_longer_named(&["db"]).unwrap(), []);
    }
}
