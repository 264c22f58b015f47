//! From the source's domain XML to the replica's: the same machine, on this site's disks.
//! Promises: UUID, name, device addresses and aliases stay, because the memory image depends on them, and MAC addresses
//! unless others are asked for; whatever points at the source host (disk paths, run-time labels, allocated ports) is
//! replaced or taken out. What it makes bears no label of a failover unless it is given one.
//! Pure. Called by `runbook`, which also checks what [`Rewritten::needs`] lists.

mod cards;
mod console;
mod files;
mod isolated;
mod networks;
pub(super) mod tree;

pub use cards::{Card, Wiring, wiring, with_macs};
pub use console::console;
pub use files::files;
pub use isolated::Isolated;

use super::{
    huge_pages::{self, HugePages},
    qemu_version::SavedBy,
};
use crate::group::spec::NetworkHere;
use lifeboat::{
    hypervisor::{domain_xml::label, libvirt::Machine},
    units::Generation,
};
use std::{collections::BTreeMap, path::PathBuf};
use tree::{elements, remove_children};
use xmltree::{Element, EmitterConfig, XMLNode};

/// Longest XML that is read: libvirt itself refuses far earlier.
const XML_MAX: usize = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    #[error("the point's domain XML can't be read: {0}")]
    Malformed(String),
    #[error("disk `{0}` of the domain XML is not in the point, so that the replica would lack it")]
    DiskMissing(String),
}

/// A replica's XML, and what must be there for it to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewritten {
    pub xml: String,
    pub needs: Needs,
}

/// What the replica expects of this site, besides its disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Files named by path: kernels, firmware, read-only disks.
    pub files: Vec<PathBuf>,
    /// libvirt networks.
    pub networks: Vec<String>,
    /// Host bridges.
    pub bridges: Vec<String>,
    /// What its memory is made of, where it is not ordinary.
    pub huge_pages: Vec<HugePages>,
    /// Bytes of ordinary memory.
    pub memory: u64,
    pub vcpus: u32,
    pub machine: Machine,
    /// As it was at the source: its guest may have to have other addresses here.
    pub wiring: Wiring,
    /// Whose memory and devices it goes on from. The XML does not tell; [`SavedBy::of`] does.
    pub saved_by: SavedBy,
}

impl Needs {
    /// Of a replica that is not started.
    pub fn idle(self) -> Self {
        Self { memory: 0, vcpus: 0, saved_by: SavedBy::Nobody, ..self }
    }
}

/// Whose place a replica takes.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// The VM's own. Networks and bridges of the source may lead elsewhere here.
    Its(&'a BTreeMap<String, NetworkHere>),
    /// Nobody's: it is for trial.
    Nobodys(&'a Isolated),
}

/// Rewrites `xml` so that each writable disk is the raw file that `disks` names for its target.
pub fn rewrite(
    xml: &str,
    disks: &BTreeMap<String, PathBuf>,
    place: Place<'_>,
) -> Result<Rewritten, XmlError> {
    if xml.len() > XML_MAX {
        return Err(XmlError::Malformed("longer than any domain's".into()));
    }
    let mut domain =
        Element::parse(xml.as_bytes()).map_err(|error| XmlError::Malformed(error.to_string()))?;
    if domain.name != "domain" {
        return Err(XmlError::Malformed(format!("its root is <{}>, not <domain>", domain.name)));
    }
    domain.attributes.remove("id");
    let wiring = cards::of(&domain);
    match place {
        Place::Its(networks) => {
            let devices = domain.get_mut_child("devices");
            devices.into_iter().for_each(|devices| networks::lead_all(devices, networks));
        }
        Place::Nobodys(isolated) => isolated.isolate(&mut domain),
    }
    let (huge_pages, machine) = (huge_pages::asked(&domain), machine_of(&domain));
    let mut needs = Needs { huge_pages, machine, wiring, ..Needs::default() };
    if needs.huge_pages.is_empty() {
        needs.memory = huge_pages::memory_bytes(&domain);
    }
    let vcpus = domain.get_child("vcpu").and_then(Element::get_text);
    needs.vcpus = vcpus.and_then(|count| count.trim().parse().ok()).unwrap_or(1);
    drop_runtime_labels(&mut domain);
    label::take_off(&mut domain);
    if let Some(os) = domain.get_child("os") {
        needs.files.extend(["kernel", "initrd", "dtb", "loader"].iter().filter_map(|name| text_of(os, name)));
    }
    if let Some(devices) = domain.get_mut_child("devices") {
        for child in devices.children.iter_mut().filter_map(XMLNode::as_mut_element) {
            match child.name.as_str() {
                "disk" => rewrite_disk(child, disks, &mut needs)?,
                "interface" => rewrite_interface(child, &mut needs),
                "graphics" => rewrite_graphics(child),
                "serial" | "console" | "parallel" | "channel" => rewrite_character_device(child),
                _ => {}
            }
        }
    }
    Ok(Rewritten { xml: written(&domain)?, needs })
}

/// The same, of the failover that brings it up: by this an agent that was fenced on this host before knows that the replica is
/// not the copy it was fenced for.
pub fn labelled(xml: &str, generation: Generation) -> Result<String, XmlError> {
    let mut domain =
        Element::parse(xml.as_bytes()).map_err(|error| XmlError::Malformed(error.to_string()))?;
    label::put_on(&mut domain, generation);
    written(&domain)
}

fn written(domain: &Element) -> Result<String, XmlError> {
    let mut out = Vec::new();
    domain
        .write_with_config(&mut out, EmitterConfig::new().write_document_declaration(false))
        .map_err(|error| XmlError::Malformed(error.to_string()))?;
    String::from_utf8(out).map_err(|error| XmlError::Malformed(error.to_string()))
}

/// Targets of the disks that a point must hold, in the XML's order: all that the guest can write to.
pub fn writable_disks(xml: &str) -> Result<Vec<String>, XmlError> {
    let domain = Element::parse(xml.as_bytes()).map_err(|error| XmlError::Malformed(error.to_string()))?;
    let devices = domain.get_child("devices");
    let disks = devices.iter().flat_map(|devices| elements(devices, "disk"));
    Ok(disks.filter(|disk| is_writable(disk)).filter_map(target_of).collect())
}

/// A processor that the guest sees the host's of is told as it stands; an emulated one is any host's.
fn machine_of(domain: &Element) -> Machine {
    let os = domain.get_child("os").and_then(|os| os.get_child("type"));
    let attribute = |name: &str| os.and_then(|os| os.attributes.get(name)).cloned();
    let virt_type = domain.attributes.get("type").cloned();
    let devices = domain.get_child("devices");
    let emulator = devices.and_then(|devices| text_of(devices, "emulator"));
    let named = |cpu: &&Element| {
        let given = |name: &str, value: &str| cpu.attributes.get(name).is_some_and(|found| found == value);
        cpu.get_child("model").is_some() && !given("check", "none") && !given("mode", "host-passthrough")
    };
    let cpu = domain.get_child("cpu").filter(|_| virt_type.as_deref() == Some("kvm")).filter(named);
    let cpu = cpu.and_then(|cpu| {
        let mut text = Vec::new();
        cpu.write_with_config(&mut text, EmitterConfig::new().write_document_declaration(false)).ok()?;
        String::from_utf8(text).ok()
    });
    let emulator = emulator.map(|path| path.to_string_lossy().into_owned());
    Machine { emulator, arch: attribute("arch"), machine: attribute("machine"), virt_type, cpu }
}

fn rewrite_disk(
    disk: &mut Element,
    files: &BTreeMap<String, PathBuf>,
    needs: &mut Needs,
) -> Result<(), XmlError> {
    let target = target_of(disk).unwrap_or_default();
    for stale in ["backingStore", "mirror", "encryption", "auth"] {
        remove_children(disk, stale);
    }
    if !is_writable(disk) {
        let removable = matches!(disk.attributes.get("device").map(String::as_str), Some("cdrom" | "floppy"));
        let file =
            disk.get_child("source").and_then(|source| source.attributes.get("file")).map(PathBuf::from);
        if removable {
            // A medium that the guest had in its drive at the source; the drive stays, empty.
            remove_children(disk, "source");
            disk.attributes.insert("type".into(), "file".into());
        } else {
            needs.files.extend(file);
        }
        return Ok(());
    }
    let file = files.get(&target).ok_or_else(|| XmlError::DiskMissing(target.clone()))?;
    disk.attributes.insert("type".into(), "file".into());
    disk.attributes.remove("snapshot");
    match disk.get_mut_child("driver") {
        Some(driver) => {
            driver.attributes.insert("type".into(), "raw".into());
        }
        None => {
            let mut driver = Element::new("driver");
            driver.attributes.insert("name".into(), "qemu".into());
            driver.attributes.insert("type".into(), "raw".into());
            disk.children.insert(0, XMLNode::Element(driver));
        }
    }
    let mut source = Element::new("source");
    source.attributes.insert("file".into(), file.to_string_lossy().into_owned());
    match disk.get_mut_child("source") {
        Some(old) => *old = source,
        None => disk.children.push(XMLNode::Element(source)),
    }
    Ok(())
}

fn rewrite_interface(interface: &mut Element, needs: &mut Needs) {
    // A tap device's generated name belongs to the source host; one that the operator chose stays.
    let generated = |element: &Element| {
        let name = element.attributes.get("dev").map(String::as_str).unwrap_or_default();
        ["vnet", "macvtap"].iter().any(|prefix| name.starts_with(prefix))
    };
    interface.children.retain(|child| {
        !child.as_element().is_some_and(|element| element.name == "target" && generated(element))
    });
    let Some(source) = interface.get_mut_child("source") else { return };
    for runtime in ["portid", "portgroup-id"] {
        source.attributes.remove(runtime);
    }
    if let Some(network) = source.attributes.get("network").cloned() {
        // An active XML names the bridge that the network resolved to at the source.
        source.attributes.remove("bridge");
        needs.networks.push(network);
    } else if let Some(bridge) = source.attributes.get("bridge").cloned() {
        needs.bridges.push(bridge);
    }
}

fn rewrite_graphics(graphics: &mut Element) {
    if graphics.attributes.get("autoport").map(String::as_str) == Some("yes") {
        for port in ["port", "tlsPort", "websocket"] {
            graphics.attributes.remove(port);
        }
    }
}

fn rewrite_character_device(device: &mut Element) {
    match device.attributes.get("type").map(String::as_str) {
        Some("pty") => {
            device.attributes.remove("tty");
            remove_children(device, "source");
        }
        Some("unix") => {
            let generated = |source: &Element| {
                source.attributes.get("path").is_some_and(|path| {
                    path.contains("/channel/target/") || path.starts_with("/run/libvirt/qemu/channel/")
                })
            };
            device.children.retain(|child| {
                !child.as_element().is_some_and(|element| element.name == "source" && generated(element))
            });
        }
        _ => {}
    }
}

/// Labels that libvirt made up for the running domain; those the operator fixed are kept.
fn drop_runtime_labels(domain: &mut Element) {
    domain.children.retain(|child| {
        !child.as_element().is_some_and(|element| {
            element.name == "seclabel"
                && element.attributes.get("type").map(String::as_str) == Some("dynamic")
        })
    });
}

fn is_writable(disk: &Element) -> bool {
    let device = disk.attributes.get("device").map_or("disk", String::as_str);
    matches!(device, "disk" | "lun") && disk.get_child("readonly").is_none()
}

fn target_of(disk: &Element) -> Option<String> {
    disk.get_child("target")?.attributes.get("dev").cloned()
}

fn text_of(parent: &Element, name: &str) -> Option<PathBuf> {
    let text = parent.get_child(name)?.get_text()?;
    let text = text.trim();
    text.starts_with('/').then(|| PathBuf::from(text))
}

#[cfg(test)]
mod tests;
