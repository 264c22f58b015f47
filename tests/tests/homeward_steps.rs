//! There and home again, with something going wrong at each step of the controller that leads it: libvirtd of either site is
//! killed, both agents are, or the source is lost at one step and is back at the next. The same command, given again, ends it;
//! the guest never runs twice, and has lost nothing.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Link, Site,
    ends::{End, REPROTECT, World},
    eventually,
    product::{Agent, Controller, small},
    strikes::{Freezing, frozen_at, until_done},
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(240);

/// A planned failover, by the controller of the site that the VM goes to.
const PLANNED: [&str; 14] = [
    "planned.begun",
    // Only where one is called off.
    CALLED_OFF,
    "planned.named",
    "failover.begun",
    "failover.disk",
    "planned.restored",
    "planned.committed",
    "group.fenced",
    "failover.restored",
    "failover.defined",
    "failover.starting",
    "failover.started",
    "failover.running",
    "group.running",
];
const CALLED_OFF: &str = "planned.returning";

/// What strikes are made at: `to` is the site that leads, `from` the one where the VM runs.
struct Ends<'a> {
    to: (&'a Site, &'a mut Agent),
    from: (&'a Site, &'a mut Agent),
    link: &'a Link,
}

/// A guest at work at home.
fn world(name: &str) -> Result<(World, String)> {
    let settings = "[[vm]]\nname = \"web\"\ninterval = \"1s\"";
    let spec = small("web").disk(DiskFormat::Raw, 16);
    let world = World::new(name, &[spec], settings)?;
    let boot = world.home.site.guest("web")?.last().context("it ticks")?.boot;
    // Points came while it booted: one that knows its boot is wanted.
    world.away.controller.wait_points("web", 2, SOON)?;
    Ok((world, boot))
}

/// The command is given until it is done, with a strike at each place of the controller at `to`, which it passes once.
fn led_by(
    to: &mut End,
    from: &mut End,
    link: &Link,
    places: &[&str],
    ask: impl Fn(&Controller, &Controller, &[String]) -> Result<rig::Output> + Sync,
    mut strike: impl FnMut(&mut Ends<'_>, &str) -> Result<()>,
) -> Result<()> {
    to.controller.stop()?;
    to.controller.env = frozen_at(places);
    to.controller.start()?;
    let daemon = Freezing::daemon(to.controller.process()?)?;
    let mut ends = Ends { to: (&to.site, &mut to.agent), from: (&from.site, &mut from.agent), link };
    let runs = |site: &Site| -> Result<bool> {
        let running = site.virsh(["list", "--name", "--state-running"])?;
        Ok(running.lines().any(|name| name.trim() == "web"))
    };
    let (there, here) = (&to.site, &from.site);
    let command = || ask(&to.controller, &from.controller, &to.to);
    let look = || {
        // In this order: the source of a replica that runs does not run any more.
        ensure!(!(runs(there)? && runs(here)?), "it runs at both sites");
        Ok(())
    };
    let mut struck = until_done(SOON, &daemon, command, look, |place| strike(&mut ends, place))?;
    let name = |place: &&str| place.split(':').next().unwrap_or_default().to_owned();
    let mut passed: Vec<String> = places.iter().map(name).collect();
    struck.retain(|place| place != CALLED_OFF);
    passed.retain(|place| place != CALLED_OFF);
    if struck != passed {
        // The agent at the other site may have begun to protect it by itself: then no disks are taken in.
        passed.retain(|place| !place.starts_with("seed."));
    }
    ensure!(struck == passed, "it struck at {struck:?}");
    Ok(())
}

fn planned(
    to: &mut End,
    from: &mut End,
    link: &Link,
    strike: impl FnMut(&mut Ends<'_>, &str) -> Result<()>,
) -> Result<()> {
    let ask =
        |to: &Controller, _: &Controller, _: &[String]| to.cli(&["failover", "web", "--planned", "--yes"]);
    led_by(to, from, link, &PLANNED, ask, strike)
}

/// A command that the site leads where it runs, and the controller of the other one carries out.
fn homeward(
    what: &'static str,
    world: &mut World,
    mut strike: impl FnMut(&mut Ends<'_>, &str) -> Result<()>,
) -> Result<()> {
    let World { home, away, link, .. } = world;
    home.expect(&["web"])?;
    let reprotect = what == "reprotect";
    let ask = move |_: &Controller, from: &Controller, to: &[String]| {
        let to: Vec<&str> = to.iter().map(String::as_str).collect();
        let agent: &[&str] = if reprotect { &["--agent", "B"] } else { &[] };
        from.cli(&[&[what, "web"], to.as_slice(), agent, &["--yes"]].concat())
    };
    let places: &[&str] = if reprotect { &REPROTECT } else { &PLANNED };
    led_by(home, away, link, places, ask, |ends, place| {
        if place == REPROTECT[0] && ends.from.1.process().is_err() {
            ends.from.1.start()?;
            // It comes up only where libvirt answers.
            eventually(SOON, "the agent to be up", || Ok(ends.from.1.status().ok()))?;
        }
        strike(ends, place)
    })
}

/// It runs at `to`, went on where it stood at `from`, and is off there.
fn went(to: &End, from: &End, boot: &str) -> Result<()> {
    eventually(SOON, "it to be off where it was", || {
        Ok((from.site.guest("web")?.state()? == "shut off").then_some(()))
    })?;
    to.has(&["web"], &[boot.to_owned()], from)
}

/// There, without a strike. The agent there is off: it is to protect nothing before it is handed over.
fn away(world: &mut World) -> Result<()> {
    world.away.agent.stop()?;
    world.away.controller.json(&["failover", "web", "--planned", "--yes"])?;
    Ok(())
}

/// There, without a strike, and home again, with `strike` at each step of both commands.
fn home_again(name: &str, mut strike: impl FnMut(&mut Ends<'_>, &str) -> Result<()>) -> Result<()> {
    let (mut world, boot) = world(name)?;
    away(&mut world)?;
    for what in ["reprotect", "failback"] {
        homeward(what, &mut world, &mut strike)?;
    }
    went(&world.home, &world.away, &boot)
}

/// Goal: what went to the other site is protected back and goes home, wherever libvirtd of the site that it comes to dies.
/// Method: it is killed at each step of both.
#[test]
fn the_way_home_is_finished_wherever_libvirt_dies_at_home() -> Result<()> {
    home_again("home-libvirt", |ends, _| ends.to.0.crash_libvirtd())
}

/// Goal: the same of the site that it leaves. Method: as above.
#[test]
fn the_way_home_is_finished_wherever_libvirt_dies_where_the_vm_runs() -> Result<()> {
    home_again("away-libvirt", |ends, _| ends.from.0.crash_libvirtd())
}

/// Goal: a VM goes to the other site and home, wherever the agents of both die. Method: both are killed, and started again,
/// at each step of a planned failover, a reprotect and a failback.
#[test]
fn there_and_home_again_is_finished_wherever_both_agents_die() -> Result<()> {
    let (mut world, boot) = world("agents-die")?;
    let die = |ends: &mut Ends<'_>, _: &str| {
        for agent in [&mut *ends.to.1, &mut *ends.from.1] {
            agent.kill9()?;
            agent.start()?;
        }
        Ok(())
    };
    let World { home, away, link, .. } = &mut world;
    planned(away, home, link, die)?;
    went(away, home, &boot)?;
    homeward("reprotect", &mut world, die)?;
    homeward("failback", &mut world, die)?;
    went(&world.home, &world.away, &boot)
}

/// Whether something is so at a place, if it is at every second one. It never is at the last of a command, nor where that is
/// called off: both come to an end only if they can be told.
fn every_second(place: &str, first: usize) -> bool {
    let ends = [CALLED_OFF, PLANNED[PLANNED.len() - 1], REPROTECT[REPROTECT.len() - 1]];
    let mut places = PLANNED.iter().filter(|place| **place != CALLED_OFF).chain(&REPROTECT);
    let at = places.position(|of| of.split(':').next() == Some(place));
    !ends.contains(&place) && at.is_some_and(|at| at % 2 == first)
}

/// The source's agent dies, and is there again at the next place.
fn away_and_back(ends: &mut Ends<'_>, is_away: bool) -> Result<()> {
    ends.from.1.kill9()?;
    if is_away { Ok(()) } else { ends.from.1.start() }
}

/// Goal: a source that is lost at any step of a planned failover and comes back at the next never runs beside its replica;
/// what was called off as it was away is done when it is given again. Method: the source's agent dies at one step and comes
/// back at the next, both ways round; the controller does not notice at once that it is gone.
#[test]
fn a_source_may_go_and_come_back_at_each_step_of_a_planned_failover() -> Result<()> {
    goes_and_comes_there(0)
}

#[test]
fn a_source_may_come_back_and_go_at_each_step_of_a_planned_failover() -> Result<()> {
    goes_and_comes_there(1)
}

fn goes_and_comes_there(first: usize) -> Result<()> {
    let (mut world, boot) = world(&format!("planned-back{first}"))?;
    let World { home, away, link, .. } = &mut world;
    planned(away, home, link, |ends, place| away_and_back(ends, every_second(place, first)))?;
    went(away, home, &boot)
}

/// Goal: the same on the way home.
#[test]
fn a_source_may_go_and_come_back_at_each_step_of_the_way_home() -> Result<()> {
    home_again("failback-back0", |ends, place| away_and_back(ends, every_second(place, 0)))
}

#[test]
fn a_source_may_come_back_and_go_at_each_step_of_the_way_home() -> Result<()> {
    home_again("failback-back1", |ends, place| away_and_back(ends, every_second(place, 1)))
}

/// Goal: a line that breaks at any step of a failover there and home, and is mended at the next, costs neither the guest nor
/// the failover anything. Method: it is cut at every second step, and whole again at the next.
#[test]
fn a_line_may_break_and_be_mended_at_each_step_there_and_home_again() -> Result<()> {
    let (mut world, boot) = world("line-steps")?;
    let cut = |ends: &mut Ends<'_>, place: &str| {
        if every_second(place, 0) { ends.link.cut() } else { ends.link.restore() }
    };
    let World { home, away, link, .. } = &mut world;
    planned(away, home, link, cut)?;
    went(away, home, &boot)?;
    for what in ["reprotect", "failback"] {
        homeward(what, &mut world, cut)?;
    }
    went(&world.home, &world.away, &boot)
}
