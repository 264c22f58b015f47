//! Guests that are not like the others: memory of several nodes, many at once; and an agent whose limits are changed
//! while it works.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{
    DiskFormat, Rig, eventually,
    product::{Agent, Controller, replica_unharmed, small},
};
use serde_json::json;
use std::{os::unix::fs::MetadataExt, path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const TEBIBYTE_MIB: u64 = 1 << 20;

/// Goal: memory of several nodes, each a backend of its own in QEMU, goes on where it stood. Method: a pattern that neither
/// node can hold alone, in ordinary memory and in a memfd of QEMU's.
#[test]
fn a_guest_with_several_memory_nodes_goes_on_unharmed() -> Result<()> {
    let nodes = "<cpu><numa><cell id='0' cpus='0' memory='112' unit='MiB'/><cell id='1' memory='112' unit='MiB'/>\
                 </numa></cpu>";
    let shared = "<memoryBacking><source type='memfd'/></memoryBacking>";
    for (name, more) in [("nodes", nodes.to_owned()), ("nodes-memfd", format!("{nodes}{shared}"))] {
        let rig = Rig::new(name)?;
        let (a, b, _link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        // Each node has 112 MiB, and the kernel lives in one of them.
        let spec = small("web").memory_mib(224).pattern_mib(88).disk(DiskFormat::Qcow2, 32).more(&more);
        let guest = a.define_and_start(&spec)?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        let backends = guest.qmp(r#"{"execute":"query-memdev"}"#)?;
        ensure!(backends.matches("\"size\"").count() == 2, "two backends: {backends}");
        let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
        controller.wait_points("web", 4, SOON)?;
        let row = agent.vm("web")?;
        ensure!(row["memory_engine"]["engine"].is_string(), "{row}");
        a.power_cut();
        controller.failover("web", "latest")?;
        replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
        drop((agent, rig));
    }
    Ok(())
}

/// Goal: none of many starves, also when the site comes back and all of them want it at once. Method: six guests on one
/// agent (`LIFEBOAT_MANY=20` for twenty), and a site that dies in the middle.
#[test]
fn of_many_guests_on_one_agent_none_starves() -> Result<()> {
    let many = std::env::var("LIFEBOAT_MANY").ok().and_then(|text| text.parse().ok()).unwrap_or(6_usize);
    let rig = Rig::new("many")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let names: Vec<String> = (1..=many).map(|no| format!("vm{no}")).collect();
    let mut boots = Vec::new();
    for name in &names {
        let guest = a.define_and_start(&small(name).tick_ms(500).disk(DiskFormat::Qcow2, 16))?;
        boots.push(guest.wait_for_tick(1, SOON)?.boot);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut agent = Agent::protecting(&a, &controller, &names, "2s")?;
    for name in &names {
        controller.wait_points(name, 2, SOON * 3)?;
        agent.wait_state(name, "protected", SOON)?;
    }
    controller.kill9()?;
    controller.start()?;
    for name in &names {
        controller
            .wait_more_points(name, 2, SOON * 3)
            .with_context(|| format!("{name} after the site's return"))?;
    }
    let (memory_kib, _) = agent.process()?.memory_kib()?;
    eprintln!("{many} guests: the agent holds {} MiB", memory_kib >> 10);
    assert_eq!(controller.json(&["verify"])?["findings"], json!([]));
    a.power_cut();
    let last = names[many - 1];
    controller.failover(last, "latest")?;
    replica_unharmed(&b.guest(last)?, &boots[many - 1], 0, SOON)?;
    Ok(())
}

/// Goal: limits change without a restart, and a mistake in the file changes nothing. Method: SIGHUP with a narrow limit,
/// with a file that can't be read, and with a window of time that widens the link again; by what status says.
#[test]
fn limits_and_windows_are_read_again_without_a_restart() -> Result<()> {
    let rig = Rig::new("reload")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").dirty_kib(2048))?;
    guest.wait_for_tick(3, BOOT)?;
    let web = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"5s\"";
    let mut agent = Agent::install(&a, &controller, web)?;
    agent.start()?;
    controller.wait_points("web", 3, SOON)?;
    let told = |agent: &mut Agent, settings: &str, says: &str| -> Result<()> {
        agent.configure(&controller.address(), settings)?;
        agent.process()?.signal(Signal::SIGHUP)?;
        agent.process()?.wait_for_log(says, SOON)?;
        Ok(())
    };
    let link_bound = |agent: &Agent| {
        eventually(SOON, "the limit to be felt", || {
            let row = agent.vm("web")?;
            let has = row["pace"]["has_bits"].as_u64();
            Ok((row["pace"]["cause"] == "link-bound" && has.is_some_and(|has| has < 8_000_000)).then_some(()))
        })
    };
    told(&mut agent, &format!("limit = \"4Mbit\"\n{web}"), "limits were read again")?;
    link_bound(&agent)?;
    told(&mut agent, &format!("limit = \"4 bananas\"\n{web}"), "the limits stay as they were")?;
    // A running agent is found whatever its file says; where it was looked for is told.
    let socket = agent.dir().join("run/api.sock");
    let asked = agent.command()?.arg("--socket").arg(&socket).args(["status", "--json"]).output()?;
    ensure!(asked.status.success() && asked.stderr.contains("bananas"), "{asked:?}");
    let lost = agent.command()?.arg("status").output()?;
    let says = |word: &str| lost.stderr.contains(word);
    ensure!(
        !lost.status.success() && says("bananas") && says("--socket") && says("/run/lifeboat-agent/"),
        "{lost:?}"
    );
    agent.configure(&controller.address(), web)?;
    link_bound(&agent)?;
    let window = |from, to| format!("[[site.window]]\nfrom = \"{from}\"\nto = \"{to}\"\nlimit = \"none\"\n");
    let always = window("00:00", "12:00") + &window("12:00", "00:00");
    told(&mut agent, &format!("limit = \"4Mbit\"\n{always}{web}"), "limits were read again")?;
    eventually(SOON, "the pace to recover", || {
        let row = agent.vm("web")?;
        Ok((row["pace"]["cause"] != "link-bound" && row["state"] == "protected").then_some(()))
    })?;
    Ok(())
}

/// Goal: a host that was suspended for a while goes on as if nothing had been: its guest is unharmed, and what the site has
/// is not sent again. Method: all of the site's processes stand until the recovery site has given the link up, twice.
#[test]
fn a_suspended_host_goes_on_with_what_changed_when_it_wakes() -> Result<()> {
    let rig = Rig::new("suspend")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::protecting(&a, &controller, &["web"], "300ms")?;
    let points = controller.wait_points("web", 3, SOON)?;
    let wire = |point: &serde_json::Value| point["wire_bytes"].as_u64().unwrap_or(u64::MAX);
    let full = wire(&points[0]);
    for round in 1..=2 {
        a.suspend_all(true)?;
        let connected = |wanted: bool| {
            eventually(SOON, &format!("connected to be {wanted}"), || {
                Ok((controller.vm("web")?["agent"]["connected"] == wanted).then_some(()))
            })
        };
        let gone = connected(false);
        a.suspend_all(false)?;
        agent.process()?.thaw()?;
        gone?;
        connected(true)?;
        let before = controller.points("web")?.len();
        let points = controller.wait_points("web", before + 3, SOON)?;
        let most = points[before..].iter().map(wire).max().unwrap_or(u64::MAX);
        eprintln!("round {round}: at most {most} bytes for a point, {full} for the first one of all");
        ensure!(2 * most < full, "what was not changed was sent again: {most} of {full}");
        agent.wait_state("web", "protected", SOON)?;
        let report = guest.wait_full_check(SOON)?;
        ensure!(report.unharmed() && report.boot == boot, "{report:?}");
    }
    guest.wait_for_state("running", SOON)?;
    let tick = guest.last().context("it ticked")?.tick;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, tick, SOON)?;
    Ok(())
}

/// Goal: what is empty costs nothing. Method: two disks of a tebibyte, of which the guest uses some megabytes; what the
/// site is sent of them, also when QEMU has forgotten what changed, and what the replica's files take.
#[test]
fn disks_of_a_tebibyte_cost_what_is_in_them() -> Result<()> {
    let rig = Rig::new("tebibyte")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Qcow2, TEBIBYTE_MIB).disk(DiskFormat::Raw, TEBIBYTE_MIB);
    let guest = a.define_and_start(&spec)?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let agent = Agent::protecting(&a, &controller, &["web"], "1s")?;
    let points = controller.wait_points("web", 4, SOON)?;
    let wire: u64 = points.iter().filter_map(|point| point["wire_bytes"].as_u64()).sum();
    ensure!(wire > 0 && wire < 256 << 20, "{wire} bytes were sent");
    // QEMU forgets what changed, and the disks are compared with the site's from end to end.
    guest.destroy()?;
    agent.wait_state("web", "not-running", SOON)?;
    guest.start()?;
    let boot = guest.wait(BOOT, "it to boot again", |report| report.boot != boot && report.tick > 3)?.boot;
    let now = controller.points("web")?.len();
    let points = controller.wait_points("web", now + 2, SOON)?;
    let wire: u64 = points[now..].iter().filter_map(|point| point["wire_bytes"].as_u64()).sum();
    ensure!(wire < 64 << 20, "after a new start {wire} bytes were sent");
    a.power_cut();
    controller.failover("web", "latest")?;
    let replica = b.guest("web")?;
    replica_unharmed(&replica, &boot, 0, SOON)?;
    let taken = taken_below(&controller.replica_dir())?;
    ensure!(taken < 2 << 30, "the replica's files take {taken} bytes");
    drop(agent);
    Ok(())
}

/// Bytes that a folder's files take of the disk.
fn taken_below(folder: &Path) -> Result<u64> {
    let mut taken = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("{}", folder.display()))? {
        let path = entry?.path();
        let data = path.symlink_metadata()?;
        taken += if data.is_dir() { taken_below(&path)? } else { data.blocks() * 512 };
    }
    Ok(taken)
}
