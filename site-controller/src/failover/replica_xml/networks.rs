//! Where a replica's network cards lead, if not to what they were connected to at the source.
//! Promises: a card stays the card that it was, with its MAC address, model and place in the machine; only the other end of
//! its cable is another. Pure.

use super::tree::{elements_mut, remove_children};
use crate::group::spec::NetworkHere;
use std::collections::BTreeMap;
use xmltree::Element;

/// Connects each card whose network or bridge `networks` names to what it says.
pub fn lead_all(devices: &mut Element, networks: &BTreeMap<String, NetworkHere>) {
    for card in elements_mut(devices, "interface") {
        if let Some(here) = source_of(card).and_then(|from| networks.get(&from)) {
            lead(card, here);
        }
    }
}

/// What a card is connected to at the source: a libvirt network, a bridge, or the host's own card below a macvtap.
pub(super) fn source_of(card: &Element) -> Option<String> {
    let source = &card.get_child("source")?.attributes;
    // An active XML names besides the network the bridge that it resolved to.
    ["network", "bridge", "dev"].iter().find_map(|key| source.get(*key)).cloned()
}

pub(super) fn lead(card: &mut Element, here: &NetworkHere) {
    for of_the_source in ["source", "target", "virtualport", "vlan", "script", "ip", "route", "link"] {
        remove_children(card, of_the_source);
    }
    let (kind, end) = match here {
        NetworkHere::Network(name) => ("network", element("source", "network", name)),
        NetworkHere::Bridge(name) => ("bridge", element("source", "bridge", name)),
        // A tap that leads nowhere: the card has all that it had, and its cable is out.
        NetworkHere::Nowhere => ("ethernet", element("link", "state", "down")),
    };
    card.attributes.insert("type".into(), kind.into());
    card.attributes.remove("trustGuestRxFilters");
    card.children.push(xmltree::XMLNode::Element(end));
}

fn element(name: &str, attribute: &str, value: &str) -> Element {
    let mut element = Element::new(name);
    element.attributes.insert(attribute.into(), value.into());
    element
}
