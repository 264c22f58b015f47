//! From what a runbook says, the cards that a replica has, and the interfaces that its guest tells of, to what is to be
//! done in it. Promises: decided once, it can be done any number of times, and the end is the same. Pure.

use crate::{
    failover::{
        outcome::Afterwards,
        replica_xml::{Card, Wiring},
    },
    group::addresses::{AddressRules, CardName, CardRule, MacWish},
};
use lifeboat::{
    address::{Address, Mac, is_link_local},
    chunk::digest::Digest,
    hypervisor::guest_agent::Interface,
    id::VmId,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr};

/// What is to be done, and what can't be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "AddressPlan")]
pub struct Plan {
    pub interfaces: Vec<OfInterface>,
    pub said: Vec<Afterwards>,
}

/// What is to become of one interface of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "AddressPlanOfInterface")]
pub struct OfInterface {
    pub name: String,
    pub mac: Option<Mac>,
    /// It may be down: it has no address yet.
    pub up: bool,
    pub add: Vec<Address>,
    pub remove: Vec<Address>,
    pub gateways: Vec<IpAddr>,
    pub dns: Vec<IpAddr>,
}

/// A replica's cards, as its point has them, and what is to become of them.
#[derive(Clone, Debug)]
pub struct Cards {
    pub rules: AddressRules,
    pub cards: Vec<Card>,
    /// There is a way to an agent in its guest.
    pub agent: bool,
    /// It goes on with its memory, and so with the MAC addresses in its devices' state.
    pub resumes: bool,
    /// From those of the point to those that its domain has here.
    pub macs: BTreeMap<Mac, Mac>,
}

impl Cards {
    /// `of` is the replica: a drill's has MAC addresses of its own.
    pub fn new(rules: AddressRules, of_point: Wiring, of: VmId, resumes: bool) -> Self {
        let Wiring { cards, agent } = of_point;
        let mut found = Self { rules, cards, agent, resumes, macs: BTreeMap::new() };
        let wish = |card: &Card| {
            let mac = match found.rule(card)?.mac {
                MacWish::Keep => return None,
                MacWish::New => new_mac(of, card.mac),
                MacWish::Is(mac) => mac,
            };
            (!resumes || (card.virtio && agent)).then_some((card.mac, mac))
        };
        found.macs = found.cards.iter().filter_map(wish).filter(|(old, new)| old != new).collect();
        found
    }

    /// What is said whatever the guest's agent does: of MAC addresses, and of rules that are about nothing here.
    pub fn without_the_guest(&self) -> Vec<Afterwards> {
        let one = |card: &Card| {
            let what = format!("MAC address of card {}", card.mac);
            if let Some(new) = self.macs.get(&card.mac) {
                return (!self.resumes).then(|| Afterwards {
                    what,
                    done: true,
                    why: Some(format!("now {new}")),
                });
            }
            let asked = match self.rule(card)?.mac {
                MacWish::Keep => false,
                MacWish::New => true,
                MacWish::Is(mac) => mac != card.mac,
            };
            let why = "the guest goes on with the one that is in the card's state; only a virtio card can be given another \
                       then, through the guest's agent";
            asked.then(|| Afterwards { what, done: false, why: Some(why.into()) })
        };
        self.cards.iter().filter_map(one).chain(self.unknown()).collect()
    }

    /// Whether the guest must do anything.
    pub fn need_the_guest(&self) -> bool {
        let asks = |rule: &CardRule| !rule.ips.is_empty() || !rule.dns.is_empty();
        let changes = self.resumes && !self.macs.is_empty();
        changes || !self.rules.subnets.is_empty() || self.rules.cards.iter().any(asks)
    }

    /// The first that names it.
    fn rule(&self, card: &Card) -> Option<&CardRule> {
        self.rules.cards.iter().find(|rule| self.names(rule, card))
    }

    fn names(&self, rule: &CardRule, card: &Card) -> bool {
        match &rule.card {
            None => self.cards.len() == 1,
            Some(CardName::Mac(mac)) => *mac == card.mac,
            Some(CardName::On(network)) => card.on.as_ref() == Some(network),
        }
    }

    /// Rules that name no card of this machine.
    fn unknown(&self) -> Vec<Afterwards> {
        let nobody_s = |rule: &&CardRule| !self.cards.iter().any(|card| self.names(rule, card));
        let told = |rule: &CardRule| {
            let why = match (&rule.card, self.cards.len()) {
                (None, count) => format!("it has {count} cards: say which one with `card`"),
                (Some(_), _) => "it has no such card".into(),
            };
            Afterwards { what: rule.to_string(), done: false, why: Some(why) }
        };
        self.rules.cards.iter().filter(nobody_s).map(told).collect()
    }

    /// `settled`: addresses that it was given here before, and which are not led on.
    pub fn plan(&self, interfaces: &[Interface], settled: &[Address]) -> Plan {
        let mut plan = Plan::default();
        for card in &self.cards {
            let Some(rule) = self.rule(card) else { continue };
            let new = self.macs.get(&card.mac).copied();
            let changes = new.filter(|_| self.resumes);
            if rule.ips.is_empty() && rule.dns.is_empty() && changes.is_none() {
                continue;
            }
            // One that boots knows of no other.
            let known = if self.resumes { (card.mac, new) } else { (new.unwrap_or(card.mac), None) };
            match choose(interfaces, known, changes.is_some()) {
                Ok(interface) => plan.interfaces.push(of_rule(interface, rule, changes)),
                Err(why) => {
                    plan.said.push(Afterwards { what: rule.to_string(), done: false, why: Some(why) })
                }
            }
        }
        for interface in interfaces.iter().filter(|of| of.name != LOOPBACK) {
            let planned = plan.interfaces.iter_mut().find(|planned| planned.name == interface.name);
            // Where a card's rule speaks of a kind of addresses, no subnet's does.
            let spoken_of = planned.as_ref().map(|planned| planned.add.clone()).unwrap_or_default();
            let led = self.led(interface, settled, &spoken_of);
            match planned {
                Some(planned) => {
                    planned.add.extend(led.add);
                    planned.remove.extend(led.remove);
                    planned.gateways.extend(led.gateways);
                    planned.dns.extend(led.dns);
                }
                None if led.add.is_empty() => {}
                None => plan.interfaces.push(led),
            }
        }
        plan
    }

    /// What rules of subnets make of it.
    fn led(&self, interface: &Interface, settled: &[Address], spoken_of: &[Address]) -> OfInterface {
        let mut led = OfInterface { name: interface.name.clone(), ..OfInterface::default() };
        let left = |address: &&Address| {
            !settled.contains(address) && !spoken_of.iter().any(|of| of.ip.is_ipv4() == address.ip.is_ipv4())
        };
        for address in interface.addresses.iter().filter(left) {
            let rule = self.rules.subnets.iter().find(|rule| rule.from.has(address.ip));
            let Some((rule, new)) = rule.and_then(|rule| Some((rule, rule.from.lead(address.ip, &rule.to)?)))
            else {
                continue;
            };
            led.add.extend(address.at(new));
            led.remove.push(*address);
            let other =
                |gateway: &IpAddr| !led.gateways.iter().any(|known| known.is_ipv4() == gateway.is_ipv4());
            led.gateways.extend(rule.gateway.filter(other));
            led.dns.extend(rule.dns.iter().filter(|dns| !led.dns.contains(dns)).collect::<Vec<_>>());
        }
        led.remove.retain(|address| !led.add.contains(address));
        led
    }
}

/// All of the kinds that the rule speaks of, but those that hold on one wire only.
fn of_rule(interface: &Interface, rule: &CardRule, mac: Option<Mac>) -> OfInterface {
    let spoken_of = |address: &&Address| rule.ips.iter().any(|ip| ip.ip.is_ipv4() == address.ip.is_ipv4());
    let old = interface.addresses.iter().filter(|address| !is_link_local(address.ip)).filter(spoken_of);
    OfInterface {
        name: interface.name.clone(),
        mac,
        up: !rule.ips.is_empty() && !interface.addresses.iter().any(|address| !is_link_local(address.ip)),
        add: rule.ips.clone(),
        remove: old.filter(|address| !rule.ips.contains(address)).copied().collect(),
        gateways: rule.gateways.clone(),
        dns: rule.dns.clone(),
    }
}

/// The guest's interface of a card. Others over it (a bridge, a VLAN) may bear its address as well: of several, the one with an
/// address of the guest's is meant, unless it is the card itself that is to be changed.
fn choose(
    interfaces: &[Interface],
    (old, new): (Mac, Option<Mac>),
    itself: bool,
) -> Result<&Interface, String> {
    let has =
        |of: &&Interface| of.name != LOOPBACK && of.mac.is_some_and(|mac| mac == old || Some(mac) == new);
    let all: Vec<&Interface> = interfaces.iter().filter(has).collect();
    let used = |of: &&&Interface| of.addresses.iter().any(|address| !is_link_local(address.ip));
    let in_use: Vec<&Interface> = all.iter().filter(used).copied().collect();
    match (all.as_slice(), in_use.as_slice()) {
        ([], _) => Err(format!("the guest's agent tells of no interface of card {old}")),
        ([only], _) => Ok(only),
        (_, [only]) if !itself => Ok(only),
        (several, _) => {
            let names: Vec<&str> = several.iter().map(|of| of.name.as_str()).collect();
            Err(format!(
                "several interfaces of the guest bear the address of card {old}: {}",
                names.join(", ")
            ))
        }
    }
}

/// The same each time that it is asked for.
fn new_mac(of: VmId, old: Mac) -> Mac {
    let digest = Digest::of_parts(&[b"lifeboat: a card's address", of.as_bytes(), old.as_bytes()]);
    let [a, b, c, ..] = *digest.as_bytes();
    Mac::made_up([a, b, c])
}

const LOOPBACK: &str = "lo";
