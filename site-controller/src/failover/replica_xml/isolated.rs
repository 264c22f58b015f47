//! A replica for trial: the same machine under another name and UUID, that can't be mistaken for the VM, nor reach what the
//! VM reaches. Promises: nothing that it writes to (disks, firmware variables, consoles) and nothing that it listens on is
//! anybody else's. Pure.

use super::{
    networks,
    tree::{elements_mut, remove_children},
};
use crate::group::spec::NetworkHere;
use lifeboat::id::VmId;
use std::path::PathBuf;
use xmltree::{Element, XMLNode};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Isolated {
    pub name: String,
    pub uuid: VmId,
    /// Where all its network cards lead.
    pub network: NetworkHere,
    /// Its own: what it writes besides disks lies here.
    pub dir: PathBuf,
}

/// Where the first serial port of one goes, within its folder.
pub const CONSOLE: &str = "console.log";

impl Isolated {
    pub fn console(&self) -> PathBuf {
        self.dir.join(CONSOLE)
    }

    pub(super) fn isolate(&self, domain: &mut Element) {
        set_text(domain, "name", &self.name);
        set_text(domain, "uuid", &self.uuid.to_string());
        self.rename_in_sysinfo(domain);
        if let Some(variables) = domain.get_mut_child("os").and_then(|os| os.get_mut_child("nvram")) {
            remove_children(variables, "source");
            variables.attributes.remove("type");
            variables.children.retain(|child| child.as_element().is_some());
            variables.children.push(XMLNode::Text(self.dir.join("nvram.fd").to_string_lossy().into_owned()));
        }
        if let Some(devices) = domain.get_mut_child("devices") {
            // Of a guest with memory there are none of these; one that boots does without.
            ["hostdev", "filesystem", "shmem"].iter().for_each(|name| remove_children(devices, name));
            for card in elements_mut(devices, "interface") {
                remove_children(card, "filterref");
                networks::lead(card, &self.network);
            }
            self.consoles(devices);
            elements_mut(devices, "graphics").for_each(listen_anew);
            for socket in elements_mut(devices, "vsock").filter_map(|vsock| vsock.get_mut_child("cid")) {
                socket.attributes.insert("auto".into(), "yes".into());
                socket.attributes.remove("address");
            }
        }
    }

    /// libvirt wants the UUID to be the same in both places.
    fn rename_in_sysinfo(&self, domain: &mut Element) {
        for info in elements_mut(domain, "sysinfo") {
            let Some(system) = info.get_mut_child("system") else { continue };
            for entry in elements_mut(system, "entry") {
                if entry.attributes.get("name").map(String::as_str) == Some("uuid") {
                    entry.children = vec![XMLNode::Text(self.uuid.to_string())];
                }
            }
        }
    }

    /// The first serial port writes a file, which is evidence; whatever else led out of the machine leads nowhere.
    fn consoles(&self, devices: &mut Element) {
        let mut first = true;
        for port in elements_mut(devices, "serial") {
            if std::mem::take(&mut first) {
                let mut source = Element::new("source");
                source.attributes.insert("path".into(), self.console().to_string_lossy().into_owned());
                end_at(port, "file", Some(source));
            } else {
                end_at(port, "null", None);
            }
        }
        if !first {
            // libvirt's other name for the first serial port; it gives it one anew.
            devices.children.retain(|child| {
                let target = child.as_element().filter(|element| element.name == "console");
                let target = target.and_then(|console| console.get_child("target"));
                let kind =
                    target.map(|target| target.attributes.get("type").map_or("serial", String::as_str));
                kind != Some("serial")
            });
        }
        for name in ["parallel", "console"] {
            elements_mut(devices, name).for_each(|device| end_at(device, "null", None));
        }
        for channel in elements_mut(devices, "channel") {
            match channel.attributes.get("type").map(String::as_str) {
                // libvirt makes a path up.
                Some("unix" | "pty") => remove_children(channel, "source"),
                Some("spicevmc" | "spiceport" | "qemu-vdagent" | "dbus") => {}
                _ => end_at(channel, "null", None),
            }
        }
    }
}

fn end_at(device: &mut Element, kind: &str, source: Option<Element>) {
    for of_the_source in ["source", "protocol", "log"] {
        remove_children(device, of_the_source);
    }
    device.attributes.remove("tty");
    device.attributes.insert("type".into(), kind.into());
    device.children.extend(source.map(XMLNode::Element));
}

/// On a port of its own, and of this host only.
fn listen_anew(graphics: &mut Element) {
    remove_children(graphics, "listen");
    for place in ["port", "tlsPort", "websocket", "listen", "socket"] {
        graphics.attributes.remove(place);
    }
    if matches!(graphics.attributes.get("type").map(String::as_str), Some("vnc" | "spice")) {
        graphics.attributes.insert("autoport".into(), "yes".into());
    }
}

fn set_text(parent: &mut Element, name: &str, text: &str) {
    let mut child = Element::new(name);
    child.children.push(XMLNode::Text(text.into()));
    match parent.get_mut_child(name) {
        Some(old) => *old = child,
        None => parent.children.insert(0, XMLNode::Element(child)),
    }
}
