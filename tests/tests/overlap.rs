//! Points that overlap: over a long line the next one is cut while the last one travels.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, LongLine, Rig, eventually,
    product::{Agent, Controller, id, replica_unharmed, small},
};
use serde_json::Value;
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[[vm]]\nname = \"web\"\ninterval = \"200ms\"";
/// One way. A point takes two round trips, and as many bytes as it has.
const DELAY: Duration = Duration::from_millis(400);

/// Points that were cut before the one that they build on was durable. Both clocks are this machine's.
fn overlapping(points: &[Value]) -> usize {
    let mut points: Vec<_> = points.iter().collect();
    points.sort_by_key(|point| point["seq"].as_u64());
    let ms = |point: &Value, what: &str| point[what].as_u64().unwrap_or_default();
    points.windows(2).filter(|pair| ms(pair[1], "cut_at") < ms(pair[0], "committed_at")).count()
}

/// Goal: a long line does not keep the next point from being cut, and nothing is lost by that. Method: points that are cut
/// before the one before is durable are counted; then the agent is killed while two are under way, the site is killed,
/// and the source is lost: the replica says whether all that was acknowledged is there.
#[test]
fn over_a_long_line_points_are_cut_while_others_travel_and_none_is_lost() -> Result<()> {
    let rig = Rig::new("overlap")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(
        &small("web").disk(DiskFormat::Raw, 16).disk(DiskFormat::Qcow2, 16).disk_writes(8),
    )?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    let line = LongLine::open(&b, 7444, 7443, DELAY)?;
    agent.configure(&line.address(), WEB)?;
    agent.start()?;
    eventually(SOON, "points to overlap", || {
        Ok((overlapping(&controller.points("web").unwrap_or_default()) >= 3).then_some(()))
    })?;

    let two_under_way = |agent: &Agent| {
        eventually(SOON, "two points to be under way", || {
            Ok(agent.vm("web").ok().filter(|row| row["under_way"] == 2))
        })
    };
    two_under_way(&agent)?;
    agent.kill9()?;
    agent.start()?;
    controller.wait_more_points("web", 3, SOON)?;

    two_under_way(&agent)?;
    controller.kill9()?;
    controller.start()?;
    controller.wait_more_points("web", 3, SOON)?;
    let row = two_under_way(&agent)?;
    ensure!(row["durable"].is_object(), "{row}");

    let then = guest.last().context("it ticks")?;
    let now = controller.wait_more_points("web", 4, SOON)?;
    agent.kill9()?;
    for told in agent.acknowledged()? {
        ensure!(
            now.iter().chain(&controller.points("web")?).any(|point| id(point) == told),
            "{told} is lost"
        );
    }
    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, then.tick, SOON)?;
    Ok(())
}
