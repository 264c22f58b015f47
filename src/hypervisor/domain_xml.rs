//! What a running domain is made of, read from its XML, and what of it can't be protected; the [`label`] of a replica,
//! and what a host's [`capabilities`] name.
//! Promises: pure; every reason is a sentence for an operator, with what to do. Called by the agent's capture.

pub mod capabilities;
pub mod label;
pub mod resumed;
mod rules;
#[cfg(test)]
mod tests;

use crate::id::VmId;
use std::path::Path;
use xmltree::{Element, XMLNode};

/// Bytes of XML at the most: far above any domain's.
const XML_MAX: usize = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainType {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's emulation (TCG).
    Qemu,
}

/// A domain, as far as protection is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSpec {
    pub name: String,
    pub uuid: VmId,
    pub memory_bytes: u64,
    pub domain_type: DomainType,
    /// Its memory is made of huge pages (hugetlb).
    pub huge_pages: bool,
    pub disks: Vec<DiskSpec>,
    /// Why its memory can't be captured; empty if it can.
    pub memory_obstacles: Vec<String>,
    /// Why its disks can't be captured; empty if they can.
    pub disk_obstacles: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskDevice {
    Disk,
    Cdrom,
    Floppy,
    /// A SCSI device passed through as it is.
    Lun,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Name that the guest's bus gives it (`vda`), unique in the domain.
    pub target: String,
    /// libvirt's name of the device, by which QEMU's block devices are told; absent while the domain is off.
    pub alias: Option<String>,
    pub device: DiskDevice,
    pub read_only: bool,
    pub shareable: bool,
    pub transient: bool,
    /// `raw`, `qcow2` …
    pub driver_format: String,
    /// Where its bytes are, for people.
    pub source: String,
    /// What its file holds is not what the guest sees: it is encrypted, or the disk is a part of it.
    pub translated: bool,
}

impl DiskSpec {
    /// The file or block device of this host that holds it, and its format; or why there is none that can be read without
    /// the guest's QEMU.
    pub fn image_file(&self) -> Result<(&Path, &str), String> {
        let Self { target, source, driver_format, .. } = self;
        let path = Path::new(source);
        if !path.is_absolute() {
            return Err(format!("disk {target} ({source}) is no file or block device of this host"));
        }
        if self.translated {
            return Err(format!("disk {target} ({source}) is encrypted, or a part of its file"));
        }
        match driver_format.as_str() {
            "raw" | "qcow2" => Ok((path, driver_format)),
            other => Err(format!("disk {target} ({source}) is of format {other}; raw and qcow2 are read")),
        }
    }

    /// Whether its contents belong to a recovery point. Media (cdrom, floppy) and read-only disks are referred to only.
    pub fn is_replicated(&self) -> bool {
        self.device == DiskDevice::Disk && !self.read_only
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the domain's XML can't be used: {0}")]
pub struct DomainXmlError(String);

fn parse(xml: &str) -> Result<Element, DomainXmlError> {
    if xml.len() > XML_MAX {
        return Err(DomainXmlError("it is larger than any domain's".into()));
    }
    let root = Element::parse(xml.as_bytes()).map_err(|error| DomainXmlError(error.to_string()))?;
    if root.name != "domain" {
        return Err(DomainXmlError(format!("it describes a {}, not a domain", root.name)));
    }
    Ok(root)
}

impl DomainSpec {
    /// Reads the XML that libvirt gave.
    pub fn read(xml: &str) -> Result<Self, DomainXmlError> {
        let root = parse(xml)?;
        let missing = |what: &str| DomainXmlError(format!("it has no {what}"));
        let domain_type = match attribute(&root, "type") {
            "kvm" => DomainType::Kvm,
            "qemu" => DomainType::Qemu,
            other => {
                return Err(DomainXmlError(format!(
                    "its type is `{other}`; only kvm and qemu are known here"
                )));
            }
        };
        let memory = root.get_child("memory").ok_or_else(|| missing("memory"))?;
        let spec = Self {
            name: child_text(&root, "name").ok_or_else(|| missing("name"))?,
            uuid: child_text(&root, "uuid")
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| missing("UUID"))?,
            memory_bytes: memory_bytes(memory).ok_or_else(|| missing("readable memory size"))?,
            domain_type,
            huge_pages: root
                .get_child("memoryBacking")
                .is_some_and(|backing| backing.get_child("hugepages").is_some()),
            disks: devices(&root).filter(|device| device.name == "disk").filter_map(read_disk).collect(),
            memory_obstacles: rules::memory_obstacles(&root),
            disk_obstacles: rules::disk_obstacles(&root),
        };
        Ok(spec)
    }

    /// The disks that belong to a recovery point.
    pub fn replicated_disks(&self) -> impl Iterator<Item = &DiskSpec> {
        self.disks.iter().filter(|disk| disk.is_replicated())
    }
}

fn read_disk(disk: &Element) -> Option<DiskSpec> {
    let has = |name: &str| disk.get_child(name).is_some();
    let device = match attribute(disk, "device") {
        "cdrom" => DiskDevice::Cdrom,
        "floppy" => DiskDevice::Floppy,
        "lun" => DiskDevice::Lun,
        _ => DiskDevice::Disk,
    };
    Some(DiskSpec {
        target: disk.get_child("target")?.attributes.get("dev")?.clone(),
        alias: disk.get_child("alias").and_then(|alias| alias.attributes.get("name")).cloned(),
        device,
        read_only: has("readonly"),
        shareable: has("shareable"),
        transient: has("transient"),
        driver_format: disk.get_child("driver").map_or("raw", |driver| attribute(driver, "type")).to_owned(),
        source: describe_source(disk),
        translated: has("encryption")
            || disk.get_child("source").is_some_and(|source| {
                ["encryption", "slices"].iter().any(|name| source.get_child(*name).is_some())
            }),
    })
}

fn describe_source(disk: &Element) -> String {
    let Some(source) = disk.get_child("source") else { return "no medium".into() };
    let first = ["file", "dev", "dir", "volume", "name", "path"]
        .iter()
        .find_map(|key| source.attributes.get(*key))
        .map_or("", String::as_str);
    match source.attributes.get("protocol") {
        Some(protocol) => format!("{protocol}:{first}"),
        None => first.to_owned(),
    }
}

fn memory_bytes(memory: &Element) -> Option<u64> {
    let number: u64 = memory.get_text()?.trim().parse().ok()?;
    let unit = match attribute(memory, "unit") {
        "b" | "bytes" => 1,
        "" | "KiB" | "k" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit)
}

fn devices(root: &Element) -> impl Iterator<Item = &Element> {
    root.get_child("devices").into_iter().flat_map(elements)
}

fn elements(parent: &Element) -> impl Iterator<Item = &Element> {
    parent.children.iter().filter_map(XMLNode::as_element)
}

fn attribute<'a>(element: &'a Element, name: &str) -> &'a str {
    element.attributes.get(name).map_or("", String::as_str)
}

fn child_text(element: &Element, name: &str) -> Option<String> {
    Some(element.get_child(name)?.get_text()?.trim().to_owned())
}
