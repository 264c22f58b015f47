//! Letting a guest go: resumes it if, and only if, it stands paused; thaws its file systems if they are frozen.

use super::{Markers, Noted, WatchdogError, found_standing, gone_out};
use lifeboat::{
    hypervisor::{
        libvirt::{Domain, DomainState, Hypervisor, HypervisorError},
        monitor::{Monitor, MonitorError},
    },
    id::VmId,
};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

/// What was found and done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    Resumed,
    /// It was not paused: it runs, or stands for a reason of its own (an I/O error, say).
    NotPaused,
    /// There is no such running guest.
    Gone,
    /// It was saved, with its file systems frozen: they are thawed when it is back.
    Saved,
}

/// Somebody who can let a guest go.
pub trait Release: Send + Sync {
    /// `mark` is what its marker said.
    fn release(&self, vm: VmId, mark: Option<&str>) -> Result<Released, WatchdogError>;
    /// Thaws its file systems; `NotPaused` if none is frozen.
    fn thaw(&self, vm: VmId) -> Result<Released, WatchdogError>;
    /// Puts capabilities back that a dead agent changed; `false` if a migration still runs.
    fn put_back(&self, vm: VmId, noted: &Noted) -> Result<bool, WatchdogError>;
}

/// Through libvirt, by a connection of its own.
pub struct LibvirtRelease {
    uri: String,
    hypervisor: Mutex<Option<Hypervisor>>,
}

impl LibvirtRelease {
    pub fn new(uri: String) -> Self {
        // Connected early, so that nothing but a broken libvirt stands between a deadline and the guest.
        let hypervisor = Mutex::new(Hypervisor::connect(&uri).ok());
        Self { uri, hypervisor }
    }

    fn hypervisor(&self) -> Result<Hypervisor, HypervisorError> {
        let mut slot = self.hypervisor.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.as_ref() {
            Some(hypervisor) => Ok(hypervisor.clone()),
            None => Ok(slot.insert(Hypervisor::connect(&self.uri)?).clone()),
        }
    }
}

impl LibvirtRelease {
    /// The guest; `None` if libvirt does not know it.
    fn domain(&self, vm: VmId) -> Result<Option<Domain>, WatchdogError> {
        match self.hypervisor()?.domain_by_uuid(vm) {
            Err(HypervisorError::NotFound { .. }) => Ok(None),
            domain => Ok(Some(domain?)),
        }
    }

    /// The guest; `None` if it does not run.
    fn running(&self, vm: VmId) -> Result<Option<Domain>, WatchdogError> {
        let Some(domain) = self.domain(vm)? else { return Ok(None) };
        Ok(domain.state()?.is_active().then_some(domain))
    }
}

impl Release for LibvirtRelease {
    fn release(&self, vm: VmId, mark: Option<&str>) -> Result<Released, WatchdogError> {
        let Some(domain) = self.domain(vm)? else { return Ok(Released::Gone) };
        if !domain.state()?.is_active() {
            found_standing::look(&domain);
            return Ok(Released::Gone);
        }
        if let Some(held) = mark.and_then(Markers::held_file) {
            return let_stand_go(&domain, &held);
        }
        let monitor = domain.monitor();
        let status = status(&monitor)?;
        let gone_out = gone_out::is_end(&status);
        let stands = status == "paused" || gone_out;
        // A pause that libvirt has a reason for is an operator's, a save's or a migration's: never ours.
        if !stands || domain.is_held_by_libvirt()? {
            return Ok(Released::NotPaused);
        }
        if !gone_out {
            monitor.execute("cont", json!({}))?;
            found_standing::look(&domain);
        } else if gone_out::may_go_on(&domain, &monitor)? {
            // libvirt carries this out when its own work is over, and not before.
            domain.resume()?;
        } else {
            return Ok(Released::NotPaused);
        }
        Ok(Released::Resumed)
    }

    fn thaw(&self, vm: VmId) -> Result<Released, WatchdogError> {
        let Some(domain) = self.domain(vm)? else { return Ok(Released::Gone) };
        if !domain.state()?.is_active() {
            return Ok(if domain.was_saved()? { Released::Saved } else { Released::Gone });
        }
        let agent = domain.guest_agent();
        if !agent.is_frozen()? {
            return Ok(Released::NotPaused);
        }
        agent.thaw()?;
        Ok(Released::Resumed)
    }

    fn put_back(&self, vm: VmId, noted: &Noted) -> Result<bool, WatchdogError> {
        match self.running(vm)? {
            Some(domain) => noted.put_back(&domain.monitor()),
            None => noted.forget().map(|()| true),
        }
    }
}

/// A guest that an agent suspended for a planned failover. If it is held for good by now, only the site or its operator
/// lets it go on. One that its operator suspended in that moment as well is not told from it.
fn let_stand_go(domain: &Domain, held: &Path) -> Result<Released, WatchdogError> {
    let held = held.try_exists();
    if held.map_err(|source| WatchdogError::Io { step: "looking whether it is held", source })? {
        return Ok(Released::NotPaused);
    }
    let stands = domain.state()? == DomainState::Paused && domain.held_for()?.is_none();
    if stands {
        domain.resume()?;
    }
    Ok(if stands { Released::Resumed } else { Released::NotPaused })
}

/// QEMU's own word on whether the guest runs.
pub fn status(monitor: &dyn Monitor) -> Result<String, MonitorError> {
    let answer = monitor.execute("query-status", json!({}))?;
    answer
        .get("status")
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| MonitorError::Unexpected { command: "query-status".into(), what: answer.to_string() })
}
