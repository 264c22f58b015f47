//! Small files that a power cut may take away, or bring back: what is true until the host's next boot at the longest.
//! Promises: a reader finds the old text or the new one, whole. What must last is [`crate::durable`]'s. Called by the agent.

use std::{fs, io, path::Path};

/// Writes the file anew. One writer at a time for each.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let draft = path.with_file_name(format!(".{}.new", name.to_string_lossy()));
    fs::write(&draft, text)?;
    fs::rename(&draft, path)
}

/// Nothing happens where there is none.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_removed_as_often_as_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        for text in ["one", "and two", ""] {
            replace(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists() && replace(Path::new("/"), "").is_err());
    }
}
