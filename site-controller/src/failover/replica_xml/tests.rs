//! A replica keeps the source's identity and device addresses, and nothing of the source host.

use super::*;
use lifeboat::id::VmId;

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
    rewrite(ACTIVE, &disks, Place::Its(&BTreeMap::new())).unwrap()
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
fn a_replica_bears_the_generation_of_its_own_failover_and_what_else_is_made_from_a_point_bears_none() {
    let disks = BTreeMap::from([("vda".to_owned(), PathBuf::from("/replicas/web/vda.raw"))]);
    let mut xml = rewritten().xml;
    for generation in [2, 4] {
        assert_eq!(label::of(&xml), None);
        let replica = labelled(&xml, Generation(generation)).unwrap();
        assert_eq!(label::of(&replica), Some(Generation(generation)), "{replica}");
        assert!(replica.contains("http://libvirt.org/schemas/domain/qemu/1.0"), "{replica}");
        // A point of it, at the other site.
        xml = rewrite(&replica, &disks, Place::Its(&BTreeMap::new())).unwrap().xml;
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
    assert_eq!(
        rewrite(ACTIVE, &BTreeMap::new(), Place::Its(&BTreeMap::new())),
        Err(XmlError::DiskMissing("vda".into()))
    );
    assert_eq!(writable_disks(ACTIVE).unwrap(), ["vda"]);
}

#[test]
fn nonsense_is_refused_with_words() {
    for bad in ["", "<domain", "<network/>", "\u{0}"] {
        assert!(
            matches!(
                rewrite(bad, &BTreeMap::new(), Place::Its(&BTreeMap::new())),
                Err(XmlError::Malformed(_))
            ),
            "{bad:?}"
        );
    }
}

fn devices_of(xml: &str, name: &str) -> Vec<Element> {
    let domain = Element::parse(xml.as_bytes()).unwrap();
    elements(domain.get_child("devices").unwrap(), name).cloned().collect()
}

#[test]
fn a_card_keeps_its_address_and_place_and_leads_where_the_runbook_says() {
    let disks = BTreeMap::from([("vda".to_owned(), PathBuf::from("/replicas/web/vda.raw"))]);
    let lead = |from: &str, to: NetworkHere| {
        let networks = BTreeMap::from([(from.to_owned(), to)]);
        let rewritten = rewrite(ACTIVE, &disks, Place::Its(&networks)).unwrap();
        let card = devices_of(&rewritten.xml, "interface").remove(0);
        assert_eq!(card.get_child("mac").unwrap().attributes["address"], "52:54:00:aa:bb:cc");
        assert_eq!(card.get_child("alias").unwrap().attributes["name"], "net0");
        (card, rewritten.needs)
    };
    let (card, needs) = lead("default", NetworkHere::Network("dr".into()));
    assert_eq!((card.attributes["type"].as_str(), needs.networks), ("network", vec!["dr".to_owned()]));
    let (card, needs) = lead("default", NetworkHere::Bridge("br7".into()));
    assert_eq!((card.attributes["type"].as_str(), needs.bridges), ("bridge", vec!["br7".to_owned()]));
    let (card, needs) = lead("default", NetworkHere::Nowhere);
    assert_eq!(card.get_child("link").unwrap().attributes["state"], "down");
    assert!(card.get_child("source").is_none() && needs.networks.is_empty());
    // It is on the network, whatever bridge that was.
    let (card, _) = lead("virbr0", NetworkHere::Nowhere);
    assert_eq!(card.get_child("source").unwrap().attributes["network"], "default");
}

const BUSY: &str = r#"<domain type='kvm'><name>web</name><uuid>7a1b3c5d-0000-4000-8000-000000000001</uuid>
  <sysinfo type='smbios'><system><entry name='uuid'>7a1b3c5d-0000-4000-8000-000000000001</entry></system></sysinfo>
  <os><loader type='pflash'>/fw/code.fd</loader><nvram template='/fw/vars.fd'>/nvram/web.fd</nvram></os>
  <devices>
    <interface type='bridge'><mac address='52:54:00:aa:bb:cc'/><source bridge='br0'/><target dev='web-lan'/>
      <filterref filter='clean-traffic'/></interface>
    <serial type='tcp'><source mode='connect' host='10.0.0.1' service='99'/><protocol type='raw'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='/run/web.sock'/><target port='1'/></serial>
    <console type='tcp'><source mode='connect' host='10.0.0.1' service='99'/><target type='serial' port='0'/></console>
    <channel type='unix'><source mode='bind' path='/run/agent.sock'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' port='5907' autoport='no' listen='0.0.0.0'><listen type='address' address='0.0.0.0'/></graphics>
    <filesystem type='mount'><source dir='/srv'/><target dir='srv'/></filesystem>
    <hostdev mode='subsystem' type='pci'/>
  </devices></domain>"#;

#[test]
fn a_replica_for_trial_shares_nothing_with_the_vm_but_what_it_sees_of_itself() {
    let trial = Isolated {
        name: "web-drill-1".into(),
        uuid: VmId::from_bytes([9; 16]),
        network: NetworkHere::Network("apart".into()),
        dir: "/drills/1/web".into(),
    };
    let rewritten = rewrite(BUSY, &BTreeMap::new(), Place::Nobodys(&trial)).unwrap();
    let xml = &rewritten.xml;
    for gone in [
        "<name>web<",
        "7a1b3c5d",
        "/nvram/web.fd",
        "br0",
        "web-lan",
        "clean-traffic",
        "10.0.0.1",
        "/run/",
        "5907",
        "0.0.0.0",
        "/srv",
        "hostdev",
    ] {
        assert!(!xml.contains(gone), "{gone} is still in {xml}");
    }
    let uuid = trial.uuid.to_string();
    assert_eq!(xml.matches(&uuid).count(), 2, "{xml}");
    for there in ["web-drill-1", "52:54:00:aa:bb:cc", "/fw/code.fd", "/drills/1/web/nvram.fd", "guest_agent"]
    {
        assert!(xml.contains(there), "{there} is missing in {xml}");
    }
    let serial = devices_of(xml, "serial");
    assert_eq!(serial[0].get_child("source").unwrap().attributes["path"], "/drills/1/web/console.log");
    assert_eq!(
        (serial[0].attributes["type"].as_str(), serial[1].attributes["type"].as_str()),
        ("file", "null")
    );
    assert!(devices_of(xml, "console").is_empty());
    assert_eq!((rewritten.needs.networks, rewritten.needs.bridges), (vec!["apart".to_owned()], Vec::new()));
}
