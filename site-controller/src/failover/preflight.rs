//! What must be true at this site before a failover fences the source: asked first, so that a failover that can't
//! succeed changes nothing. Blocking (libvirt, file system). Called by `runbook`.

use super::{
    huge_pages::{self, Lack},
    replica_xml::Needs,
};
use lifeboat::{
    hypervisor::libvirt::{Domain, Hypervisor, HypervisorError},
    id::VmId,
    units::ByteSize,
};
use std::{io, path::Path};

#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(
        "a domain `{name}` with another UUID ({uuid}) is defined at this site; rename or undefine it, so that the \
         replica can have its name"
    )]
    NameTaken { name: String, uuid: VmId },
    #[error(
        "this VM is running at this site already; if it is the source itself, protect it to another site, otherwise \
         shut it off first"
    )]
    AlreadyRunning,
    #[error("the replica needs file {path}, which is not at this site; copy it from the source host")]
    FileMissing { path: String },
    #[error(
        "the replica needs {what} `{name}`, which this site does not have; create it (see `virsh net-list --all`)"
    )]
    NetworkMissing { what: &'static str, name: String },
    #[error(transparent)]
    HugePages(#[from] Lack),
    #[error(
        "this site's QEMU has no machine `{machine}` as the replica needs it ({why}); install the source's version"
    )]
    MachineMissing { machine: String, why: String },
    #[error("{dir} has {free} free, and the replica needs {needed}; make room or set another `replica_dir`")]
    NoRoom { dir: String, free: ByteSize, needed: ByteSize },
    #[error("the replicas take {needed} of memory, and this site has {free} free; stop something else")]
    NoMemory { free: ByteSize, needed: ByteSize },
    #[error("{dir}: {source}")]
    Disk { dir: String, source: io::Error },
}

/// Checks names, files, networks, huge pages, the machine and room; returns the domain already defined here for this VM, if
/// one is.
pub fn check(
    hypervisor: &Hypervisor,
    vm: VmId,
    name: &str,
    needs: &Needs,
    replica_dir: &Path,
    bytes_needed: u64,
) -> Result<Option<Domain>, PreflightError> {
    let (ours, problems) = problems(hypervisor, vm, name, needs)?;
    if let Some(first) = problems.into_iter().next() {
        return Err(first);
    }
    room(replica_dir, bytes_needed)?;
    Ok(ours)
}

/// All that stands in the replica's way, but for room; and the domain already defined here for this VM, if one is. An error if
/// libvirt could not be asked.
pub fn problems(
    hypervisor: &Hypervisor,
    vm: VmId,
    name: &str,
    needs: &Needs,
) -> Result<(Option<Domain>, Vec<PreflightError>), PreflightError> {
    let mut found = Vec::new();
    let ours = match hypervisor.domain_by_uuid(vm) {
        Ok(domain) => {
            if domain.state()?.is_active() {
                found.push(PreflightError::AlreadyRunning);
            }
            Some(domain)
        }
        Err(HypervisorError::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    match hypervisor.domain_by_name(name) {
        Ok(domain) if domain.uuid() != vm => {
            found.push(PreflightError::NameTaken { name: name.into(), uuid: domain.uuid() });
        }
        Ok(_) | Err(HypervisorError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    for path in &needs.files {
        let there = if hypervisor.is_local() { path.exists() } else { sees(hypervisor, path)? };
        if !there {
            found.push(PreflightError::FileMissing { path: path.display().to_string() });
        }
    }
    for name in &needs.networks {
        if !hypervisor.network_is_active(name)? {
            found.push(PreflightError::NetworkMissing { what: "network", name: name.clone() });
        }
    }
    for name in &needs.bridges {
        let there = match hypervisor.is_local() {
            true => Path::new("/sys/class/net").join(name).exists(),
            false => hypervisor.has_interface(name)?.unwrap_or(true),
        };
        if !there {
            found.push(PreflightError::NetworkMissing { what: "bridge", name: name.clone() });
        }
    }
    let lack = match hypervisor.is_local() {
        true => huge_pages::check(&needs.huge_pages, Path::new("/")).err(),
        false => huge_pages::check_there(&needs.huge_pages, hypervisor)?,
    };
    found.extend(lack.map(PreflightError::HugePages));
    if let Some(why) = hypervisor.lacks_machine(&needs.machine)? {
        let machine = needs.machine.machine.clone().unwrap_or_else(|| "of this kind".into());
        found.push(PreflightError::MachineMissing { machine, why });
    }
    Ok((ours, found))
}

/// A file of another host. What its libvirt can't say, QEMU will.
fn sees(hypervisor: &Hypervisor, path: &Path) -> Result<bool, HypervisorError> {
    match hypervisor.sees_file(path) {
        Ok(seen) => Ok(seen.unwrap_or(true)),
        Err(HypervisorError::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Memory that a new process can have, bytes; where the kernel does not say, as much as anybody wants.
pub fn free_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

/// Whether this much memory can be had without taking it from whatever runs here. A failover does not ask: on the worst day
/// a replica that swaps is better than none.
pub fn memory(needed: u64) -> Result<(), PreflightError> {
    let free = free_memory();
    if free < needed {
        return Err(PreflightError::NoMemory { free: ByteSize(free), needed: ByteSize(needed) });
    }
    Ok(())
}

/// Whether there is room for replicas of this size.
pub fn room(dir: &Path, needed: u64) -> Result<(), PreflightError> {
    let disk = |source| PreflightError::Disk { dir: dir.display().to_string(), source };
    std::fs::create_dir_all(dir).map_err(disk)?;
    let stat = nix::sys::statvfs::statvfs(dir).map_err(|error| disk(error.into()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < needed {
        let dir = dir.display().to_string();
        return Err(PreflightError::NoRoom { dir, free: ByteSize(free), needed: ByteSize(needed) });
    }
    Ok(())
}
