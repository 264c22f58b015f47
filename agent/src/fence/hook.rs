//! The hook that libvirt calls before it starts a guest: put in place, taken away, looked at.
//! Promises: what is installed is the script that this release brings, with this configuration's folders in it; a libvirt
//! that runs is told. Called by the commands of `lifeboat-agent hook`, which root runs: the daemon may not write there.

use lifeboat::durable;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Serialize;
use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// Where libvirt looks for hooks.
pub const DEFAULT_DIR: &str = "/etc/libvirt/hooks";

#[derive(Clone, Debug)]
pub struct Hook {
    file: PathBuf,
    script: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Installed {
    Yes,
    No,
    /// By another release, or for other folders.
    Differs,
}

impl Hook {
    pub fn new(dir: &Path, state: &Path, run: &Path) -> Self {
        let script = SCRIPT.replace("@STATE@", &quoted(state)).replace("@RUN@", &quoted(run));
        Self { file: dir.join("qemu.d/lifeboat"), script }
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn status(&self) -> io::Result<Installed> {
        match fs::read_to_string(&self.file) {
            Ok(text) if text == self.script => Ok(Installed::Yes),
            Ok(_) => Ok(Installed::Differs),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Installed::No),
            Err(error) => Err(error),
        }
    }

    /// Returns the libvirt daemons that were told to look for hooks again.
    pub fn install(&self) -> io::Result<Vec<String>> {
        if let Some(dir) = self.file.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        }
        durable::replace(&self.file, self.script.as_bytes(), 0o755)?;
        Ok(tell_libvirt())
    }

    pub fn remove(&self) -> io::Result<Vec<String>> {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(tell_libvirt()),
        }
    }
}

/// libvirt looks for hooks when it starts and at SIGHUP, which disturbs nobody who uses it.
fn tell_libvirt() -> Vec<String> {
    let told = DAEMONS.iter().filter(|daemon| {
        let pid = fs::read_to_string(format!("/run/{daemon}.pid")).ok();
        let Some(pid) = pid.and_then(|text| text.trim().parse::<i32>().ok()) else { return false };
        // A file that was left behind may name somebody else by now.
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == **daemon && kill(Pid::from_raw(pid), Signal::SIGHUP).is_ok()
    });
    told.map(|daemon| (*daemon).to_owned()).collect()
}

/// For between single quotes in a shell.
fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace('\'', "'\\''")
}

const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];
const SCRIPT: &str = include_str!("../../../packaging/libvirt-hook.sh");

#[cfg(test)]
mod tests;
