//! What a host's libvirt can run: machine types, processors, memory. Every call blocks. Called by the site's failover, before
//! it relies on it.

use super::{Hypervisor, HypervisorError};
use crate::units::ByteSize;
use virt::sys;

/// What a domain asks of its host, beside devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    pub emulator: Option<String>,
    pub arch: Option<String>,
    /// `pc-i440fx-7.2`, say.
    pub machine: Option<String>,
    /// `kvm` or `qemu`.
    pub virt_type: Option<String>,
    /// Its `<cpu>` element, where the guest sees the host's processor: as libvirt compares it with its own.
    pub cpu: Option<String>,
}

impl Hypervisor {
    /// Why a domain of this machine type can't be run, in libvirt's words; `None` if it can.
    pub fn lacks_machine(&self, machine: &Machine) -> Result<Option<String>, HypervisorError> {
        let asked = self.with("asking what can be run", |link| {
            link.connect.domain_capabilities(
                machine.emulator.as_deref(),
                machine.arch.as_deref(),
                machine.machine.as_deref(),
                machine.virt_type.as_deref(),
                0,
            )
        });
        match asked {
            Ok(_) => Ok(None),
            Err(HypervisorError::Refused { words, .. } | HypervisorError::NotFound { words, .. }) => {
                Ok(Some(words))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the host's processor has all that this `<cpu>` element names.
    pub fn has_processor(&self, cpu: &str) -> Result<bool, HypervisorError> {
        let compared = self.with("comparing processors", |link| link.connect.compare_cpu(cpu, 0))?;
        Ok(compared != sys::VIR_CPU_COMPARE_INCOMPATIBLE)
    }

    /// Memory that the host has, and that no one uses.
    pub fn free_memory(&self) -> Result<ByteSize, HypervisorError> {
        self.with("asking for free memory", |link| link.connect.free_memory()).map(ByteSize)
    }
}
