//! A replica keeps the source's identity and device addresses, and nothing of the source host.

use super::*;

const ACTIVE: &str = r#"<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>7a1b3c5d-0000-4000-8000-000000000001</uuid>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type><kernel>/boot/vmlinuz</kernel></os>
  <devices>
    <disk type='block' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native'/>
      <source dev='/dev/vg/web' index='2'/><backingStore type='file'><source file='/base'/></backingStore>
      <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/><address type='pci' slot='0x04'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/install.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:aa:bb:cc'/><source network='default' portid='x' bridge='virbr0'/>
      <target dev='vnet3'/><alias name='net0'/></interface>
    <serial type='pty'><source path='/dev/pts/4'/><target port='0'/></serial>
    <graphics type='vnc' port='5903' autoport='yes'/>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+64055</label></seclabel>
  <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline>
</domain>"#;

fn rewritten() -> Rewritten {
    let disks = BTreeMap::from([("vda".to_owned(), PathBuf::from("/replicas/web/vda.raw"))]);
    rewrite(ACTIVE, &disks).unwrap()
}

#[test]
fn identity_and_device_addresses_stay_while_paths_become_the_sites() {
    let xml = rewritten().xml;
    for kept in [
        "7a1b3c5d-0000-4000-8000-000000000001",
        "52:54:00:aa:bb:cc",
        "virtio-disk0",
        "slot=\"0x04\"",
        "cache=\"none\"",
        "qemu:arg",
        "http://libvirt.org/schemas/domain/qemu/1.0",
    ] {
        assert!(xml.contains(kept), "{kept} is gone from {xml}");
    }
    assert!(xml.contains("file=\"/replicas/web/vda.raw\"") && xml.contains("type=\"raw\""));
    for gone in [
        "/dev/vg/web",
        "backingStore",
        "vnet3",
        "virbr0",
        "/dev/pts/4",
        "5903",
        "64055",
        "install.iso",
        "id=\"7\"",
    ] {
        assert!(!xml.contains(gone), "{gone} is still in {xml}");
    }
}

#[test]
fn what_the_site_must_have_is_listed() {
    let needs = rewritten().needs;
    assert_eq!(needs.files, [PathBuf::from("/boot/vmlinuz")]);
    assert_eq!(needs.networks, ["default"]);
}

#[test]
fn a_disk_that_the_point_lacks_is_refused_by_name() {
    assert_eq!(rewrite(ACTIVE, &BTreeMap::new()), Err(XmlError::DiskMissing("vda".into())));
    assert_eq!(writable_disks(ACTIVE).unwrap(), ["vda"]);
}

#[test]
fn nonsense_is_refused_with_words() {
    for bad in ["", "<domain", "<network/>", "\u{0}"] {
        assert!(matches!(rewrite(bad, &BTreeMap::new()), Err(XmlError::Malformed(_))), "{bad:?}");
    }
}
