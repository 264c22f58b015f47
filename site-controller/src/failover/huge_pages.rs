//! Huge pages that a replica's memory is made of: what its XML asks for, and whether this host has it.
//! Promises: a lack is told with its size before anything is changed. Reading only. Called by `replica_xml`, `preflight`.

use super::replica_xml::tree::elements;
use lifeboat::{
    hypervisor::libvirt::{Hypervisor, HypervisorError},
    units::ByteSize,
};
use std::{fs, path::Path};
use xmltree::Element;

/// So much memory of pages of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// KiB of one page; `None`: of the size that is the host's default.
    pub kib: Option<u64>,
    pub bytes: u64,
    /// QEMU makes them out of nothing: no mounted file system is needed.
    pub memfd: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    #[error(
        "the replica's memory is made of huge pages of {kib} KiB: it needs {needed} of them, and this site has {free} free; \
         reserve them (`sysctl vm.nr_hugepages=N`)"
    )]
    Free { kib: u64, needed: ByteSize, free: ByteSize },
    #[error(
        "the replica's memory is made of huge pages of {kib} KiB, a size that this site's kernel does not have"
    )]
    Size { kib: u64 },
    #[error(
        "the replica's memory is made of huge pages of {kib} KiB, and no hugetlbfs of that size is mounted at this site; \
         mount one and restart libvirtd"
    )]
    Mount { kib: u64 },
}

/// What the domain asks for.
pub fn asked(domain: &Element) -> Vec<HugePages> {
    let Some(backing) = domain.get_child("memoryBacking") else { return Vec::new() };
    let Some(huge) = backing.get_child("hugepages") else { return Vec::new() };
    let source = backing.get_child("source").and_then(|source| source.attributes.get("type"));
    let memfd = source.is_some_and(|source| source == "memfd");
    let memory = memory_bytes(domain);
    let pages: Vec<&Element> = elements(huge, "page").collect();
    let kib = |page: &Element| page.attributes.get("size").and_then(|size| size.parse().ok());
    match pages.as_slice() {
        [] => vec![HugePages { kib: None, bytes: memory, memfd }],
        [page] if !page.attributes.contains_key("nodeset") => {
            vec![HugePages { kib: kib(page), bytes: memory, memfd }]
        }
        // Some nodes' memory: at least a page of each size.
        several => {
            let one = |page: &&Element| {
                let kib = kib(page)?;
                Some(HugePages { kib: Some(kib), bytes: kib.checked_mul(1 << 10)?, memfd })
            };
            several.iter().filter_map(one).collect()
        }
    }
}

/// All memory of the domain. libvirt writes sizes in KiB.
pub fn memory_bytes(domain: &Element) -> u64 {
    let text = domain.get_child("memory").and_then(Element::get_text);
    text.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or_default().saturating_mul(1 << 10)
}

/// Whether the host has them. `root` is `/`.
pub fn check(asked: &[HugePages], root: &Path) -> Result<(), Lack> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let usual = || {
        let meminfo = read("proc/meminfo");
        let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(USUAL_KIB)
    };
    for HugePages { kib, bytes, memfd } in asked {
        let kib: u64 = kib.unwrap_or_else(usual);
        let folder = format!("sys/kernel/mm/hugepages/hugepages-{kib}kB");
        if !root.join(&folder).exists() {
            return Err(Lack::Size { kib });
        }
        let pages = |file: &str| read(&format!("{folder}/{file}")).trim().parse::<u64>().unwrap_or_default();
        let free = pages("free_hugepages").saturating_sub(pages("resv_hugepages")).saturating_mul(kib << 10);
        if free < *bytes {
            return Err(Lack::Free { kib, needed: ByteSize(*bytes), free: ByteSize(free) });
        }
        let size = if kib < 1024 { format!("pagesize={kib}K") } else { format!("pagesize={}M", kib >> 10) };
        let is_of_size = |line: &str| {
            let mut words = line.split_whitespace().skip(2);
            let kind = words.next() == Some("hugetlbfs");
            kind && words.next().is_some_and(|options| options.split(',').any(|option| option == size))
        };
        if !memfd && !read("proc/mounts").lines().any(is_of_size) {
            return Err(Lack::Mount { kib });
        }
    }
    Ok(())
}

/// Whether another host has them, as its libvirt says; what is mounted there that does not tell.
pub fn check_there(asked: &[HugePages], there: &Hypervisor) -> Result<Option<Lack>, HypervisorError> {
    for HugePages { kib, bytes, .. } in asked {
        let kib = kib.unwrap_or(USUAL_KIB);
        let free = match there.free_huge_pages(kib) {
            Ok(free) => free,
            Err(HypervisorError::Refused { .. }) => return Ok(Some(Lack::Size { kib })),
            Err(error) => return Err(error),
        };
        if free.0 < *bytes {
            return Ok(Some(Lack::Free { kib, needed: ByteSize(*bytes), free }));
        }
    }
    Ok(None)
}

/// Where no size is named, that of x86.
const USUAL_KIB: u64 = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    fn of(backing: &str) -> Vec<HugePages> {
        let xml = format!(
            "<domain><memory unit='KiB'>262144</memory><memoryBacking>{backing}</memoryBacking></domain>"
        );
        asked(&Element::parse(xml.as_bytes()).unwrap())
    }

    #[test]
    fn a_site_without_the_replicas_huge_pages_says_what_it_lacks() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("proc/meminfo", "MemTotal: 1 kB\nHugepagesize:       2048 kB\n");
        put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "128\n");
        put("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "0\n");
        let check = |backing: &str| check(&of(backing), root.path());
        assert_eq!(check("<nosharepages/>"), Ok(()));
        assert_eq!(check("<hugepages/>"), Err(Lack::Mount { kib: 2048 }));
        assert_eq!(check("<source type='memfd'/><hugepages/>"), Ok(()));
        put("proc/mounts", "hugetlbfs /dev/hugepages hugetlbfs rw,relatime,pagesize=2M 0 0\n");
        assert_eq!(check("<hugepages/>"), Ok(()));
        let gib = "<hugepages><page size='1048576' unit='KiB'/></hugepages>";
        assert_eq!(check(gib), Err(Lack::Size { kib: 1 << 20 }));
        let of_nodes = "<hugepages><page size='2048' unit='KiB' nodeset='1'/></hugepages>";
        assert_eq!(check(of_nodes), Ok(()));
        // What others have reserved is not free.
        put("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "1\n");
        let lack = check("<hugepages/>").unwrap_err();
        assert!(lack.to_string().contains("256") && lack.to_string().contains("254"), "{lack}");
    }
}
