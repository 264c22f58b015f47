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
    #[error("{dir} has {free} free, and the replica needs {needed}; make room or set another `replica_dir`")]
    NoRoom { dir: String, free: ByteSize, needed: ByteSize },
    #[error("{dir}: {source}")]
    Disk { dir: String, source: io::Error },
}

/// Checks names, files, networks, huge pages and room; returns the domain already defined here for this VM, if one is.
pub fn check(
    hypervisor: &Hypervisor,
    vm: VmId,
    name: &str,
    needs: &Needs,
    replica_dir: &Path,
    bytes_needed: u64,
) -> Result<Option<Domain>, PreflightError> {
    let ours = match hypervisor.domain_by_uuid(vm) {
        Ok(domain) if domain.state()?.is_active() => return Err(PreflightError::AlreadyRunning),
        Ok(domain) => Some(domain),
        Err(HypervisorError::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    match hypervisor.domain_by_name(name) {
        Ok(domain) if domain.uuid() != vm => {
            return Err(PreflightError::NameTaken { name: name.into(), uuid: domain.uuid() });
        }
        Ok(_) | Err(HypervisorError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    for path in &needs.files {
        if !path.exists() {
            return Err(PreflightError::FileMissing { path: path.display().to_string() });
        }
    }
    for network in &needs.networks {
        if !hypervisor.network_is_active(network)? {
            return Err(PreflightError::NetworkMissing { what: "network", name: network.clone() });
        }
    }
    for bridge in &needs.bridges {
        if !Path::new("/sys/class/net").join(bridge).exists() {
            return Err(PreflightError::NetworkMissing { what: "bridge", name: bridge.clone() });
        }
    }
    huge_pages::check(&needs.huge_pages, Path::new("/"))?;
    room(replica_dir, bytes_needed)?;
    Ok(ours)
}

fn room(dir: &Path, needed: u64) -> Result<(), PreflightError> {
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
