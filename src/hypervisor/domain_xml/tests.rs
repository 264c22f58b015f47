//! Goal: disks are found as libvirt names them, and whatever a cut would miss is refused with a remedy.

use super::*;
use proptest::prelude::*;

fn domain(devices: &str, more: &str) -> String {
    format!(
        "<domain type='kvm' id='3'><name>db1</name><uuid>0b8f8e5e-6c37-4a5e-9f0e-0d5c3f1f1a11</uuid>\
         <memory unit='KiB'>524288</memory>{more}<devices>{devices}</devices></domain>"
    )
}

const DISKS: &str = "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a.qcow2' index='2'/>\
    <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>\
    <disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd' name='pool/img'/>\
    <target dev='vdb' bus='virtio'/><alias name='ua-mine'/></disk>\
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/><alias name='sata0-0-0'/></disk>";

#[test]
fn a_plain_domain_is_understood_and_nothing_stands_in_the_way() {
    let spec = DomainSpec::read(&domain(DISKS, "")).unwrap();
    assert_eq!(
        (spec.name.as_str(), spec.memory_bytes, spec.domain_type),
        ("db1", 512 << 20, DomainType::Kvm)
    );
    let replicated: Vec<_> =
        spec.replicated_disks().map(|disk| (disk.target.as_str(), disk.alias.as_deref())).collect();
    assert_eq!(replicated, [("vda", Some("virtio-disk0")), ("vdb", Some("ua-mine"))]);
    assert_eq!(spec.disks[1].source, "rbd:pool/img");
    assert_eq!(spec.disks[2].source, "no medium");
    assert!(spec.memory_obstacles.is_empty() && spec.disk_obstacles.is_empty(), "{spec:?}");
}

#[test]
fn what_a_memory_cut_would_miss_is_refused_with_a_remedy() {
    for (devices, more, word) in [
        ("<hostdev mode='subsystem' type='pci'/>", "", "passed through"),
        ("<interface type='hostdev'/>", "", "hostdev"),
        ("<interface type='vhostuser'/>", "", "vhost-user"),
        ("<filesystem type='mount'><driver type='virtiofs'/></filesystem>", "", "virtiofs"),
        ("<memory model='nvdimm'/>", "", "nvdimm"),
        ("<tpm model='tpm-crb'><backend type='passthrough'/></tpm>", "", "TPM"),
        ("", "<memoryBacking><access mode='shared'/></memoryBacking>", "shared"),
        ("", "<cpu><numa><cell id='0' memAccess='shared'/></numa></cpu>", "NUMA"),
        ("", "<launchSecurity type='sev'/>", "SEV"),
    ] {
        let spec = DomainSpec::read(&domain(devices, more)).unwrap();
        assert_eq!(spec.memory_obstacles.len(), 1, "{devices}{more}: {:?}", spec.memory_obstacles);
        let reason = &spec.memory_obstacles[0];
        assert!(reason.contains(word) && reason.contains("; "), "{reason}");
    }
}

#[test]
fn huge_pages_are_told_and_are_no_obstacle() {
    let read = |backing: &str| DomainSpec::read(&domain("", backing)).unwrap();
    let plain = read("<memoryBacking><nosharepages/></memoryBacking>");
    assert!(!plain.huge_pages && plain.memory_obstacles.is_empty());
    let huge = read("<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages></memoryBacking>");
    assert!(huge.huge_pages && huge.memory_obstacles.is_empty(), "{huge:?}");
}

#[test]
fn disks_that_can_not_be_tracked_are_refused_by_name() {
    let disk = |attributes: &str, inner: &str| {
        domain(&format!("<disk {attributes}>{inner}<target dev='vdc'/></disk>"), "")
    };
    for xml in [
        disk("type='block' device='lun'", ""),
        disk("type='file' device='disk'", "<shareable/>"),
        disk("type='file' device='disk'", "<transient/>"),
    ] {
        let spec = DomainSpec::read(&xml).unwrap();
        assert!(spec.disk_obstacles.iter().any(|reason| reason.starts_with("disk vdc ")), "{spec:?}");
    }
    assert!(
        DomainSpec::read(&disk("type='file' device='cdrom'", "<shareable/>"))
            .unwrap()
            .disk_obstacles
            .is_empty()
    );
}

#[test]
fn other_xml_is_refused_in_words() {
    for bad in ["", "<domain", "<network/>", "<domain type='xen'/>", "<domain type='kvm'/>"] {
        assert!(DomainSpec::read(bad).unwrap_err().to_string().contains("XML"));
    }
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(noise in ".{0,300}") {
        let _ = DomainSpec::read(&noise);
        let _ = DomainSpec::read(&domain(&noise, ""));
    }
}
