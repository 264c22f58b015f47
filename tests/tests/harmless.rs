//! First do no harm: whatever happens to the agent, libvirt or the guest itself, the guest goes on, and so does its
//! protection.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{
    DiskFormat, Guest, Rig, Shape, eventually,
    product::{Agent, Controller, killed_at, left_in_qemu, replica_unharmed, small},
};
use serde_json::Value;
use std::{collections::BTreeSet, fs, path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[defaults]\ninterval = \"300ms\"\nmax_pause = \"2s\"\n[[vm]]\nname = \"web\"";

/// Steps of a cut that each point passes: the agent dies in the second one, which builds on the first.
const STEPS: [&str; 16] = [
    "begin",
    "disks-prepared",
    "marked-pausing",
    "stopped",
    "memory-read",
    "device-saved",
    "disks-marked",
    "resumed",
    "views-open",
    "reading",
    "half-sent",
    "sent",
    "before-settle",
    "half-settled",
    "settled",
    "head-read",
];
/// Steps of the first look at a guest's memory, which an agent takes once.
const FIRST_STEPS: [&str; 2] = ["head-open", "braked"];
/// Steps of the memory engine soft-dirty, which runs where the host's kernel has the flags it needs.
const SOFT_DIRTY_STEPS: [&str; 2] = ["pages-compared", "flags-cleared"];

/// Goal: the agent may die at any instant. Method: it does, at each step of a cut; each time the guest must run on, and
/// the next agent must make a point over what the dead one left. The replica then says whether all of that was right.
#[test]
fn an_agent_that_dies_at_any_step_of_a_cut_harms_neither_guest_nor_points() -> Result<()> {
    let rig = Rig::new("agent-dies")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    let first = FIRST_STEPS.map(|step| format!("cut.{step}:1"));
    let every = STEPS.map(|step| format!("cut.{step}:2"));
    agent.start()?;
    controller.wait_points("web", 1, SOON)?;
    let flagged = agent.vm("web")?["memory_engine"]["engine"] == "soft-dirty";
    agent.kill9()?;
    let flagged = SOFT_DIRTY_STEPS.map(|step| format!("cut.{step}:2")).into_iter().filter(|_| flagged);
    let flagged: Vec<String> = flagged.collect();
    for place in first.iter().chain(&every).chain(&flagged) {
        agent.env = killed_at(place);
        agent.start()?;
        agent.process()?.wait(SOON).with_context(|| format!("the agent should die at {place}"))?;
        ensure!(agent.process()?.killed_by(Signal::SIGKILL), "at {place} it ended by itself");
        goes_on(&guest).with_context(|| format!("after the agent died at {place}"))?;
    }
    let before = controller.points("web")?.len();
    ensure!(before >= every.len() - 1, "each agent made a point before it died; there are {before}");
    agent.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// Goal: no step is forgotten above. Method: the agent's source is searched for places at which it can be killed.
#[test]
fn every_step_of_a_cut_at_which_an_agent_may_die_is_tried() -> Result<()> {
    let mut found = BTreeSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let steps = text.split("fault::point(\"cut.").skip(1).filter_map(|rest| rest.split('"').next());
            found.extend(steps.map(str::to_owned));
        }
    }
    let tried = STEPS.iter().chain(&FIRST_STEPS).chain(&SOFT_DIRTY_STEPS).map(|step| (*step).to_owned());
    assert_eq!(found, tried.collect());
    Ok(())
}

/// Goal: a pause ends by itself. Method: the agent is frozen right after it stopped the guest, and never thawed.
#[test]
fn an_agent_that_hangs_in_the_pause_does_not_hold_the_guest() -> Result<()> {
    let rig = Rig::new("agent-hangs")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.env = vec![("LIFEBOAT_STOP_AT".into(), "cut.stopped:2".into())];
    agent.start()?;
    let pid = agent.process()?.pid_in_host()?;
    eventually(SOON, "the agent to hang", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        Ok(stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')).then_some(()))
    })?;
    goes_on(&guest)?;
    agent.kill9()?;
    agent.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    agent.wait_state("web", "protected", SOON)?;
    Ok(())
}

/// Goal: an agent that is told to stop leaves a guest as it found it. Method: a point that takes long is under way over
/// a slow link; afterwards QEMU is asked for jobs, exports and nodes of ours.
#[test]
fn an_agent_that_is_stopped_in_mid_point_leaves_nothing_behind() -> Result<()> {
    let rig = Rig::new("agent-stops")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    link.reshape(Shape::mbit(2))?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    let began = link.bytes()?.a_to_b;
    eventually(SOON, "a point to be under way", || {
        Ok((link.bytes()?.a_to_b > began + 500_000).then_some(()))
    })?;
    assert!(controller.points("web").unwrap_or_default().is_empty(), "it is still under way");
    let process = agent.process()?;
    process.term()?;
    let ended = process.wait(SOON)?;
    assert!(ended.success(), "{ended}");
    goes_on(&guest)?;
    assert_eq!(left_in_qemu(&guest)?, Vec::<String>::new());
    link.reshape(Shape::default())?;
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;
    agent.stop()?;
    assert_eq!(left_in_qemu(&guest)?, Vec::<String>::new());
    Ok(())
}

/// Goal: what an agent that died left in a guest's QEMU does not stand in its operator's way for long, and what is owed is
/// still known. Method: kill it at steps that leave most, take the site away, start the next one, and save the guest.
#[test]
fn what_a_killed_agent_left_is_taken_away_by_the_next_one_even_without_a_site() -> Result<()> {
    let rig = Rig::new("agent-left")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    for place in ["cut.braked:1", "cut.disks-marked:2", "cut.reading:2"] {
        agent.env = killed_at(place);
        agent.start()?;
        agent.process()?.wait(SOON).with_context(|| format!("the agent should die at {place}"))?;
        ensure!(!left_in_qemu(&guest)?.is_empty(), "nothing was left at {place}");
        controller.stop()?;
        agent.start()?;
        eventually(SOON, &format!("what was left at {place} to be taken away"), || {
            Ok(left_in_qemu(&guest)?.is_empty().then_some(()))
        })?;
        controller.start()?;
        agent.kill9()?;
    }
    let points = controller.points("web")?;
    agent.start()?;
    let next = controller.wait_more_points("web", 1, SOON)?;
    let wire = |point: &Value| point["wire_bytes"].as_u64().with_context(|| format!("{point}"));
    ensure!(2 * wire(&next[points.len()])? < wire(&points[0])?, "what is owed was forgotten: {next:?}");

    agent.kill9()?;
    agent.env = killed_at("cut.reading:2");
    agent.start()?;
    agent.process()?.wait(SOON).context("the agent should die in a cut")?;
    controller.stop()?;
    agent.start()?;
    eventually(SOON, "QEMU to be free", || Ok(left_in_qemu(&guest)?.is_empty().then_some(())))?;
    a.virsh(["save", "web", "/var/lib/libvirt/images/web.save"])?;
    a.virsh(["restore", "/var/lib/libvirt/images/web.save"])?;
    controller.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// Goal: libvirt may restart, or crash, at any time.
#[test]
fn protection_goes_on_when_libvirt_is_restarted() -> Result<()> {
    let rig = Rig::new("libvirtd")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let agent = Agent::protecting(&a, &controller, &["web"], "300ms")?;
    controller.wait_points("web", 2, SOON)?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        a.stop_libvirtd(signal)?;
        let then = guest.last().context("it ticks")?.tick;
        guest.wait_for_tick(then + 10, SOON)?;
        a.start_libvirtd()?;
        controller.wait_more_points("web", 2, SOON)?;
        agent.wait_state("web", "protected", SOON)?;
    }
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// Goal: a guest may be reset, or powered off and on, at any time: its points are of the guest as it is then.
#[test]
fn points_of_a_guest_that_was_reset_or_restarted_are_whole() -> Result<()> {
    let rig = Rig::new("reset")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).machine("q35"))?;
    let mut boot = guest.wait_for_tick(3, BOOT)?.boot;
    let agent = Agent::protecting(&a, &controller, &["web"], "300ms")?;
    controller.wait_points("web", 2, SOON)?;
    for how in ["reset", "reset", "off and on"] {
        if how == "reset" {
            a.virsh(["reset", "web"])?;
        } else {
            guest.destroy()?;
            guest.start()?;
        }
        let after = guest.wait(BOOT, "the guest to boot anew", |report| report.boot != boot)?;
        boot = after.boot;
        controller.wait_more_points("web", 2, SOON)?;
        agent.wait_state("web", "protected", SOON)?;
    }
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// The guest runs, and proves it.
fn goes_on(guest: &Guest) -> Result<()> {
    let then = guest.last().context("it ticked before")?.tick;
    let report = guest.wait_for_tick(then + 5, SOON)?;
    ensure!(report.unharmed(), "{report:?}");
    guest.wait_for_state("running", SOON)
}
