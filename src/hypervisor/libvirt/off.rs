//! Why a domain is off, as far as libvirt remembers: until libvirtd is restarted it knows how the last run ended.

use super::{domain::Domain, error::HypervisorError};
use virt::{
    domain::{DomainShutoffReason, DomainState as VirtState, DomainStateReason as StateReason},
    enumutil::Enum,
};

/// How a domain that is off came to be so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Off {
    /// It was shut down by its guest, or ended by its operator.
    Wanted,
    /// Its QEMU crashed, or was ended by something else than its operator.
    Failed,
    /// Its memory lies in a file, from which it goes on.
    Saved,
    MovedAway,
    /// Nobody remembers, or it was never started.
    Unknown,
}

impl Domain {
    /// `None` while there is a QEMU process.
    pub fn off(&self) -> Result<Option<Off>, HypervisorError> {
        self.with("asking why it is off", |domain| {
            let (state, reason) = domain.state()?;
            let off = match (state, reason) {
                (Enum::Known(VirtState::Crashed), _) => Off::Failed,
                (Enum::Known(VirtState::Shutoff), Enum::Known(StateReason::Shutoff(Enum::Known(reason)))) => {
                    match reason {
                        DomainShutoffReason::Shutdown
                        | DomainShutoffReason::Destroyed
                        | DomainShutoffReason::FromSnapshot => Off::Wanted,
                        DomainShutoffReason::Crashed | DomainShutoffReason::Daemon => Off::Failed,
                        DomainShutoffReason::Migrated => Off::MovedAway,
                        DomainShutoffReason::Saved => Off::Saved,
                        DomainShutoffReason::Failed | DomainShutoffReason::Unknown => Off::Unknown,
                    }
                }
                (Enum::Known(VirtState::Shutoff | VirtState::NoState) | Enum::Unknown(_), _) => Off::Unknown,
                _ => return Ok(None),
            };
            // That it has a managed save is known after a restart of libvirtd as well.
            Ok(Some(if domain.has_managed_save(0)? { Off::Saved } else { off }))
        })
    }
}
