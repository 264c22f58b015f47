//! `lifeboat prune`: what no rule keeps goes when an operator says so, and nothing else.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Rig, eventually,
    product::{Agent, Controller, id, replica_unharmed, small},
};
use std::{collections::BTreeSet, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: points that no rule keeps are shown, go when that is confirmed, and are refused by name from then on; what is
/// left is as good as before. Method: a working guest, a point each half second under a rule of five seconds; then a
/// power cut, and a failover to the oldest point that is left.
#[test]
fn what_no_rule_keeps_goes_when_asked_and_what_is_left_is_failed_over_to() -> Result<()> {
    let rig = Rig::new("prune")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::install(&b)?;
    controller.configure("keep = [\"all for 5s\"]\n")?;
    controller.start()?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;

    let going = eventually(SOON, "points that no rule keeps", || {
        let shown = controller.json(&["prune", "web", "--dry-run"])?;
        let going: BTreeSet<String> =
            shown["going"].as_array().context("what goes")?.iter().map(id).collect();
        Ok((going.len() >= 3).then_some(going))
    })?;
    let unasked = controller.cli(&["prune", "web"])?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("--yes"), "{unasked:?}");
    let unknown = controller.cli(&["prune", "wob", "--yes"])?;
    ensure!(!unknown.status.success() && unknown.stderr.contains("wob"), "{unknown:?}");
    agent.stop()?;
    let report = controller.json(&["prune", "web", "--yes"])?;
    // The controller may have been a moment earlier; what it took away is not of this report.
    let taken = ["pruned", "pruned_bytes"].map(|key| report[key].as_u64().is_some_and(|value| value > 0));
    ensure!(taken[0] == taken[1], "{report:#}");

    let left = controller.points("web")?;
    ensure!(!left.is_empty() && left.iter().all(|point| !going.contains(&id(point))), "{left:#?}");
    a.power_cut();
    let gone = going.first().context("what went")?;
    let refused = controller.cli(&["failover", "web", "--emergency", "--yes", "--point", gone])?;
    ensure!(!refused.status.success() && refused.stderr.contains("no point"), "{refused:?}");
    controller.failover("web", &id(&left[0]))?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON).map(drop)
}
