//! Small files that must survive a power cut whole: the one way in which the daemons replace them.
//! Promises: after `replace` returned, the new bytes are what a reader finds, whatever happens; before that, the old ones
//! or the new ones, never a mixture. Called for certificates, generations and failover journals; the store has its own
//! protocol.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
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

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // The mode is there from the first byte on: a private file is never open to others, not even as a draft.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
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
}
