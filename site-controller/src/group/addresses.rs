//! What a runbook says of its members' addresses: of one card, and of all addresses in a subnet; in failovers, drills, or both.
//! Promises: what [`GroupSpec::check`] has let pass is made of addresses that a guest can have, which are typed from here on;
//! no two members are given the same one. Pure.

use super::{
    address_spec::{CardSpec, Occasion, SubnetSpec, When},
    spec::{GroupSpec, SpecError},
};
use lifeboat::address::{Address, Mac, NoAddress, Subnet, is_link_local};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, net::IpAddr, time::Duration};

/// What holds for one member on one occasion; of several rules for one card the first counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AddressRules {
    pub cards: Vec<CardRule>,
    pub subnets: Vec<SubnetRule>,
    /// For how long the agent of a guest that boots is waited for.
    pub up_within_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CardRule {
    /// `None`: the only one.
    pub card: Option<CardName>,
    pub site: Option<String>,
    pub ips: Vec<Address>,
    pub gateways: Vec<IpAddr>,
    pub dns: Vec<IpAddr>,
    pub mac: MacWish,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CardName {
    Mac(Mac),
    /// The network or bridge that it is on at the source.
    On(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MacWish {
    Keep,
    New,
    Is(Mac),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubnetRule {
    pub from: Subnet,
    pub to: Subnet,
    pub gateway: Option<IpAddr>,
    pub dns: Vec<IpAddr>,
}

impl AddressRules {
    pub fn is_empty(&self) -> bool {
        self.cards.is_empty() && self.subnets.is_empty()
    }

    /// Those that hold at the site of this name.
    pub fn at(&self, site: &str) -> Self {
        let holds = |rule: &&CardRule| rule.site.as_ref().is_none_or(|named| named == site);
        Self { cards: self.cards.iter().filter(holds).cloned().collect(), ..self.clone() }
    }

    pub fn up_within(&self) -> Duration {
        Duration::from_secs(self.up_within_s)
    }

    /// A line for each.
    pub fn words(&self) -> Vec<String> {
        let cards = self.cards.iter().map(ToString::to_string);
        cards.chain(self.subnets.iter().map(ToString::to_string)).collect()
    }
}

impl GroupSpec {
    /// What the runbook says of a member's addresses on an occasion.
    pub fn addresses(&self, vm: &str, occasion: Occasion) -> Result<AddressRules, SpecError> {
        let none = super::spec::VmSteps::default();
        let steps = self.runbook.vm.get(vm).unwrap_or(&none);
        let mut cards = Vec::new();
        for (at, spec) in steps.address.iter().enumerate().filter(|(_, spec)| spec.when.serves(occasion)) {
            let rule = self.card_rule(&card_key(vm, at), spec)?;
            cards.push(((spec.when, spec.site.is_none(), spec.card.is_none()), rule));
        }
        let mut subnets = Vec::new();
        let own = |spec: &SubnetSpec| spec.vms.is_empty() || spec.vms.iter().any(|named| named == vm);
        let serves = |(_, spec): &(usize, &SubnetSpec)| spec.when.serves(occasion) && own(spec);
        for (at, spec) in self.runbook.subnet.iter().enumerate().filter(serves) {
            subnets.push((spec.when, self.subnet_rule(at, spec)?));
        }
        // The sharper rule first, and otherwise as written.
        cards.sort_by_key(|(sharp, _)| *sharp);
        subnets.sort_by_key(|(sharp, _)| *sharp);
        Ok(AddressRules {
            cards: cards.into_iter().map(|(_, rule)| rule).collect(),
            subnets: subnets.into_iter().map(|(_, rule)| rule).collect(),
            up_within_s: self.waits(vm)?.1.as_secs(),
        })
    }

    pub(super) fn check_addresses(&self) -> Result<(), SpecError> {
        for (vm, steps) in &self.runbook.vm {
            if steps.address.len() > RULES_MAX {
                let given = steps.address.len().to_string();
                return Err(self.wrong(&format!("runbook.vm.{vm}.address"), &given, "write 64 at the most"));
            }
            for (at, spec) in steps.address.iter().enumerate() {
                self.card_rule(&card_key(vm, at), spec)?;
                let same = |other: &CardSpec| {
                    (&other.card, &other.site, other.when) == (&spec.card, &spec.site, spec.when)
                };
                if steps.address[..at].iter().any(same) {
                    let given = spec.card.as_deref().unwrap_or("the only card");
                    return Err(self.wrong(
                        &card_key(vm, at),
                        given,
                        "write one for each card, site and `when`",
                    ));
                }
            }
        }
        self.check_subnets()?;
        self.check_nobody_twice()?;
        self.check_drills_apart()
    }

    fn check_subnets(&self) -> Result<(), SpecError> {
        let all = &self.runbook.subnet;
        if all.len() > RULES_MAX {
            return Err(self.wrong("runbook.subnet", &all.len().to_string(), "write 64 at the most"));
        }
        let mut read = Vec::<(&SubnetSpec, SubnetRule)>::new();
        for (at, spec) in all.iter().enumerate() {
            let rule = self.subnet_rule(at, spec)?;
            if let Some(stranger) = spec.vms.iter().find(|vm| !self.vms.contains(vm)) {
                let key = format!("runbook.subnet[{at}].vms");
                return Err(self.wrong(&key, stranger, "name it as it stands in `vms`"));
            }
            let of_one = |other: &SubnetSpec| {
                other.vms.is_empty()
                    || spec.vms.is_empty()
                    || other.vms.iter().any(|vm| spec.vms.contains(vm))
            };
            let meets = |(known, other): &(&SubnetSpec, SubnetRule)| {
                known.when == spec.when && other.from.meets(&rule.from) && of_one(known)
            };
            if let Some((_, other)) = read.iter().find(|other| meets(other)) {
                let why =
                    format!("it and {} have addresses in common: only one can say where they go", other.from);
                return Err(self.wrong(&format!("runbook.subnet[{at}].from"), &spec.from, &why));
            }
            read.push((spec, rule));
        }
        Ok(())
    }

    /// Two cards with one address are no use to either.
    fn check_nobody_twice(&self) -> Result<(), SpecError> {
        for occasion in [Occasion::Failover, Occasion::Drill] {
            let mut given = BTreeMap::<String, Vec<(&str, Option<String>)>>::new();
            for vm in self.runbook.vm.keys() {
                for rule in self.addresses(vm, occasion)?.cards {
                    let mac = match rule.mac {
                        MacWish::Is(mac) => Some(mac.to_string()),
                        MacWish::Keep | MacWish::New => None,
                    };
                    for address in rule.ips.iter().map(|address| address.ip.to_string()).chain(mac) {
                        let before = given.entry(address.clone()).or_default();
                        let at_one_site = |(other, site): &&(&str, Option<String>)| {
                            let other_site = site.is_some() && rule.site.is_some() && *site != rule.site;
                            // Of one member, rules of several sharpness may say the same.
                            *other != vm && !other_site
                        };
                        if let Some((other, _)) = before.iter().find(at_one_site) {
                            let why = format!("{other} has it as well");
                            return Err(self.wrong(&format!("runbook.vm.{vm}.address"), &address, &why));
                        }
                        before.push((vm.as_str(), rule.site.clone()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Where drills and failovers share a network, a drill must not take the address that a failover has, or will have.
    fn check_drills_apart(&self) -> Result<(), SpecError> {
        let Some(network) = &self.runbook.drill_network else { return Ok(()) };
        if !self.runbook.networks.values().any(|to| *to == format!("network:{network}")) {
            return Ok(());
        }
        let cards = self.runbook.vm.iter().flat_map(|(vm, steps)| {
            let always = steps.address.iter().enumerate().filter(|(_, spec)| spec.when == When::Always);
            let fixed = always.filter(|(_, spec)| {
                !spec.ip.is_empty()
                    || spec.mac.as_ref().is_some_and(|mac| !["keep", "new"].contains(&mac.as_str()))
            });
            fixed.map(move |(at, _)| card_key(vm, at))
        });
        let subnets = self.runbook.subnet.iter().enumerate().filter(|(_, spec)| spec.when == When::Always);
        let mut shared = cards.chain(subnets.map(|(at, _)| format!("runbook.subnet[{at}]")));
        match shared.next() {
            None => Ok(()),
            Some(key) => {
                let why = "drills are on the network of failovers, where the address would be there twice: write one with \
                           `when = \"failover\"`, and another with `when = \"drill\"`";
                Err(self.wrong(&format!("{key}.when"), "always", why))
            }
        }
    }

    fn card_rule(&self, key: &str, spec: &CardSpec) -> Result<CardRule, SpecError> {
        let wrong = |of: &str, given: &str, why: &str| self.wrong(&format!("{key}.{of}"), given, why);
        let card = match spec.card.as_deref() {
            None => None,
            Some("") => {
                return Err(wrong("card", "", "write a MAC address, or a network or bridge of the source"));
            }
            Some(given) => Some(given.parse().map_or_else(|_| CardName::On(given.to_owned()), CardName::Mac)),
        };
        let mac = match spec.mac.as_deref() {
            None | Some("keep") => MacWish::Keep,
            Some("new") => MacWish::New,
            Some(given) => match given.parse::<Mac>() {
                Ok(mac) if mac.is_a_card_s() => MacWish::Is(mac),
                _ => {
                    return Err(wrong(
                        "mac",
                        given,
                        "write `keep`, `new`, or a card's MAC address: `52:54:00:12:34:56`",
                    ));
                }
            },
        };
        let ips = self.many(&format!("{key}.ip"), &spec.ip, ADDRESSES_MAX, |text| {
            let address: Address = text.parse().map_err(|NoAddress(why)| why)?;
            address.is_a_guest_s().then_some(address).ok_or("no guest can be reached at it")
        })?;
        let gateways: Vec<IpAddr> = self.many(&format!("{key}.gateway"), &spec.gateway, 2, |text| {
            let gateway: IpAddr = text.parse().map_err(|_| WRITE_IP)?;
            let beside = |address: &Address| address.subnet().has(gateway) && address.ip != gateway;
            let of_wire =
                is_link_local(gateway) && ips.iter().any(|address| address.ip.is_ipv4() == gateway.is_ipv4());
            let reached = of_wire || ips.iter().any(beside);
            reached.then_some(gateway).ok_or("it is no other address in a subnet of `ip`")
        })?;
        if gateways.iter().filter(|gateway| gateway.is_ipv4()).count() > 1
            || gateways.iter().filter(|gateway| gateway.is_ipv6()).count() > 1
        {
            return Err(wrong("gateway", &spec.gateway.join(", "), "write one of each kind at the most"));
        }
        let dns: Vec<IpAddr> =
            self.many(&format!("{key}.dns"), &spec.dns, DNS_MAX, |text| text.parse().map_err(|_| WRITE_IP))?;
        if ips.is_empty() && dns.is_empty() && mac == MacWish::Keep {
            return Err(self.wrong(key, "", "it says nothing: write `ip`, `dns` or `mac`"));
        }
        Ok(CardRule { card, site: spec.site.clone(), ips, gateways, dns, mac })
    }

    fn subnet_rule(&self, at: usize, spec: &SubnetSpec) -> Result<SubnetRule, SpecError> {
        let key = format!("runbook.subnet[{at}]");
        let subnet = |of: &str, given: &str| {
            given.parse::<Subnet>().map_err(|NoAddress(why)| self.wrong(&format!("{key}.{of}"), given, why))
        };
        let (from, to) = (subnet("from", &spec.from)?, subnet("to", &spec.to)?);
        if !from.is_as_long_as(&to) || from == to {
            let why =
                format!("write another subnet, of the same kind and as long as {from}: host parts stay");
            return Err(self.wrong(&format!("{key}.to"), &spec.to, &why));
        }
        let gateways = self.many(&format!("{key}.gateway"), spec.gateway.as_slice(), 1, |text| {
            let gateway: IpAddr = text.parse().map_err(|_| WRITE_IP)?;
            let of_wire = is_link_local(gateway) && spec.to.contains(':') == gateway.is_ipv6();
            (to.has(gateway) || of_wire).then_some(gateway).ok_or("it is not in `to`")
        })?;
        let dns =
            self.many(&format!("{key}.dns"), &spec.dns, DNS_MAX, |text| text.parse().map_err(|_| WRITE_IP))?;
        Ok(SubnetRule { from, to, gateway: gateways.first().copied(), dns })
    }

    fn many<T>(
        &self,
        key: &str,
        given: &[String],
        most: usize,
        read: impl Fn(&str) -> Result<T, &'static str>,
    ) -> Result<Vec<T>, SpecError> {
        if given.len() > most {
            return Err(self.wrong(key, &given.join(", "), &format!("write {most} at the most")));
        }
        given.iter().map(|text| read(text).map_err(|why| self.wrong(key, text, why))).collect()
    }
}

fn card_key(vm: &str, at: usize) -> String {
    format!("runbook.vm.{vm}.address[{at}]")
}

impl fmt::Display for CardName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mac(mac) => write!(f, "card {mac}"),
            Self::On(network) => write!(f, "the card on {}", network.escape_debug()),
        }
    }
}

impl fmt::Display for CardRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.card {
            Some(card) => write!(f, "{card}:")?,
            None => f.write_str("its only card:")?,
        }
        let mac = match self.mac {
            MacWish::Keep => None,
            MacWish::New => Some("a new MAC address".to_owned()),
            MacWish::Is(mac) => Some(format!("MAC address {mac}")),
        };
        let ips = self.ips.iter().map(ToString::to_string);
        let gateways = self.gateways.iter().map(|gateway| format!("gateway {gateway}"));
        let dns = self.dns.iter().map(|dns| format!("DNS {dns}"));
        let all: Vec<String> = ips.chain(gateways).chain(dns).chain(mac).collect();
        write!(f, " {}", all.join(", "))
    }
}

impl fmt::Display for SubnetRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "addresses in {} go to {}", self.from, self.to)?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, ", gateway {gateway}"))?;
        self.dns.iter().try_for_each(|dns| write!(f, ", DNS {dns}"))
    }
}

const WRITE_IP: &str = "write an address: `10.9.0.1`";
const RULES_MAX: usize = 64;
const ADDRESSES_MAX: usize = 16;
const DNS_MAX: usize = 8;

#[cfg(test)]
mod tests;
