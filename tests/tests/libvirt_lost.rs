//! libvirtd dies in the middle of failovers, at the site and at the source. Guests are not its children and outlive it; a
//! failover goes on, or is called off and can be given again, and the guest never runs twice.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, Site, eventually,
    product::{Agent, Controller, replica_unharmed, small},
    strikes::{Freezing, frozen_at, until_done},
};
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// A guest at work at A, and the site that it is protected to.
struct Scene {
    a: Site,
    b: Site,
    controller: Controller,
    agent: Agent,
    guest: Guest,
    boot: String,
    _link: Link,
    _rig: Rig,
}

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16))?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
        controller.wait_points("web", 2, SOON)?;
        Ok(Self { a, b, controller, agent, guest, boot, _link: link, _rig: rig })
    }

    /// The failover is asked for until it is done, while `daemon` freezes itself at each of its places; at each, libvirtd of
    /// `host` is killed and started again before the daemon goes on. How often it struck.
    fn strikes_until_done(&self, how: &str, daemon: &Freezing, host: &Site) -> Result<usize> {
        let mut last_words = None;
        let look = || {
            // The source says nothing more once its replica has spoken.
            if self.b.guest("web")?.last().is_some() {
                let said = self.guest.last().map(|report| report.tick);
                ensure!(*last_words.get_or_insert(said) == said, "the source runs beside its replica");
            }
            Ok(())
        };
        let command = || self.controller.cli(&["failover", "web", how, "--yes"]);
        let struck = until_done(SOON, daemon, command, look, |_| host.crash_libvirtd())?;
        Ok(struck.len())
    }

    fn replica_goes_on(&self, from: u64) -> Result<()> {
        let names = self.b.virsh(["list", "--all", "--name"])?;
        ensure!(names.lines().filter(|name| !name.trim().is_empty()).count() == 1, "{names}");
        replica_unharmed(&self.b.guest("web")?, &self.boot, from, SOON)?;
        Ok(())
    }
}

/// Goal: an emergency failover is done in the end, whenever the site's libvirtd dies. Method: at each step there is.
#[test]
fn an_emergency_failover_is_done_wherever_the_site_s_libvirt_dies() -> Result<()> {
    let mut scene = Scene::new("lost-emergency")?;
    let steps = ["begun", "fenced", "disk", "restored", "defined", "starting", "started", "running"];
    let places = steps.map(|step| format!("failover.{step}"));
    scene.controller.stop()?;
    scene.controller.env = frozen_at(&places);
    scene.controller.start()?;
    scene.a.power_cut();
    let daemon = Freezing::daemon(scene.controller.process()?)?;
    let strikes = scene.strikes_until_done("--emergency", &daemon, &scene.b)?;
    ensure!(strikes == steps.len(), "it struck {strikes} times");
    scene.replica_goes_on(0)
}

/// Goal: a planned failover loses nothing and is done in the end, or is called off and may be given again, whenever the
/// site's libvirtd dies. Method: at each step there is.
#[test]
fn a_planned_failover_is_done_wherever_the_site_s_libvirt_dies() -> Result<()> {
    let mut scene = Scene::new("lost-planned")?;
    let places = [
        "planned.begun",
        "planned.named",
        "failover.defined",
        "planned.restored",
        "planned.committed",
        "failover.starting",
        "failover.started",
    ];
    scene.controller.stop()?;
    scene.controller.env = frozen_at(&places);
    scene.controller.start()?;
    scene.controller.wait_more_points("web", 1, SOON)?;
    let daemon = Freezing::daemon(scene.controller.process()?)?;
    let strikes = scene.strikes_until_done("--planned", &daemon, &scene.b)?;
    ensure!(strikes == places.len(), "it struck {strikes} times");
    scene.source_is_off()
}

impl Scene {
    fn source_is_off(&self) -> Result<()> {
        eventually(SOON, "the source to be off", || Ok((self.guest.state()? == "shut off").then_some(())))?;
        let last = self.guest.last().context("the source said nothing")?;
        self.replica_goes_on(last.tick)
    }
}

/// Goal: the same with the source's libvirtd. Method: at each step of a hold.
#[test]
fn a_planned_failover_is_done_wherever_the_source_s_libvirt_dies() -> Result<()> {
    let mut scene = Scene::new("lost-source")?;
    let places =
        ["hold.guarded", "hold.stands", "hold.durable", "hold.kept", "hold.before-shut-off", "hold.shut-off"];
    scene.agent.stop()?;
    scene.agent.env = frozen_at(&places);
    scene.agent.start()?;
    scene.controller.wait_more_points("web", 1, SOON)?;
    let daemon = Freezing::daemon(scene.agent.process()?)?;
    let strikes = scene.strikes_until_done("--planned", &daemon, &scene.a)?;
    eventually(SOON, "the source to be off", || {
        if daemon.place()?.is_some() {
            scene.a.crash_libvirtd()?;
            daemon.go_on()?;
        }
        Ok((scene.guest.state()? == "shut off").then_some(()))
    })?;
    ensure!(strikes >= 4, "it struck {strikes} times");
    scene.source_is_off()
}
