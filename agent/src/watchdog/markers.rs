//! Marker files: one per guest that is being paused, or whose file systems are being frozen, for whoever comes after a
//! crash of everything of ours. Promises: a marker is written before its guest is paused or frozen, and removed only when
//! the guest is known to run, to be thawed, or to be gone.

use super::What;
use lifeboat::id::VmId;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The folder of markers, on a file system that a reboot empties.
#[derive(Clone, Debug)]
pub struct Markers {
    dir: PathBuf,
    what: What,
}

impl Markers {
    /// Those of pauses.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, what: What::Pause }
    }

    /// Those in the same folder of what a guest is let go from.
    pub fn of(&self, what: What) -> Self {
        Self { dir: self.dir.clone(), what }
    }

    pub fn what(&self) -> What {
        self.what
    }

    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// Marks a pause, or a freeze, that is about to begin. No two have the same mark.
    pub fn set(&self, vm: VmId) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        fs::write(self.path(vm), format!("{} {}", std::process::id(), uuid::Uuid::new_v4()))
    }

    /// Marks a guest that is about to be suspended through libvirt, and may stand for longer than a pause; nobody but its
    /// operator lets it go on once `held` is there.
    pub fn set_standing(&self, vm: VmId, held: &Path) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let mark = format!("{} {}\n{}", std::process::id(), uuid::Uuid::new_v4(), held.display());
        fs::write(self.path(vm), mark)
    }

    /// Of such a mark: the file whose being there means that it is held. `None` for the mark of a pause.
    pub fn held_file(mark: &str) -> Option<PathBuf> {
        mark.split_once('\n').map(|(_, held)| PathBuf::from(held))
    }

    /// The mark of the pause that is under way, if one is.
    pub fn read(&self, vm: VmId) -> Option<String> {
        fs::read_to_string(self.path(vm)).ok()
    }

    pub fn clear(&self, vm: VmId) -> io::Result<()> {
        match fs::remove_file(self.path(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The guests that have a marker; other files are passed over.
    pub fn list(&self) -> io::Result<Vec<VmId>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.flatten().map(|entry| entry.file_name());
        let suffix = self.suffix();
        Ok(names.filter_map(|name| name.to_str()?.strip_suffix(suffix)?.parse().ok()).collect())
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}{}", self.suffix()))
    }

    fn suffix(&self) -> &'static str {
        match self.what {
            What::Pause => "",
            What::Freeze => ".frozen",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_stands_is_told_from_one_that_is_paused() {
        let dir = tempfile::tempdir().unwrap();
        let (markers, vm) = (Markers::new(dir.path().join("m")), VmId::from_bytes([1; 16]));
        let held = dir.path().join("holds/a b.hold");
        markers.set_standing(vm, &held).unwrap();
        assert_eq!(Markers::held_file(&markers.read(vm).unwrap()), Some(held));
        markers.set(vm).unwrap();
        assert_eq!(Markers::held_file(&markers.read(vm).unwrap()), None);
    }

    #[test]
    fn a_freeze_is_told_from_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let (pauses, vm) = (Markers::new(dir.path().into()), VmId::from_bytes([1; 16]));
        let freezes = pauses.of(What::Freeze);
        freezes.set(vm).unwrap();
        assert_eq!((pauses.list().unwrap(), freezes.list().unwrap()), (vec![], vec![vm]));
        pauses.set(vm).unwrap();
        assert_ne!(pauses.read(vm), freezes.read(vm));
        freezes.clear(vm).unwrap();
        assert_eq!((pauses.list().unwrap(), freezes.list().unwrap()), (vec![vm], vec![]));
    }
}
