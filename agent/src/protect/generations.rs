//! The generation that each VM's site last named, remembered across restarts: a source that was fenced while its host
//! was down must not be mistaken for a new one. One small file per VM.

use lifeboat::{durable, id::VmId, units::Generation};
use std::{fs, io, path::PathBuf};

#[derive(Clone, Debug)]
pub struct Generations {
    dir: PathBuf,
}

impl Generations {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// `None` if this agent has never protected the VM. A file that can't be read is an error, not a new start.
    pub fn load(&self, vm: VmId) -> io::Result<Option<Generation>> {
        let path = self.path(vm);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let number = text.trim().parse().map_err(|_| {
                    let why =
                        format!("{} does not hold a generation; restore it from a backup", path.display());
                    io::Error::new(io::ErrorKind::InvalidData, why)
                })?;
                Ok(Some(Generation(number)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Remembers; returns once it would survive a power cut.
    pub fn save(&self, vm: VmId, generation: Generation) -> io::Result<()> {
        durable::replace(&self.path(vm), format!("{generation}\n").as_bytes(), 0o600)
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.generation"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_remembered_and_a_damaged_file_is_not_taken_for_a_new_start() {
        let dir = tempfile::tempdir().unwrap();
        let book = Generations::open(dir.path().join("g")).unwrap();
        let vm = VmId::from_bytes([1; 16]);
        assert_eq!(book.load(vm).unwrap(), None);
        book.save(vm, Generation(3)).unwrap();
        assert_eq!(book.load(vm).unwrap(), Some(Generation(3)));
        fs::write(book.path(vm), "").unwrap();
        assert!(book.load(vm).is_err());
    }
}
