//! Leaving a guest: everything of ours is taken out of its QEMU. Promises: looks at QEMU and not at what we remember, so
//! that it serves an agent that was killed, or stopped before the VM was taken out of its configuration.

use super::{failed, look};
use crate::capture::{disk::Disks, memory, source::CaptureError};
use lifeboat::{
    hypervisor::libvirt::{Hypervisor, HypervisorError},
    id::VmId,
};
use std::{path::PathBuf, sync::Arc};

pub fn leave(hypervisor: &Hypervisor, vm: VmId, scratch_dir: PathBuf) -> Result<bool, CaptureError> {
    let domain = match hypervisor.domain_by_uuid(vm) {
        Err(HypervisorError::NotFound { .. }) => return Ok(false),
        domain => domain.map_err(look::domain_error)?,
    };
    if !domain.state().map_err(look::domain_error)?.is_active() {
        return Ok(false);
    }
    let monitor = Arc::new(domain.monitor());
    memory::leave(&*monitor).map_err(failed)?;
    Disks::attach(monitor, vm, &[], scratch_dir).and_then(|disks| disks.leave()).map_err(failed)?;
    Ok(true)
}
