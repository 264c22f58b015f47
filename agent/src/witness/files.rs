//! What the guard and libvirt's hook go by: in the state folder, which VMs are bound; in the run folder, which a reboot
//! empties, until when each may run, when the guard last looked, and which guests it has paused.
//! Promises: a VM is bound before this returns, and stays so over power cuts; a time that was written in another boot, or
//! that can't be read, has passed. Written by `keeping` and the guard; the other reader is packaging/libvirt-hook.sh.

use super::hold::Until;
use lifeboat::{boot, durable, id::VmId, volatile};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

#[derive(Clone, Debug)]
pub struct Files {
    bound: PathBuf,
    run: PathBuf,
    boot: String,
}

impl Files {
    pub fn open(state: &Path, run: &Path) -> io::Result<Self> {
        let files = Self { bound: state.join(BOUND), run: run.join(KEPT), boot: boot::id()? };
        for dir in [&files.bound, &files.run] {
            fs::create_dir_all(dir)?;
        }
        Ok(files)
    }

    pub fn is_bound(&self, vm: VmId) -> bool {
        // A folder that can't be read binds: only what is surely not there does not.
        !matches!(self.bound.join(vm.to_string()).try_exists(), Ok(false))
    }

    pub fn bind(&self, vm: VmId) -> io::Result<()> {
        durable::replace(&self.bound.join(vm.to_string()), b"", 0o600)
    }

    pub fn unbind(&self, vm: VmId) -> io::Result<()> {
        durable::remove(&self.bound.join(vm.to_string()))?;
        volatile::remove(&self.run.join(vm.to_string()))
    }

    pub fn all_bound(&self) -> io::Result<Vec<VmId>> {
        let names = fs::read_dir(&self.bound)?.flatten().map(|entry| entry.file_name());
        Ok(names.filter_map(|name| name.to_str()?.parse().ok()).collect())
    }

    pub fn allow(&self, vm: VmId, until: Until) -> io::Result<()> {
        self.write(&vm.to_string(), &format!("{} {} {}\n", until.soft, until.hard, self.boot))
    }

    /// `None`: it has passed.
    pub fn until(&self, vm: VmId) -> Option<Until> {
        let text = fs::read_to_string(self.run.join(vm.to_string())).ok()?;
        let mut words = text.split_whitespace();
        let (soft, hard) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        (words.next()? == self.boot).then_some(Until { soft, hard })
    }

    /// The guard has looked after all bound VMs.
    pub fn beat(&self, now: u64) -> io::Result<()> {
        self.write(BEAT, &format!("{now} {}\n", self.boot))
    }

    pub fn is_guarded(&self, now: u64) -> bool {
        let text = fs::read_to_string(self.run.join(BEAT)).unwrap_or_default();
        let mut words = text.split_whitespace();
        let at = words.next().and_then(|word| word.parse::<u64>().ok());
        at.is_some_and(|at| now.saturating_sub(at) < BEAT_FRESH_MS) && words.next() == Some(&self.boot)
    }

    /// Where the one guard of this host locks.
    pub fn lock(&self) -> PathBuf {
        self.run.join(".lock")
    }

    /// The guard pauses it: whoever may is to resume it.
    pub fn note_paused(&self, vm: VmId) -> io::Result<()> {
        self.write(&format!("{vm}.paused"), "")
    }

    pub fn was_paused(&self, vm: VmId) -> bool {
        self.run.join(format!("{vm}.paused")).exists()
    }

    pub fn forget_paused(&self, vm: VmId) -> io::Result<()> {
        volatile::remove(&self.run.join(format!("{vm}.paused")))
    }

    /// The guard has stopped this process, which started then.
    pub fn note_stopped(&self, vm: VmId, pid: i32, started: u64) -> io::Result<()> {
        self.write(&format!("{vm}.stopped"), &format!("{pid} {started}\n"))
    }

    pub fn stopped(&self, vm: VmId) -> Option<(i32, u64)> {
        let text = fs::read_to_string(self.run.join(format!("{vm}.stopped"))).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        Some((pid.parse().ok()?, started.parse().ok()?))
    }

    pub fn forget_stopped(&self, vm: VmId) -> io::Result<()> {
        volatile::remove(&self.run.join(format!("{vm}.stopped")))
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        volatile::replace(&self.run.join(name), text)
    }
}

const BOUND: &str = "witness";
const KEPT: &str = "kept";
const BEAT: &str = ".beat";
/// A guard that has not looked for so long is as good as none.
const BEAT_FRESH_MS: u64 = 2_000;
