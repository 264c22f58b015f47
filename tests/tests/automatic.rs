//! Failover by itself: a group that asks for it, a witness at a third place, and lines between the three that are cut. Real:
//! etcd, the guard, both daemons.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Proc, Rig, Shape, Site, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small},
};
use serde_json::Value;
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
/// Longer than a lease lasts.
const LONG: Duration = Duration::from_secs(12);

/// The source's host, the site, and the witness.
struct World {
    a: Site,
    b: Site,
    _site_to_witness: Link,
    to_site: Link,
    a_to_witness: Link,
    witness: Proc,
    guard: Proc,
    agent: Agent,
    controller: Controller,
    guest: Guest,
    boot: String,
    /// What `agent.toml` says besides.
    settings: String,
    _rig: Rig,
}

impl World {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, to_site) = rig.pair()?;
        let w = rig.site("w")?;
        let a_to_witness = rig.link(&a, &w, Shape::mbit(100))?;
        let site_to_witness = rig.link(&b, &w, Shape::mbit(100))?;
        let url = format!("http://{}:2379", w.address());
        let witness = w
            .command(rig::target_dir()?.join("rig/etcd"))
            .args(["--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", &url])
            .args(["--unsafe-no-fsync", "--data-dir"])
            .arg(w.dir("etcd")?)
            .named("etcd")
            .spawn()?;
        let section = format!("[witness]\nendpoints = [\"{url}\"]\n");
        let mut controller = Controller::install(&b)?;
        controller.configure(&format!("{section}silent = \"20s\"\n"))?;
        controller.start()?;
        let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        let vm = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"5s\"\n";
        let settings = format!("{section}lease = \"9s\"\n{vm}");
        let mut agent = Agent::install(&a, &controller, &settings)?;
        agent.start()?;
        let guard = agent.command()?.arg("guard").env("LIFEBOAT_LOG", "info").named("guard").spawn()?;
        controller.wait_points("web", 2, SOON)?;
        let world = Self {
            a,
            b,
            _site_to_witness: site_to_witness,
            to_site,
            a_to_witness,
            witness,
            guard,
            agent,
            controller,
            guest,
            boot,
            settings,
            _rig: rig,
        };
        world.wait_at_agent("kept")?;
        world.controller.json(&["group", "create", "shop", "--vm", "web", "--rpo", "2s", "--automatic"])?;
        world.controller.wait_more_group_points("shop", 2, SOON)?;
        Ok(world)
    }

    /// What the agent says of the witness.
    fn wait_at_agent(&self, words: &str) -> Result<()> {
        eventually(SOON, &format!("the agent to say: {words}"), || {
            let said = self.agent.vm("web").unwrap_or_default()["fence"]["witness"].to_string();
            Ok(said.trim_matches('"').starts_with(words).then_some(()))
        })
    }

    /// What the site says of failing over by itself.
    fn said(&self) -> Result<Option<String>> {
        Ok(self.controller.json(&["group", "show", "shop"])?["automatic"].as_str().map(str::to_owned))
    }

    fn wait_at_site(&self, words: &str) -> Result<()> {
        eventually(SOON, &format!("the site to say: {words}"), || {
            Ok(self.said()?.is_some_and(|said| said.contains(words)).then_some(()))
        })
    }

    fn turn_off(&self) -> Result<()> {
        self.controller.json(&["group", "set", "shop", "--automatic", "false"])?;
        eventually(SOON, "the site to have nothing to say", || Ok(self.said()?.is_none().then_some(())))
    }

    fn cut_both(&self) -> Result<()> {
        self.to_site.cut()?;
        self.a_to_witness.cut()
    }

    /// The guest goes on, and is kept again.
    fn heals(&self) -> Result<()> {
        self.to_site.restore()?;
        self.a_to_witness.restore()?;
        self.guest.wait_for_state("running", SOON)?;
        self.ticks_on()?;
        self.wait_at_agent("kept")
    }

    fn replica_runs(&self) -> bool {
        self.b.guest("web").is_ok_and(|replica| replica.state().is_ok_and(|state| state == "running"))
    }

    fn ticks_on(&self) -> Result<()> {
        let then = self.guest.last().context("it ticked before")?.tick;
        self.guest.wait_for_tick(then + 3, SOON).map(drop)
    }

    /// For a while nothing is begun, and the guest runs.
    fn nothing_happens(&self) -> Result<()> {
        let end = std::time::Instant::now() + LONG;
        while std::time::Instant::now() < end {
            ensure!(!self.replica_runs(), "a replica was started");
            self.ticks_on()?;
        }
        Ok(())
    }

    /// The replica runs at last; the guest had come to stand before.
    fn fails_over(&self) -> Result<Guest> {
        eventually(SOON, "the replica to run", || {
            // Asked in this order: one that stands goes on standing.
            let (runs, stands) = (self.replica_runs(), self.guest.state()? != "running");
            ensure!(!runs || stands, "both run");
            Ok((runs && stands).then_some(()))
        })?;
        let replica = self.b.guest("web")?;
        replica_unharmed(&replica, &self.boot, 0, SOON)?;
        Ok(replica)
    }

    fn audited(&self) -> Result<Vec<Value>> {
        let rows = self.controller.json(&["audit"])?["calls"].as_array().cloned().unwrap_or_default();
        Ok(rows.into_iter().filter(|row| row["who"] == "witness").collect())
    }
}

/// Goal: nothing is failed over while the source's lease is alive, or the witness can't say that it is not; and the
/// guest runs on.
/// Method: the source is cut off from the site alone, then the witness is dead.
#[test]
fn a_lost_line_or_a_lost_witness_alone_begins_nothing_and_the_guest_runs_on() -> Result<()> {
    let mut world = World::new("auto-alone")?;
    world.to_site.cut()?;
    world.wait_at_site("the lease of agent")?;
    ensure!(!world.replica_runs());
    world.ticks_on()?;
    world.to_site.restore()?;
    world.controller.wait_more_group_points("shop", 1, SOON)?;
    world.witness.kill9()?;
    world.nothing_happens()?;
    world.wait_at_agent("kept; the witness does not answer")?;
    ensure!(world.audited()?.is_empty());
    Ok(())
}

/// Goal: a source that is cut off from both stands before its replica starts, by itself, and is fenced when it comes back.
/// Method: both lines cut, with the controller killed at a step of the claim; then the lines are healed.
#[test]
fn a_source_that_is_cut_off_from_both_stands_before_its_replica_starts_by_itself() -> Result<()> {
    let mut world = World::new("auto-both")?;
    world.controller.stop()?;
    world.controller.env = killed_at("automatic.taken");
    world.controller.start()?;
    world.controller.wait_more_group_points("shop", 1, SOON)?;
    world.cut_both()?;
    world.guest.wait_for_state("paused", SOON)?;
    world.controller.process()?.wait(SOON).context("the controller should die when it has claimed it")?;
    ensure!(!world.replica_runs());
    // A source that comes back now is too late.
    world.a_to_witness.restore()?;
    world.wait_at_agent("no lease holds: it may not run; the witness says that site")?;
    world.controller.kill9()?;
    world.controller.start()?;
    let replica = world.fails_over()?;
    world.to_site.restore()?;
    world.agent.wait_state("web", "fenced", SOON)?;
    ensure!(replica.state()? == "running" && world.guest.state()? != "running");
    let audited = world.audited()?;
    ensure!(audited.iter().any(|row| row["end"]["done"] == true), "{audited:?}");
    Ok(())
}

/// Goal: the guest stands in time though its agent is frozen, or libvirt is. Method: agent and libvirtd are frozen, both lines
/// cut: nobody but the guard is left, and the kernel.
#[test]
fn a_guest_whose_agent_and_libvirt_are_frozen_stands_before_its_replica_starts() -> Result<()> {
    let mut world = World::new("auto-frozen")?;
    let qemu = nix::unistd::Pid::from_raw(world.guest.qemu_pid()?);
    world.agent.process()?.freeze()?;
    world.a.freeze_libvirtd(true)?;
    world.cut_both()?;
    eventually(SOON, "the guest's QEMU to be stopped", || {
        ensure!(!world.replica_runs(), "both run");
        Ok(rig::is_frozen(qemu)?.then_some(()))
    })?;
    eventually(SOON, "the replica to run", || Ok(world.replica_runs().then_some(())))?;
    ensure!(rig::is_frozen(qemu)?);
    world.guard.kill9()?;
    // What is frozen could not be ended.
    world.a.freeze_libvirtd(false)
}

/// Another VM of that name at the site: the failover is refused before anything is begun.
const TAKEN: &str =
    "<domain type='qemu'><name>web</name><memory unit='MiB'>16</memory><os><type>hvm</type></os></domain>";

/// Goal: a failover that does not work is tried again later and later, each time with one line of the audit log, at once
/// when the group was changed, and given up when automatic failover is turned off: then the source has its VM again.
/// Method: the controller dies when it has claimed the VM; when it comes back, the replica's name is taken.
#[test]
fn a_failover_that_does_not_work_is_tried_later_and_later_until_automatic_failover_is_turned_off()
-> Result<()> {
    let mut world = World::new("auto-fails")?;
    world.controller.stop()?;
    world.controller.env = killed_at("automatic.claimed");
    world.controller.start()?;
    world.controller.wait_more_group_points("shop", 1, SOON)?;
    world.cut_both()?;
    world.controller.process()?.wait(SOON).context("the controller should die when it has claimed it")?;
    let taken = world.b.folder().join("taken.xml");
    std::fs::write(&taken, TAKEN)?;
    world.b.virsh(["define", &taken.display().to_string()])?;
    world.controller.kill9()?;
    world.controller.start()?;
    world.wait_at_site("failed 2 times: ")?;
    let (said, tries) = eventually(SOON, "the tries to be told", || {
        let (before, tries, after) = (world.said()?, world.audited()?, world.said()?);
        let often = |said: Option<String>| Some((said.as_ref()?.split(": ").next()?.to_owned(), said?));
        let (Some((before, _)), Some((after, said))) = (often(before), often(after)) else { return Ok(None) };
        let whole = before == after && tries.iter().all(|row| !row["end"].is_null());
        Ok(whole.then_some((said, tries)))
    })?;
    ensure!(said.contains(&format!("failed {} times: ", tries.len())), "{said}: {tries:?}");
    ensure!(said.contains("web") && said.contains("; tried again in "), "{said}");
    ensure!(tries.iter().all(|row| row["end"]["done"] == false), "{tries:?}");
    world.controller.json(&["group", "set", "shop", "--rpo", "3s"])?;
    world.wait_at_site("failed: ")?;
    ensure!(world.audited()?.len() > tries.len());

    world.turn_off()?;
    ensure!(!world.replica_runs() && world.guest.state()? == "paused");
    world.heals()?;
    ensure!(!world.replica_runs());
    Ok(())
}

/// Goal: a failover that takes long keeps no other group waiting. Method: a second group, of another guest; before its
/// first replica starts, each waits until the other has come as far.
#[test]
fn groups_that_are_lost_together_are_failed_over_beside_each_other() -> Result<()> {
    let mut world = World::new("auto-beside")?;
    let other = world.a.define_and_start(&small("db").disk(DiskFormat::Raw, 16))?;
    let boot = other.wait_for_tick(3, BOOT)?.boot;
    let settings =
        format!("{}[[vm]]\nname = \"db\"\ninterval = \"500ms\"\nmax_pause = \"5s\"\n", world.settings);
    world.agent.configure(&world.controller.address(), &settings)?;
    world.agent.stop()?;
    world.agent.start()?;
    world.controller.wait_points("db", 2, SOON)?;
    let (folder, mut groups) = (world.b.dir("meeting")?, String::new());
    for (name, vm, other) in [("shop", "web", "books"), ("books", "db", "shop")] {
        let (mine, theirs) = (folder.join(name), folder.join(other));
        let meet = format!("touch {}; until [ -e {} ]; do sleep 0.1; done", mine.display(), theirs.display());
        groups += &format!(
            "[[group]]\nname = {name:?}\nvms = [{vm:?}]\nrpo = \"2s\"\nautomatic = true\n\
             [group.runbook]\nscript_limit = \"1h\"\nbefore = [[\"/bin/sh\", \"-c\", {meet:?}]]\n"
        );
    }
    let file = world.b.folder().join("groups.toml");
    std::fs::write(&file, groups)?;
    eventually(SOON, "both groups to be made", || {
        let made = world.controller.cli(&["apply", "-f", &file.display().to_string(), "--yes"])?;
        Ok(made.status.success().then_some(()))
    })?;
    for group in ["shop", "books"] {
        world.controller.wait_more_group_points(group, 2, SOON)?;
    }
    world.cut_both()?;
    world.fails_over()?;
    replica_unharmed(&world.b.guest("db")?, &boot, 0, SOON).map(drop)
}

/// Goal: a group of which automatic failover was turned off is not failed over by itself; its guest is kept still.
/// Method: the site would begin once the lease is gone, and is told not to; then it goes.
#[test]
fn a_group_whose_automatic_failover_was_turned_off_is_not_failed_over() -> Result<()> {
    let world = World::new("auto-off")?;
    world.to_site.cut()?;
    world.wait_at_site("the lease of agent")?;
    world.turn_off()?;
    world.a_to_witness.cut()?;
    world.guest.wait_for_state("paused", SOON)?;
    let end = std::time::Instant::now() + LONG;
    while std::time::Instant::now() < end {
        ensure!(!world.replica_runs(), "a replica was started");
        ensure!(world.said()?.is_none(), "{:?}", world.said()?);
    }
    ensure!(world.audited()?.is_empty());
    world.heals()
}

/// Goal: a host that is taken out of the witness frees its VMs, also those that an agent before it had bound; from then
/// on the guest stands for no lease, nobody fails it over by himself, and it can't be asked for. Method: the agent is
/// killed, and started with `keep = false`; both lines are cut for longer than a lease lasts.
#[test]
fn a_guest_whose_host_does_not_keep_it_runs_on_without_any_lease_and_is_not_failed_over() -> Result<()> {
    let mut world = World::new("auto-keep")?;
    world.agent.kill9()?;
    let settings = world.settings.replace("[witness]\n", "[witness]\nkeep = false\n");
    world.agent.configure(&world.controller.address(), &settings)?;
    world.agent.start()?;
    world.wait_at_agent("not kept, as `keep = false` says")?;
    world.guest.wait_for_state("running", SOON)?;
    world.cut_both()?;
    world.nothing_happens()?;
    world.wait_at_site("does not keep web at the witness")?;
    world.ticks_on()?;
    ensure!(!world.replica_runs() && world.guest.state()? == "running" && world.audited()?.is_empty());
    world.turn_off()?;
    let again = world.controller.cli(&["group", "set", "shop", "--automatic"])?;
    ensure!(!again.status.success() && again.stderr.contains("no agent keeps these"), "{again:?}");
    Ok(())
}
