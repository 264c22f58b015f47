//! Whether the host has room for a snapshot: QEMU may be ahead of us by all of the guest's memory.
//! Promises: what QEMU writes into the sink is charged to QEMU's control group; a limit there is kept as well, so that
//! no guest is killed for a snapshot's sake.

use lifeboat::hypervisor::libvirt::QemuProcess;
use std::{fs, path::Path};

const CGROUPS: &str = "/sys/fs/cgroup";
/// Left to the host whatever happens, besides an eighth of the guest's memory.
const MARGIN: u64 = 256 << 20;

/// An error says, for people, what there is too little of.
pub fn check(process: QemuProcess, memory_bytes: u64) -> Result<(), String> {
    let needed = memory_bytes.saturating_add(memory_bytes / 8).saturating_add(MARGIN);
    let read =
        |path: &str| fs::read_to_string(path).map_err(|error| format!("{path} can't be read: {error}"));
    let available =
        available(&read("/proc/meminfo")?).ok_or("the host does not say how much memory it has")?;
    let mib = |bytes: u64| bytes >> 20;
    if available < needed {
        return Err(format!(
            "the host has {} MiB of memory available, and a snapshot may need {} MiB for a moment",
            mib(available),
            mib(needed)
        ));
    }
    let groups = read(&format!("/proc/{}/cgroup", process.pid))?;
    match limit(&groups, Path::new(CGROUPS)) {
        Some(room) if room < needed => Err(format!(
            "QEMU's control group has room for {} MiB more, and a snapshot may need {} MiB for a moment",
            mib(room),
            mib(needed)
        )),
        _ => Ok(()),
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes that the process's control group and those above it leave free; `None` if nothing limits them.
fn limit(groups: &str, root: &Path) -> Option<u64> {
    let number =
        |folder: &Path, file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let mut least = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (top, max, current) = if controllers.is_empty() {
            (root.to_owned(), "memory.max", "memory.current")
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            continue;
        };
        let own = top.join(path.trim_start_matches('/'));
        for folder in own.ancestors().take_while(|folder| folder.starts_with(&top)) {
            if let (Some(max), Some(current)) = (number(folder, max), number(folder, current)) {
                let room = max.saturating_sub(current);
                least = Some(least.map_or(room, |other: u64| other.min(room)));
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_above_qemu_counts() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        let root = tempfile::tempdir().unwrap();
        let make = |folder: &str, max: &str, current: &str| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("memory.max"), max).unwrap();
            fs::write(folder.join("memory.current"), current).unwrap();
        };
        make("machine.slice", "5000\n", "1000\n");
        make("machine.slice/vm.scope", "max\n", "900\n");
        assert_eq!(limit("0::/machine.slice/vm.scope\n", root.path()), Some(4000));
        make("machine.slice/vm.scope", "1000\n", "900\n");
        assert_eq!(limit("0::/machine.slice/vm.scope\n", root.path()), Some(100));
        assert_eq!(limit("0::/elsewhere\n", root.path()), None);
    }
}
