//! What a runbook may say of addresses, which of it holds when, and what is refused with its key.

use super::*;
use crate::group::spec::VmSteps;

fn card(ip: &str) -> CardSpec {
    CardSpec { ip: vec![ip.into()], ..CardSpec::default() }
}

fn shop(web: Vec<CardSpec>, subnet: Vec<SubnetSpec>) -> GroupSpec {
    let mut spec = GroupSpec::new("shop", &["web", "db"]);
    spec.runbook.vm.insert("web".into(), VmSteps { address: web, ..VmSteps::default() });
    spec.runbook.subnet = subnet;
    spec
}

fn lead(from: &str, to: &str) -> SubnetSpec {
    SubnetSpec { from: from.into(), to: to.into(), ..SubnetSpec::default() }
}

#[test]
fn what_no_guest_could_be_given_is_refused_with_its_key() {
    let of_card = |change: fn(&mut CardSpec)| {
        let mut spec = card("10.9.0.5/24");
        change(&mut spec);
        shop(vec![spec], Vec::new())
    };
    let of_subnet = |change: fn(&mut SubnetSpec)| {
        let mut spec = lead("10.1.0.0/24", "10.9.0.0/24");
        change(&mut spec);
        shop(Vec::new(), vec![spec])
    };
    let cases = [
        (of_card(|card| card.ip = vec!["10.9.0.5".into()]), "runbook.vm.web.address[0].ip"),
        (of_card(|card| card.ip = vec!["10.9.0.5/24; reboot".into()]), "address[0].ip"),
        (of_card(|card| card.ip = vec!["10.9.0.0/24".into()]), "address[0].ip"),
        (of_card(|card| card.ip = vec!["-6/24".into()]), "address[0].ip"),
        (of_card(|card| card.ip.clear()), "address[0]"),
        (of_card(|card| card.gateway = vec!["10.1.0.1".into()]), "address[0].gateway"),
        (of_card(|card| card.gateway = vec!["10.9.0.5".into()]), "address[0].gateway"),
        (of_card(|card| card.gateway = vec!["10.9.0.1".into(), "10.9.0.2".into()]), "address[0].gateway"),
        (of_card(|card| card.gateway = vec!["fe80::1".into()]), "address[0].gateway"),
        (of_card(|card| card.dns = vec!["ns1".into()]), "address[0].dns"),
        (of_card(|card| card.mac = Some("01:00:5e:00:00:01".into())), "address[0].mac"),
        (of_card(|card| card.mac = Some("random".into())), "address[0].mac"),
        (of_card(|card| card.card = Some(String::new())), "address[0].card"),
        (of_subnet(|subnet| subnet.from = "10.1.0.1/24".into()), "runbook.subnet[0].from"),
        (of_subnet(|subnet| subnet.to = "10.9.0.0/23".into()), "subnet[0].to"),
        (of_subnet(|subnet| subnet.to = "fd00::/64".into()), "subnet[0].to"),
        (of_subnet(|subnet| subnet.to = "10.1.0.0/24".into()), "subnet[0].to"),
        (of_subnet(|subnet| subnet.gateway = Some("10.1.0.1".into())), "subnet[0].gateway"),
        (
            shop(Vec::new(), vec![lead("10.1.0.0/16", "10.9.0.0/16"), lead("10.1.2.0/24", "10.8.2.0/24")]),
            "subnet[1].from",
        ),
        (shop(vec![card("10.9.0.5/24"), card("10.9.0.6/24")], Vec::new()), "address[1]"),
    ];
    for (spec, key) in cases {
        let error = spec.check().unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
    for good in [
        of_card(|card| card.gateway = vec!["10.9.0.1".into()]),
        of_card(|card| (card.ip, card.mac) = (Vec::new(), Some("new".into()))),
        of_card(|card| {
            card.ip.push("fd00:9::5/64".into());
            card.gateway = vec!["fe80::1".into()];
        }),
        of_subnet(|subnet| subnet.gateway = Some("10.9.0.254".into())),
        // Both ways in one file: it is taken to the other site by `reprotect`.
        shop(Vec::new(), vec![lead("10.1.0.0/24", "10.9.0.0/24"), lead("10.9.0.0/24", "10.1.0.0/24")]),
    ] {
        good.check().unwrap();
    }
}

#[test]
fn no_two_members_are_given_one_address_unless_they_never_meet() {
    let mut spec = shop(vec![card("10.9.0.5/24")], Vec::new());
    spec.runbook.vm.insert("db".into(), VmSteps { address: vec![card("10.9.0.5/16")], ..VmSteps::default() });
    assert!(spec.check().unwrap_err().to_string().contains("10.9.0.5"));
    let at = |vm: &str, site: &str, spec: &mut GroupSpec| {
        spec.runbook.vm.get_mut(vm).unwrap().address[0].site = Some(site.into());
    };
    at("web", "north", &mut spec);
    assert!(spec.check().is_err(), "the other one has it at each site");
    at("db", "south", &mut spec);
    spec.check().unwrap();
    at("db", "north", &mut spec);
    let steps = spec.runbook.vm.get_mut("db").unwrap();
    (steps.address[0].when, spec.runbook.vm.get_mut("web").unwrap().address[0].when) =
        (When::Drill, When::Failover);
    spec.check().unwrap();
}

#[test]
fn the_sharper_rule_counts_and_another_site_s_does_not() {
    let rule = |ip: &str, when, site: Option<&str>| CardSpec { when, site: site.map(Into::into), ..card(ip) };
    let spec = shop(
        vec![
            rule("10.9.0.5/24", When::Always, None),
            rule("10.8.0.5/24", When::Always, Some("south")),
            rule("10.7.0.5/24", When::Drill, None),
        ],
        vec![
            lead("10.1.0.0/24", "10.9.0.0/24"),
            SubnetSpec { when: When::Drill, ..lead("10.1.0.0/25", "10.7.0.0/25") },
        ],
    );
    spec.check().unwrap();
    let first = |occasion, site: &str| {
        let rules = spec.addresses("web", occasion).unwrap().at(site);
        (rules.cards[0].ips[0].to_string(), rules.subnets[0].to.to_string(), rules.cards.len())
    };
    assert_eq!(first(Occasion::Failover, "south"), ("10.8.0.5/24".into(), "10.9.0.0/24".into(), 2));
    assert_eq!(first(Occasion::Failover, "north"), ("10.9.0.5/24".into(), "10.9.0.0/24".into(), 1));
    assert_eq!(first(Occasion::Drill, "north"), ("10.7.0.5/24".into(), "10.7.0.0/25".into(), 2));
    let db = spec.addresses("db", Occasion::Failover).unwrap();
    assert!(db.cards.is_empty() && db.subnets.len() == 1, "subnets are of all members");
    assert_eq!(db.words(), ["addresses in 10.1.0.0/24 go to 10.9.0.0/24"]);
    assert!(GroupSpec::new("g", &["a"]).addresses("a", Occasion::Drill).unwrap().is_empty());
}

#[test]
fn a_subnet_s_rule_is_of_the_members_that_it_names_and_goes_with_the_last_of_them() {
    let of = |vms: &[&str], to: &str| {
        let vms = vms.iter().map(|vm| (*vm).into()).collect();
        SubnetSpec { vms, ..lead("10.1.0.0/24", to) }
    };
    let mut spec = shop(Vec::new(), vec![of(&["web"], "10.9.0.0/24"), of(&["db"], "10.8.0.0/24")]);
    spec.check().unwrap();
    let led = |spec: &GroupSpec, vm: &str| spec.addresses(vm, Occasion::Failover).unwrap().words();
    assert_eq!(led(&spec, "db"), ["addresses in 10.1.0.0/24 go to 10.8.0.0/24"]);
    spec.let_go(&["db".into()]);
    assert_eq!((spec.runbook.subnet.len(), led(&spec, "web").len(), led(&spec, "db").len()), (1, 1, 0));
    spec.runbook.subnet.push(of(&["mail"], "10.7.0.0/24"));
    assert!(spec.check().unwrap_err().to_string().contains("subnet[1].vms"));
    spec.runbook.subnet[1] = of(&[], "10.7.0.0/24");
    assert!(spec.check().unwrap_err().to_string().contains("subnet[1].from"), "two are of web");
}

#[test]
fn a_drill_on_the_network_of_failovers_has_addresses_of_its_own() {
    let mut spec = shop(vec![card("10.9.0.5/24")], vec![lead("10.1.0.0/24", "10.9.0.0/24")]);
    spec.runbook.drill_network = Some("dr-lan".into());
    spec.check().unwrap();
    spec.runbook.networks.insert("lan".into(), "network:dr-lan".into());
    for part in ["address[0].when", "subnet[0].when"] {
        let error = spec.check().unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("drill"), "{error}");
        if part.starts_with("address") {
            spec.runbook.vm.get_mut("web").unwrap().address[0].when = When::Failover;
        }
    }
    spec.runbook.subnet[0].when = When::Failover;
    spec.check().unwrap();
}

#[test]
fn rules_are_stored_and_sent_as_they_are_written_and_an_older_group_has_none() {
    let mut web = card("fd00:9::5/64");
    (web.card, web.mac, web.when) = (Some("lan".into()), Some("new".into()), When::Drill);
    let spec = shop(vec![web], vec![lead("10.1.0.0/24", "10.9.0.0/24")]);
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<GroupSpec>(&text).unwrap(), spec);
    let rules = spec.addresses("web", Occasion::Drill).unwrap();
    let text = serde_json::to_string(&rules).unwrap();
    assert_eq!(serde_json::from_str::<AddressRules>(&text).unwrap(), rules);
    let plain = serde_json::to_string(&GroupSpec::new("g", &["a"])).unwrap();
    assert!(!plain.contains("subnet") && !plain.contains("address"), "{plain}");
}
