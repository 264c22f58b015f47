//! A completed failover is taken to another point: the VM goes on from there, and what the replica did meanwhile is kept.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Rig,
    product::{Agent, Controller, id, killed_at, replica_unharmed, small},
};
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: within the window a failover is taken to an older point, whole as it was, wherever the controller dies; the disks of
/// the replica that ran stay as they were. Method: a working guest; its counter tells which point it is. The controller is
/// killed when the replica was stopped, and when the other point was named.
#[test]
fn a_failover_is_taken_to_an_older_point_and_what_the_replica_did_is_kept_aside() -> Result<()> {
    let rig = Rig::new("undo")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let older = controller.wait_points("web", 2, SOON)?.pop().context("two points")?;
    let then = guest.last().context("it ticks")?;
    guest.wait_for_tick(then.tick + 30, SOON)?;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();

    let none = controller.cli(&["undo", "web", "--point", &id(&older), "--yes"])?;
    ensure!(!none.status.success() && none.stderr.contains("no failover"), "{none:?}");
    controller.failover("web", "latest")?;
    let replica = b.guest("web")?;
    let newest = replica_unharmed(&replica, &then.boot, then.tick, SOON)?;
    let console = replica.console().path().to_owned();
    let disks = b.virsh(["domblklist", "web"])?;

    let unasked = controller.cli(&["undo", "web", "--point", &id(&older)])?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("SET ASIDE"), "{unasked:?}");
    replica.wait_for_state("running", SOON)?;

    for step in ["undo.stopped", "undo.named"] {
        controller.stop()?;
        controller.env = killed_at(step);
        controller.start()?;
        let broken = controller.cli(&["undo", "web", "--point", &id(&older), "--yes"])?;
        ensure!(!broken.status.success(), "{step}: {broken:?}");
        controller.kill9()?;
        ensure!(replica.state()? == "shut off", "{step}: {}", replica.state()?);
        controller.env = Vec::new();
        controller.start()?;
    }
    fs::write(&console, "").context("forgetting what it said before")?;
    let report = controller.json(&["undo", "web", "--point", &id(&older), "--yes"])?;
    ensure!(report["point"] == older["point"] && report["resumed"] == true, "{report}");
    replica.wait(SOON, "the replica to report", |_| true)?;
    let first = replica.console().reports().remove(0);
    ensure!(first.tick <= then.tick + 2 && first.tick < newest.tick, "{first:?}, {then:?}, {newest:?}");
    replica_unharmed(&replica, &then.boot, first.tick, SOON)?;

    let now = b.virsh(["domblklist", "web"])?;
    let file = |list: &str| list.split_whitespace().find(|word| word.ends_with(".raw")).map(str::to_owned);
    let (before, now) = (file(&disks).context("its disk")?, file(&now).context("its disk")?);
    ensure!(before != now && b.host_path(&before)?.exists(), "{before} is not kept beside {now}");
    Ok(())
}
