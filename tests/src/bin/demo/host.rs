//! What this machine is, for the report: numbers without it say little.

use rig::{Accel, Site};
use serde::Serialize;
use std::{fs, thread};

#[derive(Clone, Debug, Serialize)]
pub struct Host {
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    pub accelerator: String,
    pub qemu: String,
    pub libvirt: String,
    /// How the products were built.
    pub profile: &'static str,
}

impl Host {
    pub fn look(accel: Accel, site: &Site) -> Self {
        let cpu = first_value("/proc/cpuinfo", "model name");
        let memory = first_value("/proc/meminfo", "MemTotal");
        let memory_kib: u64 =
            memory.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
        // "Using library: libvirt 9.0.0" and "Running hypervisor: QEMU 7.2.0"
        let versions = site.virsh(["version"]).unwrap_or_default();
        let version = |of: &str| {
            let line = versions.lines().find_map(|line| line.strip_prefix(of));
            line.map_or_else(unknown, |rest| rest.trim().to_owned())
        };
        Self {
            cpu,
            cores: thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| unknown(), |text| text.trim().to_owned()),
            accelerator: accel.to_string(),
            qemu: version("Running hypervisor:"),
            libvirt: version("Using library:"),
            profile: if cfg!(debug_assertions) { "dev (opt-level 2)" } else { "release" },
        }
    }
}

fn first_value(file: &str, key: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.split_once(':'));
    line.map_or_else(unknown, |(_, value)| value.trim().to_owned())
}

fn unknown() -> String {
    "unknown".to_owned()
}
