//! Small files that must survive a power cut: the one way in which the daemons replace and remove them, and add lines.
//! Promises: after `replace` returned, the new bytes are what a reader finds, whatever happens; before that, the old ones
//! or the new ones, never a mixture. Called for certificates, generations and failover journals; the store has its own
//! protocol.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

/// Writes `path` anew with `mode`: a draft beside it, synced, moved into place, the folder synced.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"));
    };
    let draft = dir.join(format!(".{}.{}", name.to_string_lossy(), uuid::Uuid::new_v4().simple()));
    let replaced = write_new(&draft, bytes, mode)
        .and_then(|()| fs::rename(&draft, path))
        .and_then(|()| File::open(dir)?.sync_all());
    if replaced.is_err() {
        // The draft may not exist; what matters is told by the first error.
        let _ = fs::remove_file(&draft);
    }
    replaced
}

/// Moves a file, within one file system; once this has returned it is where it was moved to, and nowhere else.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let folder = |path: &Path| path.parent().map(Path::to_path_buf).ok_or(io::ErrorKind::InvalidInput);
    let (old, new) = (folder(from)?, folder(to)?);
    fs::rename(from, to)?;
    File::open(new)?.sync_all()?;
    File::open(old)?.sync_all()
}

/// Removes a file, if it is there; once this has returned it stays gone.
pub fn remove(path: &Path) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        // Whoever removed it before may have died before this.
        _ => File::open(dir)?.sync_all(),
    }
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // The mode is there from the first byte on: a private file is never open to others, not even as a draft.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A file of lines that only grows. A line that was added is there after a power cut; one that could not be is not, nor is
/// a part of it.
#[derive(Debug)]
pub struct Appended {
    file: File,
    len: u64,
    /// What failed left the file in a state that is not known.
    spoilt: bool,
}

impl Appended {
    /// Makes the file if it is not there. A line that was torn by a power cut is closed, so that the next stands apart.
    pub fn open(path: &Path, mode: u32) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).read(true).append(true).mode(mode).open(path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        let len = file.metadata()?.len();
        let mut appended = Self { file, len, spoilt: false };
        let mut last = [b'\n'];
        if len > 0 {
            appended.file.read_exact_at(&mut last, len - 1)?;
        }
        if last != [b'\n'] {
            appended.append(b"\n")?;
        }
        Ok(appended)
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds bytes that end with a line's end; synced when it returns.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.spoilt {
            self.file.set_len(self.len)?;
            self.spoilt = false;
        }
        let added = self.file.write_all(bytes).and_then(|()| self.file.sync_data());
        match added {
            Ok(()) => self.len += bytes.len() as u64,
            // Whatever of it is there goes, now or before the next.
            Err(_) => self.spoilt = self.file.set_len(self.len).is_err(),
        }
        added
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_no_draft_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for text in ["old", "new"] {
            replace(&path, text.as_bytes(), 0o600).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(replace(&dir.path().join("no/such/folder"), b"", 0o600).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_was_removed_may_be_removed_again_and_one_that_can_t_be_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        replace(&path, b"x", 0o600).unwrap();
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists() && remove(dir.path()).is_err() && remove(&path.join("a/b")).is_err());
    }

    #[test]
    fn lines_are_added_and_a_torn_one_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Appended::open(&path, 0o600).unwrap();
        assert!(log.is_empty());
        log.append(b"one\n").unwrap();
        fs::write(&path, "one\ntw").unwrap();
        let mut log = Appended::open(&path, 0o600).unwrap();
        log.append(b"three\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntw\nthree\n");
        assert_eq!(log.len(), 13);
        // A device that is always full.
        assert!(
            Appended { file: File::options().write(true).open("/dev/full").unwrap(), len: 0, spoilt: false }
                .append(b"x\n")
                .is_err()
        );
    }
}
