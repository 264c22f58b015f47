//! What the site has acknowledged stays, whatever happens to the controller and its disk; and what is damaged is found
//! out before anything is built on it.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{
    DiskFormat, Rig, eventually,
    product::{Agent, Controller, id, killed_at, replica_unharmed, small},
};
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: I-2. Method: kill the controller in the middle of taking, committing and acknowledging a point; compare what it
/// holds afterwards with what it had listed and what the agent had been told.
#[test]
fn nothing_acknowledged_is_lost_when_the_controller_dies_in_a_commit() -> Result<()> {
    let rig = Rig::new("commit")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;
    controller.stop()?;
    for place in ["intake.append:9", "intake.commit:2", "intake.committed:2"] {
        controller.env = killed_at(place);
        controller.start()?;
        let listed: Vec<String> = controller.points("web").unwrap_or_default().iter().map(id).collect();
        died(&mut controller, place)?;
        let told = agent.acknowledged()?;
        controller.start()?;
        let held = controller.points("web")?;
        for point in listed.iter().chain(&told) {
            let found = held.iter().find(|held| id(held) == *point);
            ensure!(found.is_some_and(|point| point["state"] == "ok"), "{place}: {point} is lost: {held:?}");
        }
        controller.wait_more_points("web", 2, SOON)?;
        controller.stop()?;
    }
    controller.start()?;
    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    let before = guest.last().context("it ticks")?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &before.boot, 0, SOON)?;
    Ok(())
}

/// Goal: a failover that is interrupted goes on. Method: one failover whose controller dies at every step there is, each
/// time started again and asked again; nothing runs before the step that starts it, and the replica then tells whether it
/// was harmed.
#[test]
fn a_failover_goes_on_wherever_its_controller_died() -> Result<()> {
    let rig = Rig::new("runbook")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 3, SOON)?;
    let before = guest.last().context("it ticks")?;
    a.power_cut();
    controller.stop()?;
    for step in ["begun", "fenced", "disk", "restored", "defined", "starting", "started", "running"] {
        controller.env = killed_at(&format!("failover.{step}"));
        controller.start()?;
        let answer = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
        ensure!(!answer.status.success() && answer.stderr.contains("again"), "{step}: {answer:?}");
        died(&mut controller, step)?;
        let running = b.virsh(["list", "--name"])?.contains("web");
        assert_eq!(running, ["started", "running"].contains(&step), "at {step}");
    }
    controller.start()?;
    let report = controller.failover("web", "latest")?;
    assert_eq!(report["already_done"], true, "{report}");
    replica_unharmed(&b.guest("web")?, &before.boot, 0, SOON)?;
    Ok(())
}

/// Goal: a full site is said to be full, costs the guest nothing, and is no more once there is room; and a site whose
/// store is full but for its reserve can still be failed over to.
#[test]
fn a_full_store_is_shown_harms_no_guest_and_goes_on_when_there_is_room() -> Result<()> {
    let rig = Rig::new("store-full")?;
    let (a, b, _link) = rig.pair()?;
    let store = b.dir("lb/data")?;
    b.limit_store(&store, 512 << 20)?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;
    b.fill(&store)?;
    let row = agent.wait_state("web", "degraded", SOON)?;
    assert!(row["reason"].as_str().is_some_and(|reason| reason.contains("full")), "{row}");
    eventually(SOON, "the site to show it as well", || {
        let seen = controller.vm("web")?;
        Ok((seen["agent"]["report"]["state"] == "degraded").then_some(()))
    })?;
    let then = guest.last().context("it ticks")?;
    let held = controller.points("web")?;
    guest.wait_for_tick(then.tick + 20, SOON)?;
    b.unfill(&store)?;
    let now = controller.wait_more_points("web", 2, SOON)?;
    // How much a point takes in the store may change: it is folded.
    let ids = |points: &[serde_json::Value]| points.iter().map(id).collect::<Vec<_>>();
    assert!(
        ids(&now).starts_with(&ids(&held)),
        "what was acknowledged is still there: {held:?}, now {now:?}"
    );
    agent.wait_state("web", "protected", SOON)?;
    assert_eq!(controller.json(&["verify", "web"])?["findings"], serde_json::json!([]));
    b.fill(&store)?;
    agent.wait_state("web", "degraded", SOON)?;
    a.power_cut();
    b.run(["truncate", "--size=-512K", &store.join(".filler").to_string_lossy()])?;
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &then.boot, then.tick, SOON)?;
    Ok(())
}

/// Goal: damage is found, named, and never given to a replica. Method: one byte of the newest point's pack is flipped on
/// disk, in its pages: a flip in the copies of their heads, which nothing reads, is found as well, and harms no point. The
/// newest is the fifth, because the fourth is folded: its failover may then need nothing of its own pack.
#[test]
fn a_flipped_byte_is_found_and_refused_and_an_older_point_still_works() -> Result<()> {
    let rig = Rig::new("flipped-byte")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "2s")?;
    controller.wait_points("web", 5, SOON)?;
    a.power_cut();
    let before = guest.last().context("it ticked")?;
    let points = controller.points("web")?;
    let [.., older, newest] = points.as_slice() else { anyhow::bail!("few points: {points:?}") };
    assert_eq!(newest["seq"], 5, "{points:?}");
    let (pack, _) = controller.newest_packs()?;
    let whole = fs::read(&pack)?;
    let name = pack.file_name().context("a name")?.to_string_lossy().into_owned();
    // Longer than a head, so that no two flips in a row are in heads unless frames are tiny.
    let mut flips = (whole.len() / 2..whole.len()).step_by(101).take(10);
    let found = loop {
        let mut bytes = whole.clone();
        bytes[flips.next().context("no byte of the pages was met")?] ^= 1;
        fs::write(&pack, bytes)?;
        let found = controller.cli(&["verify", "--json"])?;
        assert_eq!(found.status.code(), Some(3), "{found:?}");
        assert!(found.stdout.contains(&name) && found.stdout.contains(&id(newest)), "{found:?}");
        if !found.stdout.contains("every page in it is whole") {
            break found;
        }
    };

    let refused = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    assert!(!refused.status.success() && refused.stderr.contains("damaged"), "{refused:?}\n{found:?}");
    assert!(b.virsh(["list", "--all", "--name"])?.trim().is_empty(), "nothing was defined or started");
    let report = controller.failover("web", &id(older))?;
    assert_eq!(report["point"], older["point"]);
    replica_unharmed(&b.guest("web")?, &before.boot, 0, SOON)?;
    Ok(())
}

/// Waits until the controller was killed, as it was told to be.
fn died(controller: &mut Controller, place: &str) -> Result<()> {
    let process = controller.process()?;
    process.wait(SOON).with_context(|| format!("the controller should die at {place}"))?;
    ensure!(process.killed_by(Signal::SIGKILL), "at {place} it ended by itself");
    Ok(())
}
