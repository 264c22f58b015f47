//! A failover is broken off at each of its steps, as its controller dies, and the source comes back just then: its line is
//! mended, or its host has power again. Whatever was decided by then holds: a source that was not fenced goes on, one that was
//! is paused and put away; the same command then ends the failover, and nothing ever runs twice.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, Site, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small},
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fmt::Write,
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// A host with a guest for each step at which a failover is broken off, and the site.
struct World {
    a: Site,
    b: Site,
    link: Link,
    agent: Agent,
    controller: Controller,
    guests: Vec<(Guest, String)>,
    _rig: Rig,
}

impl World {
    fn new(name: &str, guests: usize, more: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let names: Vec<String> = (0..guests).map(|at| format!("w{at}")).collect();
        let mut settings = String::from("[defaults]\nmax_pause = \"20s\"\n");
        let mut started = Vec::new();
        for name in &names {
            started.push(a.define_and_start(&small(name).disk(DiskFormat::Raw, 16).idle())?);
            a.virsh(["autostart", name])?;
            write!(settings, "[[vm]]\nname = \"{name}\"\ninterval = \"1s\"\n{more}\n")?;
        }
        let boot = |guest: Guest| Ok((guest.clone(), guest.wait_for_tick(2, BOOT)?.boot));
        let guests = started.into_iter().map(boot).collect::<Result<Vec<_>>>()?;
        let mut agent = Agent::install(&a, &controller, &settings)?;
        agent.install_hook()?;
        agent.start()?;
        for name in &names {
            controller.wait_points(name, 2, SOON)?;
        }
        Ok(Self { a, b, link, agent, controller, guests, _rig: rig })
    }

    /// Fails `what` over with a controller that dies at `step`. It is left dead.
    fn break_off(&mut self, what: &str, how: &str, step: &str) -> Result<()> {
        self.controller.stop()?;
        self.controller.env = killed_at(step);
        self.controller.start()?;
        if how == "--planned" {
            self.controller.wait_more_points(what, 1, SOON)?;
        }
        // What an earlier one left unfinished is ended first, and that is the answer.
        let broken = eventually(SOON, "an earlier failover to be ended", || {
            let broken = self.controller.cli(&["failover", what, how, "--yes"])?;
            Ok((!broken.stderr.contains("it was interrupted")).then_some(broken))
        })?;
        ensure!(!broken.status.success(), "{step}: {broken:?}");
        self.controller.process()?.wait(SOON).with_context(|| format!("it should die at {step}"))?;
        self.controller.kill9()
    }

    /// All guests stand, as the site is silent.
    fn wait_isolated(&self) -> Result<()> {
        eventually(SOON, "the guests to be paused as the site is silent", || {
            let status = self.agent.status().unwrap_or_default();
            let isolated =
                |row: &&Value| row["reason"].as_str().is_some_and(|why| why.contains("on_isolation"));
            let all =
                status["vms"].as_array().into_iter().flatten().filter(isolated).count() == self.guests.len();
            let stands = |guest: &Guest| Ok(guest.state()? == "paused");
            let stand = self.guests.iter().map(|(guest, _)| stands(guest)).collect::<Result<Vec<_>>>()?;
            Ok((all && stand.into_iter().all(|stands| stands)).then_some(()))
        })
    }

    fn guest(&self, at: usize) -> &Guest {
        &self.guests[at].0
    }

    /// It was not fenced: it runs, and is protected.
    fn goes_on(&self, at: usize) -> Result<()> {
        let guest = self.guest(at);
        guest.wait_for_state("running", SOON)?;
        let then = guest.last().context("it ticked before")?.tick;
        guest.wait(SOON, "the guest to tick on", |report| report.tick != then)?;
        self.controller.wait_more_points(guest.name(), 2, SOON).map(drop)
    }

    /// What only this copy knows is kept, memory included, and it does not run.
    fn is_put_away(&self, at: usize) -> Result<()> {
        let guest = self.guest(at);
        let row = eventually(SOON, &format!("what {} knows to be kept", guest.name()), || {
            let text = self.agent.command()?.args(["diverged", "--json"]).run()?;
            let rows: Vec<Value> = serde_json::from_str(&text)?;
            let mut of = rows.into_iter().filter(|row| row["name"] == guest.name());
            Ok(of.find(|row| row["kept"][0]["memory_bytes"].as_u64().is_some()))
        })?;
        ensure!(row["fenced_by"] == 2, "{row}");
        guest.wait_for_state("shut off", SOON)?;
        self.agent.wait_state(guest.name(), "fenced", SOON).map(drop)
    }

    fn start_is_refused(&self, at: usize) -> Result<()> {
        let guest = self.guest(at);
        let start = self.a.command("virsh").args(["-q", "-c", "qemu:///system", "start", guest.name()]);
        let refused = start.output()?;
        ensure!(!refused.status.success() && refused.stderr.contains("failed over"), "{refused:?}");
        ensure!(guest.state()? == "shut off", "{}", guest.state()?);
        Ok(())
    }

    /// The same command ends a failover that was broken off.
    fn end(&self, what: &str, at: usize) -> Result<Value> {
        let done = self.controller.json(&["failover", what, "--emergency", "--yes"])?;
        let (guest, boot) = &self.guests[at];
        replica_unharmed(&self.b.guest(guest.name())?, boot, 0, SOON)?;
        Ok(done)
    }
}

fn running(site: &Site) -> Result<BTreeSet<String>> {
    let running = site.virsh(["list", "--name", "--state-running"])?;
    Ok(running.lines().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect())
}

/// Does `work`, and sees that nothing runs at both sites meanwhile.
fn never_both<T>(a: &Site, b: &Site, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let seen = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                // In this order: the source of a replica that runs does not run any more. A site without power has nothing.
                let there = running(b)?;
                let both: Vec<_> = there.intersection(&running(a).unwrap_or_default()).cloned().collect();
                ensure!(both.is_empty(), "at both sites: {both:?}");
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        seen.join().map_err(|_| anyhow::anyhow!("the watching thread"))??;
        done
    })
}

const ISOLATION: &str = "on_isolation = \"pause\"\nisolation_after = \"5s\"";

/// The line is cut and the sources stand, failovers are broken off, one at each step, and the line is mended.
fn a_line_is_mended(name: &str, steps: &[&str]) -> Result<()> {
    let mut world = World::new(name, steps.len(), ISOLATION)?;
    world.link.cut()?;
    world.wait_isolated()?;
    let (a, b) = (world.a.clone(), world.b.clone());
    never_both(&a, &b, || {
        for (at, step) in steps.iter().enumerate() {
            world.break_off(&format!("w{at}"), "--emergency", step)?;
        }
        world.controller.start()?;
        world.link.restore()?;
        for (at, step) in steps.iter().enumerate().filter(|(_, step)| **step != "failover.begun") {
            world.is_put_away(at).with_context(|| step.to_string())?;
            world.start_is_refused(at)?;
            world.end(&format!("w{at}"), at)?;
        }
        Ok(())
    })?;
    unless_begun(&world, steps)
}

/// Where the source was not fenced yet it went on, and its failover goes to what it did since. The one thing that is not shown
/// is that it stands before its replica runs: its agent hears of the fence when it does.
fn unless_begun(world: &World, steps: &[&str]) -> Result<()> {
    let Some(at) = steps.iter().position(|step| *step == "failover.begun") else { return Ok(()) };
    world.goes_on(at)?;
    let name = format!("w{at}");
    let begun = world.controller.vm(&name)?["failover"].clone();
    let preview =
        world.controller.cli(&["failover", &name, "--emergency", "--dry-run", "--json"])?.success()?;
    let preview: Value = serde_json::from_str(&preview)?;
    let newer = preview["point"]["cut_at"].as_u64() > begun["cut_at"].as_u64();
    ensure!(newer && preview["unfinished"].is_null(), "{preview} {begun}");
    let done = world.end(&name, at)?;
    ensure!(done["cut_at"].as_u64() > begun["cut_at"].as_u64(), "it went back to {done}, begun was {begun}");
    world.is_put_away(at)?;
    ensure!(!running(&world.a)?.contains(&name));
    Ok(())
}

/// Goal: a source whose line is mended while a failover is broken off at a step, whichever it is, stands and is put away if it
/// was fenced, and goes on if it was not. Method: a guest for each of the first steps.
#[test]
fn a_line_that_is_mended_at_an_early_step_of_a_failover_never_has_two_copies_run() -> Result<()> {
    a_line_is_mended(
        "line-early",
        &["failover.begun", "failover.fenced", "failover.disk", "failover.restored"],
    )
}

/// Goal: as above. Method: the last steps, in two of which the replica runs already.
#[test]
fn a_line_that_is_mended_at_a_late_step_of_a_failover_never_has_two_copies_run() -> Result<()> {
    a_line_is_mended(
        "line-late",
        &["failover.defined", "failover.starting", "failover.started", "failover.running"],
    )
}

/// Goal: the same of a failover of groups; one that has fenced its sources keeps to its point, and one that has not takes the
/// newest. Method: a group of one for each step.
#[test]
fn a_line_that_is_mended_at_any_step_of_a_group_s_failover_never_has_two_copies_run() -> Result<()> {
    let steps = ["group.fenced", "group.restored", "group.running", "group.committed"];
    let not_fenced = steps.len() - 1;
    let mut world = World::new("line-group", steps.len(), ISOLATION)?;
    for at in 0..steps.len() {
        let (group, vm) = (format!("g{at}"), format!("w{at}"));
        eventually(SOON, "the group to be made", || {
            let made = world.controller.cli(&["group", "create", &group, "--vm", &vm, "--rpo", "2s"])?;
            Ok(made.status.success().then_some(()))
        })?;
    }
    for at in 0..steps.len() {
        world.controller.wait_more_group_points(&format!("g{at}"), 2, SOON)?;
    }
    world.link.cut()?;
    world.wait_isolated()?;
    let (a, b) = (world.a.clone(), world.b.clone());
    never_both(&a, &b, || {
        for (at, step) in steps.iter().enumerate() {
            world.break_off(&format!("g{at}"), "--emergency", step)?;
        }
        world.controller.start()?;
        let begun = world.controller.group_points("g0")?;
        let older = begun[0]["cut"].as_str().context("its id")?;
        let other = world.controller.cli(&["failover", "g0", "--emergency", "--yes", "--point", older])?;
        ensure!(other.stderr.contains("committed, and not finished"), "{other:?}");
        Ok(())
    })?;
    let newest = |world: &World| {
        let points = world.controller.group_points(&format!("g{not_fenced}"))?;
        points.last().and_then(|point| point["cut_at"].as_u64()).context("a group point")
    };
    let begun = newest(&world)?;
    never_both(&a, &b, || {
        world.link.restore()?;
        for (at, step) in steps.iter().enumerate().take(not_fenced) {
            world.is_put_away(at).with_context(|| step.to_string())?;
            if *step == "group.running" {
                let again = world.controller.cli(&["failover", &format!("g{at}"), "--emergency", "--yes"])?;
                ensure!(again.stderr.contains("already"), "{again:?}");
            } else {
                world.end(&format!("g{at}"), at)?;
            }
        }
        world.goes_on(not_fenced)?;
        eventually(SOON, "newer points of the group", || Ok((newest(&world)? > begun).then_some(())))
    })?;
    // Its agent hears of the fence when it does: that it stands before its replica runs is not shown.
    let done = world.end(&format!("g{not_fenced}"), not_fenced)?;
    ensure!(done["cut_at"].as_u64() > Some(begun), "it went back to {done}, the newest was {begun}");
    world.is_put_away(not_fenced)
}

/// Goal: a host that has power again while a failover is broken off, at whichever step, starts what was not fenced and nothing
/// else. Method: guests that start with their host, one for each step.
#[test]
fn a_host_that_has_power_again_at_any_step_of_a_failover_starts_what_was_not_fenced() -> Result<()> {
    let steps = ["failover.begun", "failover.fenced", "failover.restored", "failover.started"];
    let mut world = World::new("power-steps", steps.len(), "")?;
    world.agent.kill9()?;
    world.a.power_cut();
    // It is in the agent's own folder here, and not in /run.
    fs::remove_dir_all(world.agent.dir().join("run"))?;
    let (a, b) = (world.a.clone(), world.b.clone());
    never_both(&a, &b, || {
        for (at, step) in steps.iter().enumerate() {
            world.break_off(&format!("w{at}"), "--emergency", step)?;
        }
        world.controller.start()?;
        world.a.power_on()?;
        world.link.plug()?;
        ensure!(running(&world.a)?.is_empty(), "libvirt has started what starts with the host");
        world.agent.start()?;
        world.guest(0).wait_for_state("running", SOON)?;
        for at in 1..steps.len() {
            world.agent.wait_state(world.guest(at).name(), "fenced", SOON)?;
            world.start_is_refused(at)?;
            world.end(&format!("w{at}"), at)?;
            world.start_is_refused(at)?;
        }
        Ok(())
    })?;
    // It booted: another boot is what its points hold from now on.
    let (guest, boot) = &mut world.guests[0];
    *boot = guest.wait(BOOT, "the guest to boot", |report| report.boot != *boot && report.tick >= 2)?.boot;
    world.controller.wait_more_points("w0", 2, SOON)?;
    unless_begun(&world, &steps)
}

/// Goal: a planned failover whose controller dies, and whose source is cut off just then, is called off or goes on, as was
/// decided; the source stands until it can be told, and then does what it is told. Method: at each step, one after the other.
#[test]
fn a_source_that_is_cut_off_as_a_planned_failover_breaks_off_stands_until_it_is_told() -> Result<()> {
    let mut world = World::new("cut-planned", 1, "")?;
    let (a, b) = (world.a.clone(), world.b.clone());
    never_both(&a, &b, || {
        for step in ["planned.begun", "planned.named", "planned.restored"] {
            world.break_off("w0", "--planned", step)?;
            world.link.cut()?;
            world.controller.start()?;
            if step != "planned.begun" {
                // What the agent has promised the site is what holds, whatever the site thinks of it by now.
                ensure!(world.guest(0).state()? == "paused", "{step}");
            }
            world.link.restore()?;
            world.goes_on(0).with_context(|| step.to_owned())?;
            ensure!(running(&world.b)?.is_empty(), "{step}");
        }
        world.break_off("w0", "--planned", "planned.committed")?;
        world.link.cut()?;
        world.controller.start()?;
        let replica = world.b.guest("w0")?;
        replica_unharmed(&replica, &world.guests[0].1, 0, SOON)?;
        ensure!(world.guest(0).state()? == "paused");
        world.link.restore()?;
        world.guest(0).wait_for_state("shut off", SOON)?;
        world.agent.wait_state("w0", "fenced", SOON)?;
        world.start_is_refused(0)
    })
}
