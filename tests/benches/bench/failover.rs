//! How long failovers take: a group of four small guests beside one guest alone; and what a drill costs the group's RPO.

use crate::{
    rows::Rows,
    scene::{PATIENCE, p99, rpo_peaks},
};
use anyhow::{Context, Result};
use rig::{
    DiskFormat, GuestSpec, Rig, Shape, eventually,
    product::{Agent, Controller, small},
};

pub fn measure(rows: &mut Rows) -> Result<()> {
    let rig = Rig::new("bench-failover")?;
    let (source, site) = (rig.site("A")?, rig.site("B")?);
    rig.link(&source, &site, Shape::mbit(1000))?;
    let controller = Controller::running(&site)?;
    let mut agent = Agent::install(&source, &controller, "[defaults]\nmax_pause = \"5s\"")?;
    agent.start()?;
    for name in FOUR.iter().chain([&ALONE]) {
        // They do little: what is measured is the failover, and not who else has the cores.
        let spec: GuestSpec = small(name).disk(DiskFormat::Qcow2, 32).idle();
        source.define_and_start(&spec)?.wait_for_tick(2, PATIENCE)?;
    }
    let one = [&["group", "create", "one", "--rpo", "4s"][..], &["--vm", ALONE]].concat();
    let members: Vec<&str> = FOUR.iter().flat_map(|name| ["--vm", name]).collect();
    let four = [&["group", "create", "four", "--rpo", "4s"][..], &members].concat();
    for command in [one, four] {
        eventually(PATIENCE, "a group to be made", || {
            Ok(controller.cli(&command)?.status.success().then_some(()))
        })?;
    }
    controller.wait_more_group_points("one", 3, PATIENCE)?;
    controller.wait_more_group_points("four", POINTS, PATIENCE)?;

    let before = worst_rpo(&controller, POINTS)?;
    let drilled_from = controller.group_points("four")?.len();
    let drill = controller.json(&["drill", "four"])?;
    let meanwhile = controller.group_points("four")?.len().saturating_sub(drilled_from).max(2);
    let during = worst_rpo(&controller, meanwhile)?;
    let note = format!(
        "p99 {during:.2} s over the {meanwhile} points of a drill of four guests, {before:.2} s before it; they share this \
         machine's cores; limit: no longer than before"
    );
    rows.add("group_rpo_in_drill_over_before", during / before.max(0.001), "x", 1.0, note);

    source.power_cut();
    let rto = |name: &str| -> Result<f64> {
        let report = controller.json(&["failover", name, "--emergency", "--yes"])?;
        Ok(report["rto_ms"].as_u64().with_context(|| format!("no RTO in {report}"))? as f64 / 1e3)
    };
    let (one, four) = (rto("one")?, rto("four")?);
    let note = format!(
        "one {one:.2} s, four {four:.2} s, of 4 small guests each with a disk; drill of the four: {:.2} s; limit: the aim",
        drill["rto_ms"].as_u64().unwrap_or_default() as f64 / 1e3
    );
    rows.add("rto_group_of_4_over_1", four / one.max(0.001), "x", 2.0, note);
    Ok(())
}

/// Of the group's newest points: the RPO at its worst between two, of whichever member is worst.
fn worst_rpo(controller: &Controller, points: usize) -> Result<f64> {
    let mut worst = 0f64;
    for name in FOUR {
        let all = controller.points(name)?;
        worst = worst.max(p99(&rpo_peaks(&all[all.len().saturating_sub(points + 1)..])));
    }
    Ok(worst)
}

const FOUR: [&str; 4] = ["web", "app", "db", "mail"];
const ALONE: &str = "alone";
const POINTS: usize = 12;
