//! Addresses of a replica at its site, and of one for trial: what the runbook says is what the guest has, and its card; what
//! could not be done is told.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, GuestSpec, Rig, Site, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small},
};
use serde_json::{Value, json};
use std::{fs, net::UdpSocket, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const MAC: &str = "52:54:00:12:34:56";

/// At work at site `lan-a`, with a card on it.
fn spec(name: &str) -> GuestSpec {
    small(name).disk(DiskFormat::Raw, 16).card(MAC, "type='network'><source network='lan-a'/>")
}

/// A guest that is protected, and its site, which is going to be lost.
struct Protected {
    a: Site,
    b: Site,
    controller: Controller,
    guest: Guest,
    boot: String,
    _agent: Agent,
    _rig: Rig,
}

impl Protected {
    /// `runbook` is what the group says besides; `inside` is run in the guest.
    fn new(name: &str, spec: &GuestSpec, inside: &str, runbook: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, _link) = rig.pair()?;
        for (site, network, address) in [(&a, "lan-a", "10.1.0.1/24"), (&b, "lan-b", "10.9.0.1/24")] {
            make_network(site, network, address)?;
        }
        let controller = Controller::running(&b)?;
        let guest = a.define_and_start(spec)?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        if spec.agent {
            guest.wait_for_agent(BOOT)?;
            guest.run_inside(&format!("{inside}; echo inside=done >/dev/ttyS0"))?;
            eventually(SOON, "the guest to have its addresses", || {
                Ok(guest.console().has_said("inside=done").then_some(()))
            })?;
        }
        let mut agent = Agent::install(&a, &controller, "[defaults]\nmax_pause = \"5s\"")?;
        agent.start()?;
        let file = a.folder().join("groups.toml");
        let lead = "[group.runbook.networks]\nlan-a = \"network:lan-b\"\n";
        fs::write(
            &file,
            format!("[[group]]\nname = \"shop\"\nvms = [\"web\"]\nrpo = \"1s\"\n{runbook}{lead}"),
        )?;
        let file = file.display().to_string();
        eventually(SOON, "the group to be made", || {
            Ok(controller.cli(&["apply", "-f", &file])?.status.success().then_some(()))
        })?;
        controller.wait_more_group_points("shop", 2, SOON)?;
        Ok(Self { a, b, controller, guest, boot, _agent: agent, _rig: rig })
    }

    /// The group's failover, and what it says of the addresses of its only member.
    fn fail_over(&self) -> Result<(Value, Vec<Value>)> {
        let report = self.controller.json(&["failover", "shop", "--emergency", "--yes"])?;
        let said = report["members"][0]["addresses"].as_array().context("addresses")?.clone();
        Ok((report, said))
    }
}

/// Over a bridge that is there already: for one of its own libvirt wants a firewall.
fn make_network(site: &Site, name: &str, address: &str) -> Result<()> {
    let (file, bridge) = (site.folder().join(format!("{name}.xml")), name.replace("lan-", "br"));
    site.run(["ip", "link", "add", &bridge, "type", "bridge"])?;
    site.run(["ip", "address", "add", address, "dev", &bridge])?;
    site.run(["ip", "link", "set", &bridge, "up"])?;
    let xml =
        format!("<network><name>{name}</name><forward mode='bridge'/><bridge name='{bridge}'/></network>");
    fs::write(&file, xml)?;
    site.virsh(["net-create", &file.display().to_string()]).map(drop)
}

/// The addresses of its card, and its MAC address, as the guest's agent tells them.
fn inside(guest: &Guest) -> Result<(Vec<String>, String)> {
    let told = guest.ask_agent(&json!({ "execute": "guest-network-get-interfaces" }))?;
    let told = told.as_array().context("interfaces")?.clone();
    let card = told.into_iter().find(|interface| interface["name"] == "eth0").context("eth0")?;
    let all = card["ip-addresses"].as_array().cloned().unwrap_or_default();
    let all = all.iter().map(|address| format!("{}/{}", text(&address["ip-address"]), address["prefix"]));
    Ok((all.filter(|address| !address.starts_with("fe80:")).collect(), text(&card["hardware-address"])))
}

/// Whether anybody at `address` says to the site which card it is.
fn answers(site: &Site, address: &str, mac: &str) -> Result<()> {
    eventually(SOON, &format!("{address} to answer"), || {
        site.in_network(|| -> std::io::Result<usize> {
            UdpSocket::bind("0.0.0.0:0")?.send_to(b"?", format!("{address}:9"))
        })??;
        Ok(site.run(["ip", "neighbour", "show", address])?.contains(mac).then_some(()))
    })
}

/// The address that QEMU takes what is sent to the card for.
fn in_device(guest: &Guest) -> Result<String> {
    let answer: Value = serde_json::from_str(&guest.qmp(r#"{"execute":"query-rx-filter"}"#)?)?;
    Ok(text(&answer["return"][0]["main-mac"]))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn all_done(said: &[Value]) -> Result<()> {
    ensure!(!said.is_empty() && said.iter().all(|step| step["done"] == true), "{said:#?}");
    Ok(())
}

const LED: &str = "[[group.runbook.subnet]]
from = \"10.1.0.0/24\"
to = \"10.9.0.0/24\"
gateway = \"10.9.0.1\"
[[group.runbook.subnet]]
from = \"10.9.0.0/24\"
to = \"10.1.0.0/24\"
[[group.runbook.subnet]]
from = \"fd00:1::/64\"
to = \"fd00:9::/64\"
[[group.runbook.vm.web.address]]
ip = [\"10.7.0.5/24\"]
when = \"drill\"
";

/// Goal: a guest that goes on has the addresses of its new site, and no others; one for trial has those for drills; also if
/// the controller dies in the middle. Method: what the guest's own agent tells, and who answers at the site; the runbook leads
/// both ways, and the controller is killed after the second program that it has the guest run, when old and new are there.
#[test]
fn a_resumed_guest_has_the_addresses_of_the_site_that_it_goes_on_at() -> Result<()> {
    let up = "ip link set eth0 up; ip addr add 10.1.0.5/24 dev eth0; ip addr add fd00:1::5/64 dev eth0; \
              ip route add default via 10.1.0.1";
    let mut of = Protected::new("addresses", &spec("web").agent(), up, LED)?;
    let source = ["10.1.0.5/24", "fd00:1::5/64"];
    ensure!(inside(&of.guest)?.0 == source, "{:?}", inside(&of.guest)?);

    let kept = of.controller.json(&["drill", "shop", "--keep"])?;
    ensure!(kept["passed"] == true, "{kept:#}");
    let trial = of.b.guest(&text(&kept["members"][0]["as_name"]))?;
    ensure!(inside(&trial)?.0 == ["10.7.0.5/24", "fd00:9::5/64"], "{:?}", inside(&trial)?);
    all_done(kept["members"][0]["addresses"].as_array().context("addresses")?)?;
    of.controller.json(&["drill", "shop", "--end"])?;
    ensure!(inside(&of.guest)?.0 == source, "the source is as it was");

    let preview = of.controller.json(&["failover", "shop", "--emergency", "--dry-run"])?;
    ensure!(preview["addresses"]["web"].to_string().contains("10.9.0.0/24"), "{preview:#}");
    of.a.power_cut();
    of.controller.stop()?;
    of.controller.env = killed_at("failover.address:2");
    of.controller.start()?;
    let killed = of.controller.cli(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(!killed.status.success(), "the controller was to be killed: {killed:?}");
    of.controller.kill9()?;
    of.controller.start()?;
    let (report, said) = of.fail_over()?;
    all_done(&said)?;
    ensure!(report["warnings"] == json!([]), "{report:#}");
    let replica = of.b.guest("web")?;
    ensure!(inside(&replica)?.0 == ["10.9.0.5/24", "fd00:9::5/64"], "{:?}", inside(&replica)?);
    answers(&of.b, "10.9.0.5", MAC)?;
    replica.run_inside("echo \"out: $(ip route show default)\" >/dev/ttyS0")?;
    eventually(SOON, "its default route", || {
        Ok(replica.console().has_said("out: default via 10.9.0.1 dev eth0").then_some(()))
    })?;
    replica_unharmed(&replica, &of.boot, 0, SOON)?;
    Ok(())
}

const FIXED: &str = "[[group.runbook.vm.web.address]]
ip = [\"10.9.0.6/24\"]
mac = \"52:54:00:09:09:09\"
";

/// Goal: what could not be done is told, and the failover stands; without a way to an agent it is told before as well. What
/// QEMU makes of another MAC address in a replica's definition is as docs/operations.md says: the guest goes on with the old
/// one. Method: a guest with a channel for an agent, and none at its end; QEMU's own word.
#[test]
fn a_guest_whose_agent_is_silent_keeps_its_addresses_and_that_is_told() -> Result<()> {
    let channel = "<devices><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices>";
    let of = Protected::new("addresses-silent", &spec("web").more(channel), "", FIXED)?;
    of.a.power_cut();
    let (report, said) = of.fail_over()?;
    ensure!(said.len() == 1 && said[0]["done"] == false, "{said:#?}");
    ensure!(said[0]["why"].as_str().is_some_and(|why| why.contains("guest-ping")), "{said:#?}");
    ensure!(report["warnings"].to_string().contains("10.9.0.6"), "{report:#}");
    let replica = of.b.guest("web")?;
    replica_unharmed(&replica, &of.boot, 0, SOON)?;
    ensure!(in_device(&replica)? == MAC, "{}", in_device(&replica)?);
    ensure!(of.b.virsh(["dumpxml", "web"])?.contains("52:54:00:09:09:09"));
    Ok(())
}

/// Goal: a card has the MAC address that the runbook says, in the guest, for QEMU and for libvirt, and keeps it when the guest
/// boots again. Method: a virtio card; the guest is reset afterwards.
#[test]
fn a_resumed_guest_s_card_has_the_mac_address_of_the_runbook_and_keeps_it() -> Result<()> {
    let up = "ip link set eth0 up; ip addr add 10.1.0.6/24 dev eth0";
    let of = Protected::new("addresses-mac", &spec("web").agent(), up, FIXED)?;
    of.a.power_cut();
    let (_, said) = of.fail_over()?;
    all_done(&said)?;
    let (replica, new) = (of.b.guest("web")?, "52:54:00:09:09:09");
    ensure!(inside(&replica)? == (vec!["10.9.0.6/24".to_owned()], new.to_owned()), "{:?}", inside(&replica)?);
    ensure!(in_device(&replica)? == new && !of.b.virsh(["dumpxml", "web"])?.contains(MAC));
    answers(&of.b, "10.9.0.6", new)?;
    replica_unharmed(&replica, &of.boot, 0, SOON)?;
    of.b.virsh(["reset", "web"])?;
    replica.wait(BOOT, "it to boot", |report| report.boot != of.boot && report.tick >= 3)?;
    replica.wait_for_agent(BOOT)?;
    ensure!(inside(&replica)?.1 == new, "{:?}", inside(&replica)?);
    Ok(())
}

/// Goal: a replica that boots has them as well. Method: a group of disks alone; its guest configures nothing by itself.
#[test]
fn a_replica_that_boots_has_the_addresses_of_the_runbook() -> Result<()> {
    let runbook = format!("memory = \"off\"\n{}", FIXED.replace("52:54:00:09:09:09", "new"));
    let of = Protected::new("addresses-boot", &spec("web").agent(), "true", &runbook)?;
    of.a.power_cut();
    let (report, said) = of.fail_over()?;
    ensure!(report["members"][0]["resumed"] == false, "{report:#}");
    all_done(&said)?;
    let replica = of.b.guest("web")?;
    let (addresses, mac) = inside(&replica)?;
    ensure!(addresses == ["10.9.0.6/24"] && mac != MAC, "{addresses:?} {mac}");
    ensure!(of.b.virsh(["dumpxml", "--inactive", "web"])?.contains(&mac), "{mac}");
    answers(&of.b, "10.9.0.6", &mac)
}
