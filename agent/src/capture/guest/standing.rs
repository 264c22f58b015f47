//! A guest that is held for a planned failover: suspended through libvirt, so that everybody can see that somebody meant
//! it, and let go or shut off by the site's word. Until it is held for good it is guarded, as a pause is.
//! All calls block; none waits for a cut that is open.

use super::{barrier, failed, look};
use crate::capture::{quiesce::StandingGuard, source::CaptureError};
use lifeboat::{
    fault,
    hypervisor::libvirt::{Domain, DomainState, Hypervisor, HypervisorError},
    id::VmId,
};
use std::path::Path;

/// One guest, and who watches over it.
#[derive(Clone)]
pub struct Standing {
    pub hypervisor: Hypervisor,
    pub vm: VmId,
    pub guard: StandingGuard,
}

impl Standing {
    /// Whether it runs; a guest that is off or not there does not.
    pub fn runs(&self) -> Result<bool, CaptureError> {
        Ok(match self.found()? {
            Some(domain) => domain.state().map_err(look::domain_error)? == DomainState::Running,
            None => false,
        })
    }

    /// It stands from here on; until `held` is there, whatever becomes of this process lets it go on.
    pub fn stand(&self, held: &Path) -> Result<(), CaptureError> {
        let domain = self.hypervisor.domain_by_uuid(self.vm).map_err(look::domain_error)?;
        if domain.state().map_err(look::domain_error)? != DomainState::Running {
            return Ok(());
        }
        self.guard.begin(self.vm, held).map_err(barrier::pause_error)?;
        fault::point("hold.guarded");
        domain.suspend().map_err(look::domain_error)?;
        if domain.is_held_by_libvirt().map_err(look::domain_error)? {
            Ok(())
        } else {
            Err(failed("libvirt does not know it to be suspended after it was"))
        }
    }

    /// The file that was named is there: nothing but the site's or an operator's word lets it go on any more.
    pub fn keep(&self) -> Result<(), CaptureError> {
        self.guard.end(self.vm).map_err(barrier::pause_error)?;
        if self.runs()? { Err(failed("it was let go on meanwhile")) } else { Ok(()) }
    }

    /// One that is off, as its host was restarted, say, starts as it does after any restart of the host.
    pub fn go_on(&self) -> Result<(), CaptureError> {
        let Some(domain) = self.found()? else { return Ok(()) };
        if domain.state().map_err(look::domain_error)? == DomainState::Paused {
            domain.resume().map_err(look::domain_error)?;
        }
        // One that was held has no guard any more, and one that the watchdog let go is where it should be.
        let _ = self.guard.end(self.vm);
        Ok(())
    }

    pub fn shut_off(&self) -> Result<(), CaptureError> {
        let Some(domain) = self.found()? else { return Ok(()) };
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

    fn found(&self) -> Result<Option<Domain>, CaptureError> {
        match self.hypervisor.domain_by_uuid(self.vm) {
            Err(HypervisorError::NotFound { .. }) => Ok(None),
            domain => domain.map(Some).map_err(look::domain_error),
        }
    }
}
