//! What is decided, and what is done of it in a guest that is played here: one that drops addresses as Linux does, that may
//! forbid things, and whose controller may die at any step.

use super::{
    guest::carry_out,
    plan::{Cards, Plan},
};
use crate::{
    failover::{
        outcome::Afterwards,
        replica_xml::{Card, Wiring},
    },
    group::{
        GroupSpec,
        address_spec::{CardSpec, Occasion, SubnetSpec},
        spec::VmSteps,
    },
};
use lifeboat::{
    address::{Address, Mac},
    hypervisor::guest_agent::{AgentChannel, GuestAgent, Interface},
    id::VmId,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

#[derive(Default)]
struct Guest {
    interfaces: RefCell<Vec<Interface>>,
    said: RefCell<Vec<String>>,
    /// Programs that may still be run before the controller dies.
    lives: Cell<Option<usize>>,
    forbidden: bool,
    without_ip: bool,
    has_resolvectl: bool,
}

impl AgentChannel for &Guest {
    fn ask(&self, request: &str, _: Duration) -> Result<String, String> {
        let request: Value = serde_json::from_str(request).unwrap();
        let answer = match request["execute"].as_str().unwrap() {
            "guest-network-get-interfaces" => json!({ "return": self.told() }),
            "guest-exec" if self.forbidden => {
                json!({ "error": { "class": "CommandNotFound", "desc": "Command guest-exec has been disabled" } })
            }
            "guest-exec" => {
                if let Some(lives) = self.lives.get() {
                    self.lives.set(Some(lives.checked_sub(1).ok_or("the controller is dead")?));
                }
                match self.run(&request["arguments"]) {
                    Some(code) => json!({ "return": { "pid": code + 1000 } }),
                    None => {
                        json!({ "error": { "class": "GenericError", "desc": "No such file or directory" } })
                    }
                }
            }
            "guest-exec-status" => {
                let code = request["arguments"]["pid"].as_i64().unwrap() - 1000;
                json!({ "return": { "exited": true, "exitcode": code } })
            }
            other => panic!("{other}"),
        };
        Ok(answer.to_string())
    }
}

impl Guest {
    fn with(interfaces: Vec<Interface>) -> Self {
        Self { interfaces: RefCell::new(interfaces), ..Self::default() }
    }

    fn told(&self) -> Value {
        let address = |address: &Address| {
            let text = address.to_string();
            let (ip, bits) = text.split_once('/').unwrap();
            json!({ "ip-address": ip, "prefix": bits.parse::<u64>().unwrap() })
        };
        let one = |of: &Interface| {
            let addresses: Vec<Value> = of.addresses.iter().map(address).collect();
            let mac = of.mac.map(|mac| mac.to_string());
            json!({ "name": of.name, "hardware-address": mac, "ip-addresses": addresses })
        };
        self.interfaces.borrow().iter().map(one).collect()
    }

    /// How it ended; `None`: there is no such program.
    fn run(&self, exec: &Value) -> Option<i64> {
        let arguments: Vec<&str> =
            exec["arg"].as_array()?.iter().map(|word| word.as_str().unwrap()).collect();
        if exec["path"] == "resolvectl" && self.has_resolvectl {
            self.said.borrow_mut().push(format!("resolvectl {}", arguments.join(" ")));
            return Some(0);
        }
        // Debian's agent does not look where the superuser's programs are.
        if exec["path"] != "/sbin/ip" || self.without_ip {
            return None;
        }
        self.said.borrow_mut().push(arguments.join(" "));
        let mut all = self.interfaces.borrow_mut();
        let of = |name: &str| all.iter().find(|of| of.name == name).unwrap().addresses.clone();
        let (now, done) = match arguments.as_slice() {
            ["address", "add", new, "dev", name] => {
                let (mut now, new) = (of(name), new.parse::<Address>().unwrap());
                let there =
                    now.contains(&new) || (new.ip.is_ipv6() && now.iter().any(|old| old.ip == new.ip));
                if !there {
                    now.push(new);
                }
                (Some((*name, now)), !there)
            }
            ["address", "del", old, "dev", name] => {
                let (mut now, old) = (of(name), old.parse::<Address>().unwrap());
                let primary = now.iter().find(|other| other.subnet() == old.subnet()) == Some(&old);
                let there = now.contains(&old);
                // The first of a subnet takes the others with it.
                now.retain(|other| {
                    *other != old && !(primary && old.ip.is_ipv4() && other.subnet() == old.subnet())
                });
                (Some((*name, now)), there)
            }
            ["link", "set", "dev", name, "address", mac] => {
                all.iter_mut().find(|of| of.name == *name)?.mac = mac.parse().ok();
                (None, true)
            }
            [_, "route", "del", ..] => (None, false),
            ["link", "set", "dev", _, "up"] | [_, "route", "replace", ..] => (None, true),
            other => panic!("{other:?}"),
        };
        if let Some((name, now)) = now {
            all.iter_mut().find(|of| of.name == name)?.addresses = now;
        }
        Some(i64::from(!done) * 2)
    }

    fn carry_out(&self, plan: &Plan) -> Vec<Afterwards> {
        carry_out(&GuestAgent::new(self), plan, Instant::now() + Duration::from_secs(60))
    }

    fn addresses(&self, at: usize) -> Vec<String> {
        let mut all: Vec<String> =
            self.interfaces.borrow()[at].addresses.iter().map(ToString::to_string).collect();
        all.sort();
        all
    }
}

const MAC: Mac = Mac::made_up([0, 0, 1]);

fn interface(name: &str, mac: Option<Mac>, addresses: &[&str]) -> Interface {
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    Interface { name: name.into(), mac, addresses }
}

fn card(mac: Mac, on: &str) -> Card {
    Card { mac, on: Some(on.into()), virtio: true }
}

fn rule(ips: &[&str]) -> CardSpec {
    CardSpec { ip: ips.iter().map(|ip| (*ip).into()).collect(), ..CardSpec::default() }
}

fn lead(from: &str, to: &str) -> SubnetSpec {
    SubnetSpec { from: from.into(), to: to.into(), ..SubnetSpec::default() }
}

fn cards(rules: Vec<CardSpec>, subnet: Vec<SubnetSpec>, cards: Vec<Card>, resumes: bool) -> Cards {
    let mut spec = GroupSpec::new("shop", &["web"]);
    spec.runbook.vm.insert("web".into(), VmSteps { address: rules, ..VmSteps::default() });
    spec.runbook.subnet = subnet;
    spec.check().unwrap();
    let rules = spec.addresses("web", Occasion::Failover).unwrap();
    Cards::new(rules, Wiring { cards, agent: true }, VmId::from_bytes([7; 16]), resumes)
}

#[test]
fn the_only_card_has_what_is_written_and_nothing_else_of_that_kind() {
    let mut web = rule(&["10.9.0.5/24"]);
    web.gateway = vec!["10.9.0.1".into()];
    let cards = cards(vec![web], Vec::new(), vec![card(MAC, "lan")], true);
    let guest = Guest::with(vec![
        interface("lo", None, &["127.0.0.1/8"]),
        interface("eth0", Some(MAC), &["10.1.0.5/24", "10.1.0.6/24", "fd00:1::5/64", "fe80::1/64"]),
    ]);
    let plan = cards.plan(&guest.interfaces.borrow(), &[]);
    let done = guest.carry_out(&plan);
    assert!(done.len() == 1 && done[0].done, "{done:?}");
    assert!(
        done[0].what.contains("10.9.0.5/24 instead of 10.1.0.5/24, 10.1.0.6/24, gateway 10.9.0.1"),
        "{done:?}"
    );
    assert_eq!(guest.addresses(1), ["10.9.0.5/24", "fd00:1::5/64", "fe80::1/64"]);
    assert!(guest.said.borrow().contains(&"-4 route replace default via 10.9.0.1 dev eth0".into()));
    guest.said.borrow_mut().clear();
    assert!(guest.carry_out(&plan)[0].done);
    assert!(
        guest.said.borrow().iter().all(|said| said.contains("route")),
        "it is there already: {:?}",
        guest.said
    );
}

#[test]
fn subnets_are_led_on_every_interface_and_what_was_led_is_not_led_back() {
    let both = vec![
        lead("10.1.0.0/24", "10.9.0.0/24"),
        lead("10.9.0.0/24", "10.1.0.0/24"),
        lead("fd00:1::/64", "fd00:9::/64"),
    ];
    let cards = cards(Vec::new(), both, vec![card(MAC, "lan")], true);
    let guest = Guest::with(vec![
        interface("br0", Some(MAC), &["10.1.0.5/24", "192.168.7.1/24", "fd00:1::5/64"]),
        interface("eth0", Some(MAC), &[]),
    ]);
    let plan = cards.plan(&guest.interfaces.borrow(), &[]);
    for _ in 0..2 {
        assert!(guest.carry_out(&plan).iter().all(|step| step.done));
        assert_eq!(guest.addresses(0), ["10.9.0.5/24", "192.168.7.1/24", "fd00:9::5/64"]);
    }
    let settled: Vec<Address> = plan.interfaces.iter().flat_map(|of| of.add.clone()).collect();
    assert_eq!(cards.plan(&guest.interfaces.borrow(), &settled), Plan::default());
}

#[test]
fn a_card_is_known_by_its_address_or_its_network_and_one_that_is_not_there_is_told() {
    let two = vec![card(MAC, "lan"), card(Mac::made_up([0, 0, 2]), "back")];
    let named = |name: &str, ip: &str| CardSpec { card: Some(name.into()), ..rule(&[ip]) };
    let rules = vec![
        named("52:54:00:00:00:01", "10.9.0.5/24"),
        named("back", "10.8.0.5/24"),
        named("attic", "10.7.0.5/24"),
        rule(&["10.6.0.5/24"]),
    ];
    let cards = cards(rules, Vec::new(), two, true);
    let told: Vec<String> = cards.without_the_guest().iter().map(ToString::to_string).collect();
    assert!(told.len() == 2 && told[0].contains("attic") && told[1].contains("2 cards"), "{told:?}");
    let plan = cards
        .plan(&[interface("a", Some(MAC), &[]), interface("b", Some(Mac::made_up([0, 0, 2])), &[])], &[]);
    let names: Vec<(&str, bool)> = plan.interfaces.iter().map(|of| (of.name.as_str(), of.up)).collect();
    assert_eq!((names, plan.said.len()), (vec![("a", true), ("b", true)], 0));
    let plan = cards.plan(
        &[interface("a", Some(MAC), &["10.1.0.5/24"]), interface("a.7", Some(MAC), &["10.2.0.5/24"])],
        &[],
    );
    assert!(plan.interfaces.is_empty() && plan.said.len() == 2, "{plan:?}");
    assert!(plan.said[0].to_string().contains("a, a.7") && plan.said[1].to_string().contains("no interface"));
    // A bridge over it has the address, and so is meant.
    let plan = cards.plan(
        &[interface("br0", Some(MAC), &["10.1.0.5/24"]), interface("a", Some(MAC), &["fe80::1/64"])],
        &[],
    );
    assert_eq!(plan.interfaces[0].name, "br0");
}

#[test]
fn name_servers_are_set_where_the_guest_has_the_means_and_elsewhere_that_is_told() {
    let mut web = rule(&["10.9.0.5/24"]);
    web.dns = vec!["10.9.0.2".into(), "fd00:9::2".into()];
    let cards = cards(vec![web], Vec::new(), vec![card(MAC, "lan")], true);
    let now = || vec![interface("eth0", Some(MAC), &["10.1.0.5/24"])];
    let plan = cards.plan(&now(), &[]);
    let guest = Guest { has_resolvectl: true, ..Guest::with(now()) };
    assert!(guest.carry_out(&plan)[0].done);
    assert_eq!(guest.said.borrow().last().unwrap(), "resolvectl dns eth0 10.9.0.2 fd00:9::2");
    let guest = Guest::with(now());
    let done = guest.carry_out(&plan);
    assert!(!done[0].done && done[0].to_string().contains("no `resolvectl`"), "{done:?}");
    assert_eq!(guest.addresses(0), ["10.9.0.5/24"], "what can be done is");
}

#[test]
fn why_nothing_was_done_is_told() {
    let cards = cards(vec![rule(&["10.9.0.5/24"])], Vec::new(), vec![card(MAC, "lan")], true);
    let now = || vec![interface("eth0", Some(MAC), &["10.1.0.5/24"])];
    let plan = cards.plan(&now(), &[]);
    let cases = [
        (Guest { forbidden: true, ..Guest::with(now()) }, "disabled"),
        (Guest { without_ip: true, ..Guest::with(now()) }, "no `ip`"),
        (Guest::with(vec![interface("eth1", Some(MAC), &[])]), "no interface eth0"),
    ];
    for (guest, why) in cases {
        let done = guest.carry_out(&plan);
        assert!(!done[0].done && done[0].to_string().contains(why), "{why}: {done:?}");
    }
    let late = carry_out(&GuestAgent::new(&Guest::with(now())), &plan, Instant::now());
    assert!(!late[0].done && late[0].to_string().contains("time"), "{late:?}");
}

#[test]
fn a_mac_address_is_changed_where_it_can_be_and_elsewhere_it_is_said_why_not() {
    let wish = |mac: &str| CardSpec { mac: Some(mac.into()), ..CardSpec::default() };
    let plain = || vec![Card { virtio: false, ..card(MAC, "lan") }];
    let new = Mac::made_up([9, 9, 9]);
    let resumed = cards(vec![wish("52:54:00:09:09:09")], Vec::new(), vec![card(MAC, "lan")], true);
    assert_eq!((resumed.macs.get(&MAC), resumed.without_the_guest().len()), (Some(&new), 0));
    let guest = Guest::with(vec![interface("eth0", Some(MAC), &["10.1.0.5/24"])]);
    let plan = resumed.plan(&guest.interfaces.borrow(), &[]);
    for _ in 0..2 {
        assert!(guest.carry_out(&plan)[0].done);
    }
    assert_eq!((guest.interfaces.borrow()[0].mac, guest.said.borrow().len()), (Some(new), 1));

    let kept = cards(vec![wish("new")], Vec::new(), plain(), true);
    let told = kept.without_the_guest();
    assert!(kept.macs.is_empty() && !told[0].done && told[0].to_string().contains("virtio"), "{told:?}");
    let unreached = Wiring { cards: vec![card(MAC, "lan")], agent: false };
    let unreached = Cards::new(resumed.rules.clone(), unreached, VmId::from_bytes([7; 16]), true);
    assert!(
        unreached.macs.is_empty() && !unreached.without_the_guest()[0].done,
        "the card would have another than its guest"
    );
    let booted = cards(vec![wish("new")], Vec::new(), plain(), false);
    assert!(booted.without_the_guest()[0].done && !booted.need_the_guest());
    let again = cards(vec![wish("new")], Vec::new(), plain(), false);
    assert!(booted.macs == again.macs && booted.macs[&MAC] != MAC, "the same each time");
    let of_drill = Wiring { cards: plain(), agent: true };
    let other = Cards::new(booted.rules.clone(), of_drill, VmId::from_bytes([8; 16]), false);
    assert_ne!(other.macs, booted.macs, "a drill's are its own");
}

proptest! {
    /// Wherever the controller dies, the next one that has the plan brings about what the first would have.
    #[test]
    fn a_controller_that_dies_anywhere_is_followed_by_one_that_ends_what_it_began(
        hosts in proptest::collection::btree_set(1u8..250, 0..5),
        others in proptest::collection::btree_set(1u8..250, 0..3),
        fixed in proptest::option::of(1u8..250),
        lives in 0usize..12,
    ) {
        let text = |net: &str, host: &u8| format!("{net}.{host}/24");
        let addresses: Vec<String> =
            hosts.iter().map(|host| text("10.1.0", host)).chain(others.iter().map(|host| text("10.2.0", host))).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let ip = fixed.map(|host| text("10.1.0", &host));
        let rules = ip.iter().map(|ip| rule(&[ip])).collect();
        let subnets = vec![lead("10.1.0.0/24", "10.9.0.0/24"), lead("10.9.0.0/24", "10.1.0.0/24")];
        let cards = cards(rules, subnets, vec![card(MAC, "lan")], true);
        let guest = Guest::with(vec![interface("eth0", Some(MAC), &addresses)]);
        let plan = cards.plan(&guest.interfaces.borrow(), &[]);
        guest.lives.set(Some(lives));
        guest.carry_out(&plan);
        guest.lives.set(None);
        let done = guest.carry_out(&plan);
        prop_assert!(done.iter().all(|step| step.done), "{done:?}");
        let mut wanted: Vec<String> = match &ip {
            Some(ip) => vec![ip.clone()],
            None => hosts.iter().map(|host| text("10.9.0", host)).chain(others.iter().map(|host| text("10.2.0", host))).collect(),
        };
        wanted.sort();
        prop_assert_eq!(guest.addresses(0), wanted);
    }

    /// Whatever the guest tells, each word that it is given back is a word of ours, an address, or a name that it told itself.
    #[test]
    fn no_word_that_is_run_in_a_guest_is_anybody_s_text(name in "[!-~]{1,15}", host in 1u8..250) {
        let told = interface(&name, Some(MAC), &[&format!("10.1.0.{host}/24")]);
        let plan = cards(Vec::new(), vec![lead("10.1.0.0/24", "10.9.0.0/24")], Vec::new(), true).plan(std::slice::from_ref(&told), &[]);
        let guest = Guest::with(vec![told]);
        guest.carry_out(&plan);
        for said in guest.said.borrow().iter() {
            let words: Vec<&str> = said.split(' ').collect();
            prop_assert_eq!((words[0], words[3], words[4]), ("address", "dev", name.as_str()));
            prop_assert!(words[2].parse::<Address>().is_ok());
        }
    }
}
