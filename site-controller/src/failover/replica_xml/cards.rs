//! The network cards of a domain, and other MAC addresses for them.
//! Promises: of a card nothing is changed but its MAC address. Pure.

use super::{
    XML_MAX, XmlError, networks,
    tree::{elements, elements_mut},
    written,
};
use lifeboat::{address::Mac, hypervisor::guest_agent::CHANNEL};
use std::collections::BTreeMap;
use xmltree::Element;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    pub mac: Mac,
    /// The network or bridge that it is on.
    pub on: Option<String>,
    /// What the guest says of its MAC address counts, also while it runs.
    pub virtio: bool,
}

/// What of a domain has to do with its addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wiring {
    /// In the domain's order.
    pub cards: Vec<Card>,
    /// There is a channel for an agent in the guest; whether one answers is another question.
    pub agent: bool,
}

pub fn wiring(xml: &str) -> Result<Wiring, XmlError> {
    Ok(of(&parse(xml)?))
}

pub(super) fn of(domain: &Element) -> Wiring {
    let Some(devices) = domain.get_child("devices") else { return Wiring::default() };
    let agent = elements(devices, "channel").any(|channel| {
        let target = channel.get_child("target").and_then(|target| target.attributes.get("name"));
        target.is_some_and(|name| name == CHANNEL)
    });
    Wiring { cards: elements(devices, "interface").filter_map(card).collect(), agent }
}

/// The same domain, with the cards that `macs` names given the addresses that it says.
pub fn with_macs(xml: &str, macs: &BTreeMap<Mac, Mac>) -> Result<String, XmlError> {
    let mut domain = parse(xml)?;
    if let Some(devices) = domain.get_mut_child("devices") {
        for interface in elements_mut(devices, "interface") {
            let new = mac_of(interface).and_then(|mac| macs.get(&mac));
            if let (Some(new), Some(mac)) = (new, interface.get_mut_child("mac")) {
                mac.attributes.insert("address".into(), new.to_string());
            }
        }
    }
    written(&domain)
}

fn card(interface: &Element) -> Option<Card> {
    let model = interface.get_child("model").and_then(|model| model.attributes.get("type"));
    Some(Card {
        mac: mac_of(interface)?,
        on: networks::source_of(interface),
        virtio: model.is_some_and(|model| model.starts_with("virtio")),
    })
}

fn mac_of(interface: &Element) -> Option<Mac> {
    interface.get_child("mac")?.attributes.get("address")?.parse().ok()
}

fn parse(xml: &str) -> Result<Element, XmlError> {
    if xml.len() > XML_MAX {
        return Err(XmlError::Malformed("longer than any domain's".into()));
    }
    Element::parse(xml.as_bytes()).map_err(|error| XmlError::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "<domain><devices>\
        <interface type='network'><mac address='52:54:00:AA:00:01'/><source network='lan' bridge='virbr0'/><model type='virtio'/></interface>\
        <interface type='bridge'><mac address='52:54:00:aa:00:02'/><source bridge='br7'/><model type='e1000'/></interface>\
        <interface type='user'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
        </devices></domain>";

    #[test]
    fn cards_are_found_with_what_they_are_on_and_only_the_one_that_is_named_is_changed() {
        let mac = |last: u8| Mac::made_up([0xaa, 0, last]);
        let lan = Card { mac: mac(1), on: Some("lan".into()), virtio: true };
        let other = Card { mac: mac(2), on: Some("br7".into()), virtio: false };
        let before = wiring(TWO).unwrap();
        assert_eq!(before, Wiring { cards: vec![lan.clone(), other.clone()], agent: true });
        let changed = with_macs(TWO, &[(mac(2), mac(9)), (mac(7), mac(8))].into()).unwrap();
        assert_eq!(wiring(&changed).unwrap().cards, [lan, Card { mac: mac(9), ..other }]);
        assert_eq!(wiring(&with_macs(TWO, &BTreeMap::new()).unwrap()), Ok(before));
        assert!(wiring("<domain").is_err() && with_macs("", &BTreeMap::new()).is_err());
        assert_eq!(wiring("<domain/>"), Ok(Wiring::default()));
    }
}
