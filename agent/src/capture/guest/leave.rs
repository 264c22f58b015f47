//! Leaving a guest: what is ours is taken out of its QEMU. Promises: looks at QEMU and not at what we remember, so that it
//! serves an agent that was killed, or stopped before the VM was taken out of its configuration.

use super::{failed, look};
use crate::capture::{disk::Disks, memory, others, source::CaptureError};
use lifeboat::{
    hypervisor::libvirt::{Domain, Hypervisor, HypervisorError},
    id::VmId,
};
use std::{path::PathBuf, sync::Arc};

/// Everything, for good. `false` if it does not run: then nothing of ours can be left. Blocks.
pub fn leave(hypervisor: &Hypervisor, vm: VmId, scratch_dir: PathBuf) -> Result<bool, CaptureError> {
    let Some(domain) = active(hypervisor, vm)? else { return Ok(false) };
    let monitor = Arc::new(domain.monitor());
    memory::leave(&*monitor).map_err(failed)?;
    Disks::attach(monitor, vm, &[], scratch_dir).and_then(|disks| disks.leave()).map_err(failed)?;
    Ok(true)
}

/// What an agent that died in a cut left, and what nobody can save or migrate the guest with. What is owed stays marked.
/// Nothing is touched while somebody else is at work on the guest. No cut is open. Blocks.
pub fn clear(hypervisor: &Hypervisor, vm: VmId, scratch_dir: PathBuf) -> Result<(), CaptureError> {
    let Some(domain) = active(hypervisor, vm)? else { return Ok(()) };
    if let Some(others) = others::somebody(&domain) {
        return Err(CaptureError::Busy(others));
    }
    let monitor = Arc::new(domain.monitor());
    Disks::attach(monitor.clone(), vm, &[], scratch_dir).and_then(|disks| disks.clear()).map_err(failed)?;
    memory::leave(&*monitor).map_err(failed)
}

fn active(hypervisor: &Hypervisor, vm: VmId) -> Result<Option<Domain>, CaptureError> {
    let domain = match hypervisor.domain_by_uuid(vm) {
        Err(HypervisorError::NotFound { .. }) => return Ok(None),
        domain => domain.map_err(look::domain_error)?,
    };
    Ok(domain.state().map_err(look::domain_error)?.is_active().then_some(domain))
}
