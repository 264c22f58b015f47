//! How a guest's memory is captured is chosen by itself, said with its reason, and never silently left out.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{
    DiskFormat, Guest, Rig, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small, stand_still},
};
use serde_json::Value;
use std::{collections::BTreeSet, fs, path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: a guest whose memory can't be captured has its disks protected, and says why; its operator may have it refused
/// instead. Method: memory that is shared with other processes.
#[test]
fn a_guest_whose_memory_can_not_be_captured_is_protected_without_it_or_refused_as_told() -> Result<()> {
    let rig = Rig::new("no-memory")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let shared = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let spec = small("web").disk(DiskFormat::Raw, 16);
    let guest = a.define_and_start(&spec.clone().more(shared))?;
    guest.wait_for_tick(2, BOOT)?;
    let mut agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let points = controller.wait_points("web", 2, SOON)?;
    assert!(points.iter().all(|point| point["has_memory"] == false), "{points:?}");
    let row = agent.wait_state("web", "protected", SOON)?;
    let told = row["memory"].as_str().unwrap_or_default();
    assert!(told.starts_with("disks only: ") && told.contains("shared with other processes"), "{row}");
    assert!(row["memory_engine"]["engine"].is_null(), "{row}");
    assert_eq!(controller.vm("web")?["agent"]["report"]["memory"], row["memory"]);

    agent.stop()?;
    agent
        .configure(&controller.address(), "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmemory = \"on\"")?;
    agent.start()?;
    let row = agent.wait_state("web", "refused", SOON)?;
    let reason = row["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("shared with other processes") && reason.contains("memory = \"auto\""), "{row}");

    // The guest is changed as told: with its next start it has memory again, whatever the mode.
    guest.destroy()?;
    a.define(&spec)?;
    guest.start()?;
    eventually(SOON, "points with memory", || {
        let points = controller.points("web")?;
        Ok(points.iter().any(|point| point["has_memory"] == true).then_some(()))
    })?;
    let row = agent.wait_state("web", "protected", SOON)?;
    assert!(row["memory_engine"]["engine"].is_string(), "{row}");
    Ok(())
}

const SNAPSHOT: &str =
    "[[vm]]\nname = \"web\"\ninterval = \"300ms\"\nmax_pause = \"5s\"\nmemory_engine = \"snapshot\"";
/// Steps of a snapshot at which the agent dies.
const STEPS: [&str; 7] = ["prepared", "capable", "started", "resumed", "reading", "read", "put-back"];

/// Goal: an agent that dies at any step of a snapshot leaves a guest that runs, and a QEMU as it was found: without its
/// capability, with the operator's. Method: it dies at each step; nobody but its watchdog is there then. Afterwards
/// points go on, and one of them is failed over to.
#[test]
fn an_agent_that_dies_at_any_step_of_a_snapshot_leaves_the_guest_and_its_qemu_as_they_were() -> Result<()> {
    let rig = Rig::new("snapshot-dies")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).as_root())?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    // An operator's choice that a snapshot can't live with.
    let xbzrle = r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"xbzrle","state":true}]}}"#;
    guest.qmp(xbzrle)?;
    let as_found = settings_of(&guest)?;
    let mut agent = Agent::install(&a, &controller, SNAPSHOT)?;
    for step in STEPS {
        // The second snapshot, except that the reading of one passes many times.
        agent.env = killed_at(&format!("snapshot.{step}:2"));
        agent.start()?;
        agent.process()?.wait(SOON).with_context(|| format!("the agent should die at {step}"))?;
        ensure!(agent.process()?.killed_by(Signal::SIGKILL), "at {step} it ended by itself");
        goes_on(&guest).with_context(|| format!("after the agent died at {step}"))?;
        eventually(SOON, &format!("QEMU to be as it was found, after {step}"), || {
            Ok((settings_of(&guest)? == as_found).then_some(()))
        })?;
    }
    agent.start()?;
    controller.wait_more_points("web", 3, SOON)?;
    let row = agent.wait_state("web", "protected", SOON)?;
    assert_eq!(row["memory_engine"]["engine"], "snapshot", "{row}");
    // A guest that its operator has paused stays so, whatever QEMU would do by itself.
    stand_still(&guest, &controller, "web", SOON)?;
    controller.wait_more_points("web", 3, SOON)?;
    assert_eq!(guest.state()?, "paused");
    guest.resume()?;
    controller.wait_more_points("web", 2, SOON)?;
    agent.stop()?;
    assert_eq!(settings_of(&guest)?, as_found);
    goes_on(&guest)?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// Goal: no step is forgotten above. Method: the agent's source is searched for places at which it can be killed.
#[test]
fn every_step_of_a_snapshot_at_which_an_agent_may_die_is_tried() -> Result<()> {
    let mut found = BTreeSet::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/src/capture/memory");
    for file in ["snapshot.rs", "snapshot/follow.rs", "snapshot/sink.rs", "snapshot/room.rs"] {
        let text = fs::read_to_string(folder.join(file))?;
        let steps = text.split("fault::point(\"snapshot.").skip(1).filter_map(|rest| rest.split('"').next());
        found.extend(steps.map(str::to_owned));
    }
    assert_eq!(found, STEPS.map(str::to_owned).into());
    Ok(())
}

/// Migration capabilities and parameters, as QEMU has them now.
fn settings_of(guest: &Guest) -> Result<[Value; 2]> {
    let ask = |command: &str| -> Result<Value> {
        let answer: Value = serde_json::from_str(&guest.qmp(&format!("{{\"execute\":\"{command}\"}}"))?)?;
        let mut settings = answer["return"].clone();
        // An empty mapping is none; QEMU 7.2 shows it once one was ever set.
        if settings["block-bitmap-mapping"].as_array().is_some_and(Vec::is_empty) {
            settings.as_object_mut().and_then(|settings| settings.remove("block-bitmap-mapping"));
        }
        Ok(settings)
    };
    Ok([ask("query-migrate-capabilities")?, ask("query-migrate-parameters")?])
}

/// The guest runs, and proves it.
fn goes_on(guest: &Guest) -> Result<()> {
    let then = guest.last().context("it ticked before")?.tick;
    let report = guest.wait_for_tick(then + 5, SOON)?;
    ensure!(report.unharmed(), "{report:?}");
    guest.wait_for_state("running", SOON)
}
