//! A file that is put among the replicas for hosts to see, or not. Promises: it is gone when nobody looks any more; what a
//! controller that died has left goes at the next start. Called by `placing`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const PROBE: &str = "probe-";

/// A file in a new folder among the replicas', which nobody can have looked for before.
pub(super) struct Probe {
    folder: PathBuf,
    pub(super) file: PathBuf,
}

impl Probe {
    pub(super) fn put(among: &Path) -> io::Result<Self> {
        let folder = among.join(format!("{PROBE}{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir_all(among)?;
        fs::create_dir(&folder)?;
        let probe = Self { file: folder.join("seen"), folder };
        fs::write(&probe.file, b"lifeboat")?;
        Ok(probe)
    }
}

/// What a controller that died has left of its looks.
pub(super) fn sweep(among: &Path) {
    for entry in fs::read_dir(among).into_iter().flatten().flatten() {
        let is_probe = entry.file_name().to_str().is_some_and(|name| name.starts_with(PROBE));
        if is_probe && let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(folder = %entry.path().display(), %error, "a folder that was to be seen by hosts is left");
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_controller_that_died_has_left_for_hosts_to_see_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["probe-7/seen", "11223344/1-1/vda.raw"] {
            let file = dir.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "").unwrap();
        }
        for _ in 0..2 {
            sweep(dir.path());
        }
        sweep(&dir.path().join("missing"));
        assert!(dir.path().join("11223344/1-1/vda.raw").exists() && !dir.path().join("probe-7").exists());
    }
}
