//! What a host's libvirt can run, and has room for: machine types, processors, memory. Every call blocks. Called by the site's
//! failover, before it relies on it.

use super::{Hypervisor, HypervisorError};
use crate::{
    hypervisor::{domain_xml::capabilities, version::QemuVersion},
    id::VmId,
    units::ByteSize,
};
use std::{collections::BTreeMap, ffi::CStr, ptr};
use virt::{
    connect::Connect,
    error::{Error, ErrorNumber},
    sys,
};

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

    /// Of the QEMU that a domain of this machine is run by; `None` where it is not the host's ordinary one, of which alone
    /// libvirt tells.
    pub fn qemu_version(&self, machine: &Machine) -> Result<Option<QemuVersion>, HypervisorError> {
        let (number, ordinary) = self.with("asking for QEMU's version", |link| {
            Ok((link.connect.hyp_version()?, link.connect.domain_capabilities(None, None, None, None, 0)?))
        })?;
        let ordinary = capabilities::emulator(&ordinary);
        let is_it = machine.emulator.as_ref().is_none_or(|emulator| ordinary.as_ref() == Some(emulator));
        Ok(is_it.then(|| QemuVersion::of_libvirt(number)))
    }

    /// Whether the host's processor has all that this `<cpu>` element names.
    pub fn has_processor(&self, cpu: &str) -> Result<bool, HypervisorError> {
        let compared = self.with("comparing processors", |link| link.connect.compare_cpu(cpu, 0))?;
        Ok(compared != sys::VIR_CPU_COMPARE_INCOMPATIBLE)
    }

    /// What the host has, and what its guests have of it.
    pub fn load(&self) -> Result<Load, HypervisorError> {
        self.with("asking what the host has", |link| {
            let node = link.connect.node_info()?;
            let mut load = Load {
                memory: ByteSize(memory(&memory_stats(&link.connect)?)),
                cores: node.cpus.max(1),
                vcpus: 0,
                guests: Vec::new(),
            };
            let mut taken = 0u64;
            for domain in link.connect.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)? {
                let (info, uuid) = match domain.info().and_then(|info| Ok((info, domain.uuid_string()?))) {
                    // It ended meanwhile.
                    Err(error) if error.code() == ErrorNumber::NoDomain.into() => continue,
                    found => found?,
                };
                taken = taken.saturating_add(info.max_mem.saturating_mul(1024));
                load.vcpus = load.vcpus.saturating_add(info.nr_virt_cpu);
                load.guests.extend(uuid.parse::<VmId>().ok());
            }
            let total = node.memory.saturating_mul(1024);
            load.memory = ByteSize(load.memory.0.min(total.saturating_sub(taken)));
            Ok(load)
        })
    }

    /// Bytes of free huge pages of this size.
    pub fn free_huge_pages(&self, kib: u64) -> Result<ByteSize, HypervisorError> {
        let size = u32::try_from(kib).unwrap_or(u32::MAX);
        let pages = self.with("asking for huge pages", |link| {
            let nodes = link.connect.node_info()?.nodes.max(1);
            link.connect.free_pages(&[size], 0, nodes, 0)
        })?;
        let pages = pages.into_iter().fold(0u64, u64::saturating_add);
        Ok(ByteSize(pages.saturating_mul(kib).saturating_mul(1024)))
    }

    /// Whether the host has a bridge, or any other interface, of this name; `None` if its libvirt can't say.
    pub fn has_interface(&self, name: &str) -> Result<Option<bool>, HypervisorError> {
        self.with(&format!("interface `{name}`"), |link| {
            known(link.connect.lookup_interface_by_name(name).map(drop), ErrorNumber::NoInterface)
        })
    }
}

/// What a host has for one more guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Memory that a new process can have, and that no guest was promised.
    pub memory: ByteSize,
    pub cores: u32,
    /// Of the guests that run there.
    pub vcpus: u32,
    pub guests: Vec<VmId>,
}

/// `None`: this libvirt has no such driver.
pub(super) fn known(found: Result<(), Error>, missing: ErrorNumber) -> Result<Option<bool>, Error> {
    match found {
        Ok(()) => Ok(Some(true)),
        Err(error) if error.code() == missing.into() => Ok(Some(false)),
        Err(error) if error.code() == ErrorNumber::NoSupport.into() => Ok(None),
        Err(error) => Err(error),
    }
}

/// As the kernel has it, where libvirt passes that on; otherwise what it would give back for the asking, of which shared memory
/// is a part that it would not: [`Hypervisor::load`] knows what guests were promised besides.
fn memory(stats: &BTreeMap<String, u64>) -> u64 {
    let kib = |field: &str| stats.get(field).copied();
    let sum =
        || ["free", "buffers", "cached"].iter().filter_map(|field| kib(field)).fold(0, u64::saturating_add);
    kib("available").unwrap_or_else(sum).saturating_mul(1024)
}

/// By field, KiB. Missing in the crate.
fn memory_stats(connect: &Connect) -> Result<BTreeMap<String, u64>, Error> {
    let (all, mut count) = (sys::VIR_NODE_MEMORY_STATS_ALL_CELLS, 0);
    // SAFETY: the connection is alive; without an array libvirt only says how many there are.
    if unsafe { sys::virNodeGetMemoryStats(connect.as_ptr(), all, ptr::null_mut(), &mut count, 0) } < 0 {
        return Err(Error::last_error());
    }
    let empty =
        sys::virNodeMemoryStats { field: [0; sys::VIR_NODE_MEMORY_STATS_FIELD_LENGTH as usize], value: 0 };
    let mut stats = vec![empty; usize::try_from(count).unwrap_or_default()];
    // SAFETY: the array has the room that `count` says, and libvirt fills no more.
    if unsafe { sys::virNodeGetMemoryStats(connect.as_ptr(), all, stats.as_mut_ptr(), &mut count, 0) } < 0 {
        return Err(Error::last_error());
    }
    let read = |stat: &sys::virNodeMemoryStats| {
        // SAFETY: libvirt ends each name within its field.
        let name = unsafe { CStr::from_ptr(stat.field.as_ptr()) };
        (name.to_string_lossy().into_owned(), stat.value)
    };
    Ok(stats.iter().map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_kernel_would_give() {
        let stats = |fields: &[(&str, u64)]| {
            memory(&fields.iter().map(|(name, kib)| ((*name).to_owned(), *kib)).collect()) >> 10
        };
        assert_eq!(stats(&[("total", 100), ("free", 10), ("buffers", 5), ("cached", 20)]), 35);
        assert_eq!(stats(&[("free", 10), ("available", 30), ("cached", 90)]), 30);
        assert_eq!(stats(&[]), 0);
    }
}
