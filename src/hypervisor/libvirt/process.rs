//! The QEMU process behind a domain, as the host's /proc shows it.
//! Promises: a process is only ever named after its command line was seen to bear the domain's UUID, and its start
//! time tells it from a later one with the same number.

use crate::id::VmId;
use std::{fs, path::Path};

/// Where libvirtd keeps, for each domain that runs, its pid and what it must know of it at its own next start.
pub(super) const RUN_FOLDER: &str = "/run/libvirt/qemu";

/// One running QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuProcess {
    pub pid: i32,
    /// Clock ticks after boot at which it started.
    pub started: u64,
}

impl QemuProcess {
    /// The process that runs the domain, found without libvirt.
    pub fn find(vm: VmId) -> Result<Self, String> {
        Self::of_domain(vm, "")
    }

    /// The process that runs the domain: from libvirt's pid file, or else from a search of /proc.
    pub(super) fn of_domain(vm: VmId, name: &str) -> Result<Self, String> {
        let from_file = fs::read_to_string(Path::new(RUN_FOLDER).join(format!("{name}.pid")))
            .ok()
            .and_then(|text| text.trim().parse().ok());
        if let Some(found) = from_file.and_then(|pid| Self::verify(pid, vm)) {
            return Ok(found);
        }
        let entries = fs::read_dir("/proc").map_err(|error| format!("/proc can't be read: {error}"))?;
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut found = pids.filter_map(|pid| Self::verify(pid, vm));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (None, _) => Err(format!("no process on this host has `-uuid {vm}` on its command line")),
            (Some(_), Some(_)) => Err(format!("more than one process has `-uuid {vm}` on its command line")),
        }
    }

    /// Whether this very process is still there.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Seconds since it started; `None` once it is gone.
    pub fn age_seconds(&self) -> Option<f64> {
        let uptime: f64 = fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
        // SAFETY: sysconf has no memory effects.
        let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64;
        self.is_alive().then(|| (uptime - self.started as f64 / ticks).max(0.0))
    }

    /// Whether it was started to take in a guest's state: a migration, or a saved image.
    pub fn was_started_to_receive(&self) -> bool {
        let command = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        self.is_alive() && command.split(|byte| *byte == 0).any(|word| word == b"-incoming")
    }

    fn verify(pid: i32, vm: VmId) -> Option<Self> {
        let started = start_time(pid)?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        let uuid = vm.to_string();
        let bears_uuid = words.windows(2).any(|pair| pair[0] == b"-uuid" && pair[1] == uuid.as_bytes());
        bears_uuid.then_some(Self { pid, started })
    }
}

/// Field 22 of /proc/PID/stat. The second field may hold spaces and parentheses, so counting starts after it.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_by_its_start_time() {
        let pid = std::process::id() as i32;
        let me = QemuProcess { pid, started: start_time(pid).unwrap() };
        assert!(me.is_alive());
        assert!(me.age_seconds().unwrap() >= 0.0);
        assert!(!QemuProcess { pid, started: me.started + 1 }.is_alive());
        assert!(QemuProcess::of_domain(VmId::from_bytes([9; 16]), "no-such-domain").is_err());
    }
}
