//! A guest that is held for a planned failover: suspended through libvirt, so that everybody can see that somebody meant
//! it, and let go or shut off by the site's word. All calls block; none waits for a cut that is open.

use super::look;
use crate::capture::source::CaptureError;
use lifeboat::{
    hypervisor::libvirt::{DomainState, Hypervisor, HypervisorError},
    id::VmId,
};

/// Whether it runs; a guest that is off or not there does not.
pub fn runs(hypervisor: &Hypervisor, vm: VmId) -> Result<bool, CaptureError> {
    match hypervisor.domain_by_uuid(vm) {
        Err(HypervisorError::NotFound { .. }) => Ok(false),
        domain => {
            Ok(domain.and_then(|domain| domain.state()).map_err(look::domain_error)? == DomainState::Running)
        }
    }
}

pub fn stand(hypervisor: &Hypervisor, vm: VmId) -> Result<(), CaptureError> {
    let domain = hypervisor.domain_by_uuid(vm).map_err(look::domain_error)?;
    if domain.state().map_err(look::domain_error)? == DomainState::Running {
        domain.suspend().map_err(look::domain_error)?;
    }
    Ok(())
}

pub fn go_on(hypervisor: &Hypervisor, vm: VmId) -> Result<(), CaptureError> {
    let domain = hypervisor.domain_by_uuid(vm).map_err(look::domain_error)?;
    if domain.state().map_err(look::domain_error)? == DomainState::Paused {
        domain.resume().map_err(look::domain_error)?;
    }
    Ok(())
}

pub fn shut_off(hypervisor: &Hypervisor, vm: VmId) -> Result<(), CaptureError> {
    let domain = match hypervisor.domain_by_uuid(vm) {
        Err(HypervisorError::NotFound { .. }) => return Ok(()),
        domain => domain.map_err(look::domain_error)?,
    };
    // First, so that no power cut in between brings it back.
    if domain.is_persistent().map_err(look::domain_error)?
        && domain.autostart().map_err(look::domain_error)?
    {
        domain.set_autostart(false).map_err(look::domain_error)?;
        tracing::warn!(
            vm = domain.name(),
            "its autostart was on, and is off now: it was handed over to the site"
        );
    }
    if domain.state().map_err(look::domain_error)?.is_active() {
        domain.destroy().map_err(look::domain_error)?;
    }
    Ok(())
}
