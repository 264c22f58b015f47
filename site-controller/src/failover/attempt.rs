//! The folder of one attempt, in which a replica's disks lie: what they are called there, and how it goes. Used by failovers,
//! undos and drills.

use super::error::FailoverError;
use crate::restore::Reader;
use lifeboat::format::manifest::ImageKind;
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

/// Nothing happens where there is none.
pub fn remove_dir(dir: &Path) -> Result<(), FailoverError> {
    match std::fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(FailoverError::File { path: dir.into(), source })
        }
        _ => Ok(()),
    }
}

/// Where the disks of a point lie that are restored into `dir`.
pub fn disk_files(reader: &Reader, dir: &Path) -> BTreeMap<String, PathBuf> {
    let disks = reader.plan().images().iter().filter(|planned| planned.image.kind == ImageKind::Disk);
    disks.map(|disk| (disk.image.name.clone(), dir.join(file_name(&disk.image.name)))).collect()
}

/// A file name for disk `target`, whose name came from a source host.
fn file_name(target: &str) -> PathBuf {
    let mut safe = String::new();
    for byte in target.bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => safe.push(char::from(byte)),
            other => safe.push_str(&format!("_{other:02x}")),
        }
    }
    Path::new(&safe).with_extension("raw")
}

/// Work on files.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FailoverError> + Send + 'static,
) -> Result<T, FailoverError> {
    tokio::task::spawn_blocking(work).await.map_err(|panic| FailoverError::Died(panic.to_string()))?
}
