//! The way home, with something going wrong at each step of the controller that carries it out. The same command, given again,
//! ends it; the guest never runs twice, and has lost nothing.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::{
    DiskFormat, Site,
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

/// What strikes are made at: `to` is the site that leads, `from` the agent where the VM runs.
struct Ends<'a> {
    to: &'a Site,
    from: &'a mut Agent,
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
    places: &[&str],
    ask: impl Fn(&Controller, &Controller, &[String]) -> Result<rig::Output> + Sync,
    mut strike: impl FnMut(&mut Ends<'_>, &str) -> Result<()>,
) -> Result<()> {
    to.controller.stop()?;
    to.controller.env = frozen_at(places);
    to.controller.start()?;
    let daemon = Freezing::daemon(to.controller.process()?)?;
    let mut ends = Ends { to: &to.site, from: &mut from.agent };
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

/// A command that the site leads where it runs, and the controller of the other one carries out.
fn homeward(
    what: &'static str,
    world: &mut World,
    mut strike: impl FnMut(&mut Ends<'_>, &str) -> Result<()>,
) -> Result<()> {
    let World { home, away, .. } = world;
    home.expect(&["web"])?;
    let reprotect = what == "reprotect";
    let ask = move |_: &Controller, from: &Controller, to: &[String]| {
        let to: Vec<&str> = to.iter().map(String::as_str).collect();
        let agent: &[&str] = if reprotect { &["--agent", "B"] } else { &[] };
        from.cli(&[&[what, "web"], to.as_slice(), agent, &["--yes"]].concat())
    };
    let places: &[&str] = if reprotect { &REPROTECT } else { &PLANNED };
    led_by(home, away, places, ask, |ends, place| {
        if place == REPROTECT[0] && ends.from.process().is_err() {
            ends.from.start()?;
            // It comes up only where libvirt answers.
            eventually(SOON, "the agent to be up", || Ok(ends.from.status().ok()))?;
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

fn libvirt_dies(site: &Site) -> Result<()> {
    site.stop_libvirtd(Signal::SIGKILL)?;
    site.start_libvirtd()
}

/// Goal: what went to the other site is protected back and goes home, wherever libvirtd of the site that it comes to dies.
/// Method: it is killed at each step of both.
#[test]
fn the_way_home_is_finished_wherever_libvirt_dies_at_home() -> Result<()> {
    let (mut world, boot) = world("home-libvirt")?;
    away(&mut world)?;
    for what in ["reprotect", "failback"] {
        homeward(what, &mut world, |ends, _| libvirt_dies(ends.to))?;
    }
    went(&world.home, &world.away, &boot)
}
