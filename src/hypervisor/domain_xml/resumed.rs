//! What of a domain has to do with its being resumed from an older state: a way to an agent in the guest, network
//! interfaces whose new place switches must learn, and a generation id that tells the guest.

use super::{DomainXmlError, parse};
use crate::hypervisor::guest_agent::CHANNEL;
use xmltree::{Element, XMLNode};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resumed {
    /// The guest has a channel for an agent; whether one answers is another question.
    pub agent: bool,
    pub interfaces: bool,
    /// VMGenID, where the guest has one.
    pub genid: Option<String>,
}

impl Resumed {
    pub fn read(xml: &str) -> Result<Self, DomainXmlError> {
        let domain = parse(xml)?;
        let genid = domain.get_child("genid").and_then(Element::get_text).map(|text| text.trim().to_owned());
        let mut found = Self { genid, ..Self::default() };
        let devices = domain.get_child("devices").map(|devices| devices.children.as_slice());
        for device in devices.unwrap_or_default().iter().filter_map(XMLNode::as_element) {
            let target = device.get_child("target").and_then(|target| target.attributes.get("name"));
            found.agent |= device.name == "channel" && target.is_some_and(|name| name == CHANNEL);
            found.interfaces |= device.name == "interface";
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_resume_has_to_do_with_is_found() {
        let xml = "<domain><genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid><devices>
            <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/></channel>
            <interface type='network'/></devices></domain>";
        let genid = Some("43dc0cf8-809b-4adb-9bea-a9abb5f3d90e".to_owned());
        assert_eq!(Resumed::read(xml), Ok(Resumed { agent: true, interfaces: true, genid }));
        let other =
            "<domain><devices><channel><target name='com.redhat.spice.0'/></channel></devices></domain>";
        assert_eq!(Resumed::read(other), Ok(Resumed::default()));
        assert!(Resumed::read("<domain").is_err());
    }
}
