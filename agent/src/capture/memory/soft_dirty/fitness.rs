//! Where the kernel's flags tell everything that is written to a guest's memory, and where they would be blind.
//! Promises: a doubt is a refusal with its reason; nothing is changed by asking.

use super::flags::{KernelFlags, kernel_has_flags};
use crate::capture::memory::{
    Fitness, MemoryError, Target,
    process_memory::{self, Mapping},
};
use lifeboat::hypervisor::{domain_xml::DomainSpec, libvirt::QemuProcess, monitor::Monitor};
use serde_json::{Value, json};
use std::{fs, io, path::Path};

/// A shared mapping from this size on may be the guest's memory; a smaller one is QEMU's own (rings, vCPU pages).
const SHARED_MIN: u64 = 2 << 20;
/// Devices that write to the memory of a process past its page tables.
const BLIND: &[(&str, &str)] = &[
    ("/dev/vfio/", "a host device is passed through (VFIO), which writes to memory unseen"),
    ("/dev/iommu", "a host device is passed through (IOMMUFD), which writes to memory unseen"),
    ("/dev/vhost-vdpa", "a vDPA device writes to its memory unseen"),
    ("/dev/udmabuf", "its memory is lent to a graphics card (udmabuf), which writes unseen"),
];
const KSM_RUN: &str = "/sys/kernel/mm/ksm/run";

pub fn probe(target: &Target, spec: &DomainSpec) -> Fitness {
    match obstacle(target, spec) {
        Ok(None) => Fitness {
            usable: true,
            why: "the kernel tells which pages were written; the pause reads only those".into(),
        },
        Ok(Some(why)) => Fitness { usable: false, why },
        Err(error) => Fitness { usable: false, why: format!("its pages' flags can't be had: {error}") },
    }
}

fn obstacle(target: &Target, spec: &DomainSpec) -> Result<Option<String>, MemoryError> {
    if !kernel_has_flags()? {
        return Ok(Some(
            "this host's kernel does not flag pages that are written (CONFIG_MEM_SOFT_DIRTY is off)".into(),
        ));
    }
    if spec.huge_pages {
        return Ok(Some(
            "its memory is made of huge pages (<hugepages/>), of which no writes are told".into(),
        ));
    }
    KernelFlags::open(target.process)?;
    let mappings = process_memory::mappings(target.process)?;
    if let Some(why) = mapped_blindly(&mappings, spec.memory_bytes) {
        return Ok(Some(why));
    }
    if let Some(why) = written_by_devices(target.process)? {
        return Ok(Some(why.to_owned()));
    }
    let merging = Merging::of(target.process)?;
    if merging.merged || merging.at_work && is_mergeable(target.process)? {
        return Ok(Some(MERGED.into()));
    }
    Ok(runs_guests(&*target.monitor).then(|| NESTED.to_owned()))
}

const MERGED: &str = "its memory may be merged with other guests' (KSM runs on this host), which loses flags; stop \
    KSM, or give the guest <memoryBacking><nosharepages/></memoryBacking>";
const NESTED: &str = "it has run guests of its own (nested virtualisation); the processor writes some of their state \
    to memory unseen";

fn mapped_blindly(mappings: &[Mapping], memory_bytes: u64) -> Option<String> {
    let size = |mapping: &Mapping| mapping.range.end - mapping.range.start;
    let large =
        |mapping: &&Mapping| mapping.writable && !mapping.of.is_empty() && size(mapping) >= SHARED_MIN;
    if let Some(huge) = mappings.iter().filter(large).find(|mapping| mapping.of.contains("hugepage")) {
        return Some(format!("its memory is made of huge pages ({}), of which no writes are told", huge.of));
    }
    if let Some(shared) = mappings.iter().filter(large).find(|mapping| mapping.shared) {
        let what =
            "is shared: other processes' writes to it are not told, and flags are lost when it is swapped";
        return Some(format!("its memory ({}) {what}", shared.of));
    }
    let ordinary: u64 = mappings.iter().filter(|mapping| is_plain(mapping)).map(size).sum();
    (ordinary < memory_bytes).then(|| {
        "its memory is kept in a file or in huge pages, not in ordinary memory of its QEMU process".to_owned()
    })
}

fn is_plain(mapping: &Mapping) -> bool {
    mapping.readable && mapping.writable && !mapping.shared && mapping.of.is_empty()
}

/// Ranges of the process of which the flags tell every write.
pub fn told_by_flags(process: QemuProcess) -> Result<Vec<(u64, u64)>, MemoryError> {
    Ok(process_memory::joined(process_memory::mappings(process)?.into_iter().filter(is_plain)))
}

/// Whether the kernel merges equal pages of this process with others' (KSM): a merged page loses its flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merging {
    /// It is at work on this host.
    pub at_work: bool,
    /// Pages of this process are merged now.
    pub merged: bool,
}

impl Merging {
    /// Quickly told.
    pub fn of(process: QemuProcess) -> Result<Self, MemoryError> {
        let number = |path: String| match fs::read_to_string(path) {
            Ok(text) => Ok(text.trim().parse::<u64>().unwrap_or(u64::MAX)),
            // A kernel without KSM, or one that does not count per process.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(MemoryError::io("reading what the kernel merges")(error)),
        };
        let merged = number(format!("/proc/{}/ksm_merging_pages", process.pid))? > 0;
        Ok(Self { at_work: number(KSM_RUN.into())? == 1, merged })
    }

    /// Refuses what was read by flags since `self` was told, if pages may have been merged meanwhile.
    pub fn check_since(self, process: QemuProcess) -> Result<(), MemoryError> {
        let now = Self::of(process)?;
        if now.merged || now.at_work && !self.at_work {
            let what = "the host began to merge equal pages (KSM), which loses flags";
            return Err(MemoryError::Changed { what: what.into() });
        }
        Ok(())
    }
}

/// Whether the kernel may merge pages of this process once it is at it. Takes long: it walks the process's pages.
pub fn is_mergeable(process: QemuProcess) -> Result<bool, MemoryError> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", process.pid))
        .map_err(MemoryError::io("reading the memory map of QEMU's process"))?;
    Ok(mergeable(&smaps))
}

/// Whether any mapping has the kernel's leave to merge it (`mg`).
fn mergeable(smaps: &str) -> bool {
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.into_iter().any(|flags| flags.split_whitespace().any(|flag| flag == "mg"))
}

fn written_by_devices(process: QemuProcess) -> Result<Option<&'static str>, MemoryError> {
    let io = MemoryError::io;
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).map_err(io("listing QEMU's open files"))?;
    // One that was closed meanwhile is no longer anybody's.
    let links = open.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    Ok(links.into_iter().find_map(|link| blind(&link)))
}

fn blind(link: &Path) -> Option<&'static str> {
    let link = link.to_string_lossy();
    BLIND.iter().find(|(path, _)| link.starts_with(path)).map(|(_, why)| *why)
}

/// Whether any vCPU has entered a guest of the guest's. A QEMU that keeps no such count is not KVM, or too old to ask.
fn runs_guests(monitor: &dyn Monitor) -> bool {
    let names = json!([{ "provider": "kvm", "names": ["nested_run"] }]);
    let asked = monitor.execute("query-stats", json!({ "target": "vcpu", "providers": names }));
    asked.is_ok_and(|answer| nested_entries(&answer) > 0)
}

fn nested_entries(answer: &Value) -> u64 {
    let vcpus = answer.as_array().into_iter().flatten();
    let stats = vcpus.filter_map(|vcpu| vcpu["stats"].as_array()).flatten();
    stats.filter(|stat| stat["name"] == "nested_run").filter_map(|stat| stat["value"].as_u64()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(mib: u64, shared: bool, of: &str) -> Mapping {
        Mapping { range: 0..mib << 20, readable: true, writable: true, shared, of: of.into() }
    }

    #[test]
    fn memory_of_which_writes_are_not_told_is_refused_with_the_reason() {
        let refused = |mappings: &[Mapping]| mapped_blindly(mappings, 256 << 20).unwrap_or_default();
        assert_eq!(refused(&[mapping(256, false, ""), mapping(1, true, "anon_inode:kvm-vcpu:0")]), "");
        assert!(refused(&[mapping(256, true, "/memfd:pc.ram")]).contains("shared"));
        assert!(refused(&[mapping(256, false, "/anon_hugepage")]).contains("huge pages"));
        assert!(
            refused(&[mapping(256, false, "/var/lib/ram"), mapping(99, false, "")]).contains("in a file")
        );
    }

    #[test]
    fn devices_and_nested_guests_that_write_unseen_are_told() {
        assert!(blind(Path::new("/dev/vfio/12")).unwrap().contains("VFIO"));
        assert!(blind(Path::new("/dev/vhost-vdpa-0")).unwrap().contains("vDPA"));
        // Kernel vhost writes by QEMU's own page tables.
        assert_eq!(blind(Path::new("/dev/vhost-net")), None);
        let vcpu =
            |runs: u64| json!({ "provider": "kvm", "stats": [{ "name": "nested_run", "value": runs }] });
        assert_eq!(nested_entries(&json!([vcpu(0), vcpu(7)])), 7);
        assert_eq!(nested_entries(&json!({ "class": "GenericError" })), 0);
    }

    #[test]
    fn mergeable_memory_is_told_by_its_flag_alone() {
        assert!(mergeable("7f00-7f10 rw-p\nVmFlags: rd wr mr mw me ac sd mg \n"));
        assert!(!mergeable("7f00-7f10 rw-p /img/mg\nVmFlags: rd wr mr mw me ac sd\n"));
    }
}
