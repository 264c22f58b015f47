//! Migration capabilities that a memory engine has changed in a guest's QEMU, and putting them back as they were found.
//! A capability that stays on changes what the operator's own `virsh save` or `migrate` does. Promises: what was found
//! is written down, beside the pause markers, before anything is changed; whoever comes after a killed agent (its
//! watchdog, the next agent, the service manager) puts it back, once no migration runs. Called by `capture::memory`.

use super::WatchdogError;
use lifeboat::{
    hypervisor::monitor::{Monitor, MonitorError},
    id::VmId,
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Ends the names of files that hold what was found.
const SUFFIX: &str = ".capabilities";
/// Bytes of such a file at the most.
const FILE_MAX: u64 = 64 << 10;

/// One capability as it was found, or as it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    pub capability: String,
    pub state: bool,
}

/// All capabilities that this QEMU has.
pub fn capabilities(monitor: &dyn Monitor) -> Result<Vec<Capability>, MonitorError> {
    let command = "query-migrate-capabilities";
    let answer = monitor.execute(command, json!({}))?;
    let what = answer.to_string();
    serde_json::from_value(answer).map_err(|_| MonitorError::Unexpected { command: command.into(), what })
}

pub fn set_capabilities(monitor: &dyn Monitor, wanted: &[Capability]) -> Result<(), MonitorError> {
    if !wanted.is_empty() {
        monitor.execute("migrate-set-capabilities", json!({ "capabilities": wanted }))?;
    }
    Ok(())
}

/// The state of QEMU's one migration.
pub fn migration_status(monitor: &dyn Monitor) -> Result<String, MonitorError> {
    let answer = monitor.execute("query-migrate", json!({}))?;
    Ok(answer.get("status").and_then(Value::as_str).unwrap_or("none").to_owned())
}

/// Whether no migration runs in that state.
pub fn at_rest(status: &str) -> bool {
    matches!(status, "none" | "completed" | "cancelled" | "failed")
}

/// Where what was found is written down, a file per guest.
#[derive(Clone, Debug)]
pub struct Found {
    dir: PathBuf,
}

/// What was found in one guest's QEMU and must be put back. Held by a lock that ends with its holder, so that nobody
/// puts anything back under a living one.
#[derive(Debug)]
pub struct Noted {
    _lock: Flock<File>,
    path: PathBuf,
    found: Vec<Capability>,
}

impl Found {
    /// In the folder of the pause markers.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Writes down what was found; to be done before anything is changed. `None` while somebody else's note is there.
    pub fn note(&self, vm: VmId, found: Vec<Capability>) -> io::Result<Option<Noted>> {
        fs::create_dir_all(&self.dir)?;
        let path = self.path(vm);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        let Some(lock) = lock(file, &path)? else { return Ok(None) };
        if lock.metadata()?.len() > 0 {
            return Ok(None);
        }
        (&*lock).write_all(&serde_json::to_vec(&found).map_err(io::Error::other)?)?;
        Ok(Some(Noted { _lock: lock, path, found }))
    }

    /// What a dead agent left; `None` if there is nothing, or if its writer lives.
    pub fn left_over(&self, vm: VmId) -> io::Result<Option<Noted>> {
        let path = self.path(vm);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let Some(lock) = lock(file, &path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        (&*lock).take(FILE_MAX).read_to_end(&mut bytes)?;
        // A file cut short was being written when nothing had been changed yet.
        let found = serde_json::from_slice(&bytes).unwrap_or_default();
        Ok(Some(Noted { _lock: lock, path, found }))
    }

    /// The guests in whose QEMU something was changed.
    pub fn list(&self) -> Vec<VmId> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name());
        names.filter_map(|name| name.to_str()?.strip_suffix(SUFFIX)?.parse().ok()).collect()
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}{SUFFIX}"))
    }
}

impl Noted {
    /// Puts back what was found; `false` if a migration still runs, during which QEMU changes nothing.
    pub fn put_back(&self, monitor: &dyn Monitor) -> Result<bool, WatchdogError> {
        if !at_rest(&migration_status(monitor)?) {
            return Ok(false);
        }
        set_capabilities(monitor, &self.found)?;
        self.forget()?;
        Ok(true)
    }

    /// There is nothing left that could be put back: the guest's QEMU is gone, or nothing was changed.
    pub fn forget(&self) -> Result<(), WatchdogError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(WatchdogError::Io { step: "removing the note of what was found in QEMU", source })
            }
            _ => Ok(()),
        }
    }
}

/// Locks the file at `path`; `None` if somebody has it, or has just removed it.
fn lock(file: File, path: &Path) -> io::Result<Option<Flock<File>>> {
    let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, errno)) => return Err(errno.into()),
    };
    let (ours, there) = (lock.metadata()?, fs::metadata(path));
    let same = there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
    Ok(same.then_some(lock))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::fd::BorrowedFd, sync::Mutex};

    const VM: VmId = VmId::from_bytes([7; 16]);

    /// Says how its migration stands, and remembers what it was told to set.
    struct Qemu {
        status: &'static str,
        set: Mutex<Vec<Value>>,
    }

    impl Monitor for Qemu {
        fn execute_with_fds(
            &self,
            command: &str,
            args: Value,
            _: &[BorrowedFd<'_>],
        ) -> Result<Value, MonitorError> {
            if command == "query-migrate" {
                return Ok(json!({ "status": self.status }));
            }
            self.set.lock().unwrap().push(args);
            Ok(json!({}))
        }
    }

    #[test]
    fn what_a_dead_agent_changed_is_put_back_once_and_never_under_a_living_one() {
        let dir = tempfile::tempdir().unwrap();
        let found = Found::new(dir.path().join("paused"));
        let as_found = vec![Capability { capability: "xbzrle".into(), state: true }];
        assert!(found.list().is_empty() && found.left_over(VM).unwrap().is_none());
        let noted = found.note(VM, as_found.clone()).unwrap().unwrap();
        assert_eq!(found.list(), [VM]);
        assert!(found.left_over(VM).unwrap().is_none() && found.note(VM, Vec::new()).unwrap().is_none());
        drop(noted);
        assert!(found.note(VM, Vec::new()).unwrap().is_none(), "what a dead agent found is not overwritten");
        let left = found.left_over(VM).unwrap().unwrap();
        let busy = Qemu { status: "active", set: Mutex::default() };
        assert!(!left.put_back(&busy).unwrap() && busy.set.lock().unwrap().is_empty());
        let calm = Qemu { status: "completed", set: Mutex::default() };
        assert!(left.put_back(&calm).unwrap());
        assert_eq!(*calm.set.lock().unwrap(), [json!({ "capabilities": as_found })]);
        drop(left);
        assert!(found.list().is_empty() && found.left_over(VM).unwrap().is_none());
    }
}
