//! A guest that changes more than the line carries: protection goes on, says what it lacks, and costs what changed, once.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Rig, Shape, eventually,
    product::{Agent, Controller, id, small, stand_still},
};
use serde_json::Value;
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(180);
const WEB: &str = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"5s\"";
const LINE: u64 = 4_000_000;

/// Goal: back-pressure tells. Method: far more changed memory than a line of 4 Mbit/s carries at two points a second;
/// what both status commands say of it; then the guest stands still.
#[test]
fn a_guest_that_outruns_the_link_stays_protected_and_both_ends_say_what_it_lacks() -> Result<()> {
    let rig = Rig::new("link-bound")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").dirty_kib(2048))?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;
    link.reshape(Shape::mbit(LINE / 1_000_000))?;
    // Until those that the faster line carried, some of them under way just now, are no longer among what is judged.
    controller.wait_more_points("web", 6, SOON)?;
    let row = eventually(SOON, "the agent to call itself link-bound", || {
        Ok(agent.vm("web").ok().filter(|row| row["pace"]["cause"] == "link-bound"))
    })?;
    let pace = &row["pace"];
    let number = |key: &str| pace[key].as_u64().with_context(|| format!("{key}: {pace}"));
    let (needs, has, every, rpo) =
        (number("needs_bits")?, number("has_bits")?, number("every_ms")?, number("rpo_ms")?);
    ensure!(has > LINE / 4 && has < LINE * 3 / 2, "the line carries {LINE}: {pace}");
    ensure!(needs > has && needs < 40 * LINE, "{pace}");
    ensure!(every > 500 && rpo >= every, "{pace}");
    assert_eq!(row["state"], "protected", "{row}");
    let told = agent.command()?.args(["status"]).run()?;
    ensure!(told.contains("link-bound, needs ") && told.contains("bit/s, has "), "{told}");
    eventually(SOON, "the site to say so too", || {
        let row = controller.vm("web")?;
        let reason = row["agent"]["report"]["reason"].as_str().unwrap_or_default();
        Ok(reason.contains("link-bound, needs ").then_some(()))
    })?;
    // Points go on meanwhile, and once the load stops they come in time again.
    controller.wait_more_points("web", 2, SOON)?;
    stand_still(&guest, &controller, "web", SOON)?;
    eventually(SOON, "the pace to recover", || {
        let row = agent.vm("web")?;
        let well = row["pace"].is_null() && row["reason"].is_null() && row["state"] == "protected";
        Ok((well && row["rpo_ms"].as_u64().is_some_and(|ms| ms < every)).then_some(()))
    })?;
    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    Ok(())
}

/// Goal: a line that was down for a while costs the changed blocks once. Method: it is down until the agent has put its
/// point back; what the line carries afterwards against what the points hold that came of it.
#[test]
fn a_link_that_was_down_for_a_while_costs_what_changed_once() -> Result<()> {
    let rig = Rig::new("link-down")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Qcow2, 32).fill_mib(24).memory_mib(168).dirty_kib(512);
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    let first = controller.wait_points("web", 3, SOON)?;
    link.reshape(Shape::mbit(2))?;
    controller.wait_more_points("web", 1, SOON)?;
    link.cut()?;
    eventually(SOON, "the point under way to be put back", || {
        Ok(agent.vm("web").ok().filter(|row| row["points_lost"].as_u64() > Some(0)))
    })?;
    let held = controller.points("web")?;
    let then = guest.last().context("it ticks")?.tick;
    guest.wait_for_tick(then + 20, SOON)?;
    let before = link.bytes()?.a_to_b;
    link.reshape(Shape::default())?;
    let now = controller.wait_points("web", held.len() + 2, SOON)?;
    // Nothing is under way while these are counted.
    agent.stop()?;
    let carried = link.bytes()?.a_to_b - before;
    let now = controller.points("web").unwrap_or(now);
    let wire = |point: &Value| point["wire_bytes"].as_u64().unwrap_or(u64::MAX);
    let new: Vec<&Value> = now.iter().filter(|point| !held.iter().any(|old| id(old) == id(point))).collect();
    let sum: u64 = new.iter().map(|point| wire(point)).sum();
    let largest = new.iter().map(|point| wire(point)).max().unwrap_or(0);
    // What was on its way when the agent was stopped is in no point.
    ensure!(carried < sum + sum / 4 + largest + (256 << 10), "{carried} bytes for points of {sum}");
    ensure!(largest < wire(&first[0]) / 2, "{largest} is not a delta beside {}", wire(&first[0]));
    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    Ok(())
}
