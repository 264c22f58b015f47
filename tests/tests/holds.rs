//! The last cut of a planned failover, as the source lives it: its agent dies at each step, the host loses power, the
//! site is gone. Until the site was told that the guest is held it goes on by itself; from then on only somebody's word
//! lets it go on.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, Site, eventually,
    product::{Agent, Controller, killed_at, left_in_qemu, small},
};
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// A guest that agent.toml names and a group of the site has.
struct World {
    a: Site,
    b: Site,
    link: Link,
    agent: Agent,
    controller: Controller,
    guest: Guest,
    _rig: Rig,
}

impl World {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
        a.virsh(["autostart", "web"])?;
        guest.wait_for_tick(3, BOOT)?;
        let settings = "[[vm]]\nname = \"web\"\ninterval = \"2s\"\nmax_pause = \"5s\"";
        let mut agent = Agent::install(&a, &controller, settings)?;
        agent.install_hook()?;
        agent.start()?;
        let world = Self { a, b, link, agent, controller, guest, _rig: rig };
        eventually(SOON, "the group to be made", || {
            let made = world.controller.cli(&["group", "create", "shop", "--vm", "web", "--rpo", "2s"])?;
            Ok(made.status.success().then_some(()))
        })?;
        world.controller.wait_more_group_points("shop", 2, SOON)?;
        Ok(world)
    }

    fn dies(&mut self, when: impl FnOnce() -> String) -> Result<()> {
        let what = when();
        eventually(SOON, &what, || Ok((!self.agent.process()?.running()).then_some(())))
    }

    /// A planned failover is begun with an agent that dies at `step`.
    fn planned_with_agent_killed_at(&mut self, step: &str) -> Result<()> {
        self.agent.stop()?;
        self.agent.env = killed_at(step);
        self.agent.start()?;
        self.controller.wait_more_group_points("shop", 1, SOON)?;
        eventually(SOON, &format!("the agent to die at {step}"), || {
            // One that went before may not be over yet.
            self.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
            Ok((!self.agent.process()?.running()).then_some(()))
        })
    }

    /// The agent is started, and dies at `step` as the site ends the hold.
    fn agent_dies_at(&mut self, step: &str) -> Result<()> {
        self.agent.env = killed_at(step);
        self.agent.start()?;
        self.dies(|| format!("the agent to die at {step}"))
    }

    fn runs(&self, site: &Site) -> Result<bool> {
        let running = site.virsh(["list", "--name", "--state-running"])?;
        Ok(running.lines().any(|name| name.trim() == "web"))
    }

    fn stands_for_its_operator(&self) -> Result<()> {
        let said = self.a.virsh(["domstate", "--reason", "web"])?;
        ensure!(said.trim() == "paused (user)", "{said}");
        Ok(())
    }

    /// Neither what systemd does after an agent's end nor libvirt's own restart lets it go on.
    fn stays_held_without_an_agent(&self) -> Result<()> {
        self.stands_for_its_operator()?;
        self.agent.command()?.arg("release-paused").run()?;
        self.stands_for_its_operator()?;
        self.a.restart_libvirtd()?;
        self.stands_for_its_operator()
    }

    /// Nothing of a hold or of a pause is left.
    fn is_over(&self) -> Result<()> {
        for folder in ["state/holds", "run/paused"] {
            // A point that is being cut pauses the guest, too, for a moment.
            eventually(SOON, &format!("{folder} to be empty"), || {
                Ok(fs::read_dir(self.agent.dir().join(folder))?.next().is_none().then_some(()))
            })?;
        }
        Ok(())
    }

    fn goes_on(&self) -> Result<()> {
        self.guest.wait_for_state("running", SOON)?;
        let tick = self.guest.last().context("it ticked before")?.tick;
        self.guest.wait_for_tick(tick + 2, SOON).map(drop)
    }
}

/// Goal: before the site is told that the guest is held, an agent that dies leaves a guest that goes on, without waiting for
/// the next agent. Method: the agent is killed at each step up to there; nobody starts it before the guest runs.
#[test]
fn an_agent_killed_before_the_guest_is_held_leaves_a_guest_that_goes_on() -> Result<()> {
    let mut world = World::new("hold-before")?;
    for step in ["hold.guarded", "hold.stands", "hold.durable"] {
        world.planned_with_agent_killed_at(step)?;
        world.goes_on().with_context(|| step.to_owned())?;
        world.agent.command()?.arg("release-paused").run()?;
        world.agent.start()?;
        world.controller.wait_more_group_points("shop", 1, SOON)?;
        ensure!(!world.runs(&world.b)?, "{step}: a replica runs");
        world.is_over().with_context(|| step.to_owned())?;
    }
    world.guest.wait_full_check(SOON)?;
    Ok(())
}

/// Goal: a guest that is held stays so whatever becomes of its agent, until the site lets it go on, and then goes on once,
/// wherever its agent dies. Method: the agent is killed when the hold was just written, so that the site calls the failover
/// off; then at each step of ending it.
#[test]
fn a_held_guest_stands_without_an_agent_and_goes_on_when_the_site_says_so() -> Result<()> {
    let mut world = World::new("hold-resume")?;
    for step in ["hold.kept", "hold.unguarded"] {
        world.planned_with_agent_killed_at(step)?;
        world.stays_held_without_an_agent().with_context(|| step.to_owned())?;
        world.agent_dies_at("hold.before-resume")?;
        world.stays_held_without_an_agent()?;
        world.agent_dies_at("hold.resumed")?;
        world.goes_on()?;
        world.agent.start()?;
        world.controller.wait_more_group_points("shop", 1, SOON)?;
        ensure!(!world.runs(&world.b)?, "{step}: a replica runs");
        world.is_over().with_context(|| step.to_owned())?;
    }
    eventually(SOON, "nothing of ours to be left in QEMU", || {
        Ok(left_in_qemu(&world.guest)?.is_empty().then_some(()))
    })?;
    world.guest.wait_full_check(SOON)?;
    Ok(())
}

/// Goal: once the replica runs, the source never does, wherever its agent dies; it is shut off, and does not come back by
/// itself. Method: the agent is killed at each step of shutting it off, the first time with the site's word in its hand.
#[test]
fn a_held_guest_is_shut_off_once_its_replica_runs_wherever_its_agent_dies() -> Result<()> {
    let mut world = World::new("hold-shut-off")?;
    world.planned_with_agent_killed_at("hold.before-shut-off")?;
    eventually(SOON, "the replica to run", || {
        ensure!(!world.runs(&world.a)?, "the source runs beside its replica");
        Ok(world.runs(&world.b)?.then_some(()))
    })?;
    world.stays_held_without_an_agent()?;
    world.agent_dies_at("hold.shut-off")?;
    ensure!(world.guest.state()? == "shut off", "{}", world.guest.state()?);
    world.agent_dies_at("hold.ended")?;
    world.agent.start()?;
    world.agent.wait_state("web", "fenced", SOON)?;
    world.is_over()?;
    let refused = world.a.command("virsh").args(["-q", "-c", "qemu:///system", "start", "web"]).output()?;
    ensure!(!refused.status.success() && refused.stderr.contains("failed over"), "{refused:?}");
    ensure!(world.a.virsh(["dominfo", "web"])?.contains("disable"), "it still starts with its host");
    ensure!(world.runs(&world.b)? && !world.runs(&world.a)?);
    Ok(())
}

/// Goal: a host that lost power while its guest was held does not start it; an operator whose site is lost for good has a
/// way out, and is asked first. Method: the hold is written, the agent dies; first the guest still stands, then its host
/// was dark. It starts with its host.
#[test]
fn a_held_guest_outlasts_a_power_cut_and_goes_on_by_its_operator_s_word() -> Result<()> {
    let mut world = World::new("hold-alone")?;
    for dark in [false, true] {
        world.planned_with_agent_killed_at("hold.unguarded")?;
        world.stands_for_its_operator()?;
        world.link.cut()?;
        if dark {
            world.a.power_cut();
            // It is in the agent's own folder here, and not in /run.
            fs::remove_dir_all(world.agent.dir().join("run"))?;
            // Without its line.
            world.a.power_on()?;
            ensure!(world.guest.state()? == "shut off", "libvirt has started what starts with the host");
            world.agent.start()?;
            world.agent.wait_state("web", "yielding", SOON)?;
            let start = world.a.command("virsh").args(["-q", "-c", "qemu:///system", "start", "web"]);
            let refused = start.output()?;
            ensure!(!refused.status.success() && refused.stderr.contains("is held"), "{refused:?}");
        }
        let unasked = world.agent.command()?.args(["resume-held", "web"]).output()?;
        ensure!(!unasked.status.success() && unasked.stderr.contains("there may be two"), "{unasked:?}");
        let said = world.agent.command()?.args(["resume-held", "web", "--yes"]).run()?;
        ensure!(said.contains(if dark { "virsh start" } else { "goes on" }), "{said}");
        let again = world.agent.command()?.args(["resume-held", "web", "--yes"]).output()?;
        ensure!(!again.status.success() && again.stderr.contains("not held"), "{again:?}");
        if dark {
            // The agent may be quicker: it starts what starts with its host.
            let start =
                world.a.command("virsh").args(["-q", "-c", "qemu:///system", "start", "web"]).output()?;
            ensure!(start.status.success() || start.stderr.contains("already active"), "{start:?}");
            world.guest.wait_for_tick(2, BOOT)?;
        } else {
            world.goes_on()?;
        }
        if !dark {
            world.link.restore()?;
            world.agent.start()?;
            world.controller.wait_more_group_points("shop", 1, SOON)?;
            world.is_over()?;
        }
    }
    Ok(())
}
