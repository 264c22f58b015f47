//! Never two running copies: what becomes of the source's guest when its VM was failed over, while its host was dark, cut
//! off, or alive; of a guest whose host lost power and was not failed over; and of one whose site does not answer.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, Site, eventually,
    product::{Agent, Controller, killed_at, left_in_qemu, replica_unharmed, small},
};
use serde_json::Value;
use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"5s\"";

/// A host with a protected guest that starts with it, and the site.
struct World {
    a: Site,
    b: Site,
    link: Link,
    agent: Agent,
    controller: Controller,
    guest: Guest,
    boot: String,
    _rig: Rig,
}

impl World {
    fn new(name: &str, more: &str, hook: bool) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
        a.virsh(["autostart", "web"])?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        let mut agent = Agent::install(&a, &controller, &format!("{WEB}\n{more}"))?;
        if hook {
            agent.install_hook()?;
        }
        agent.start()?;
        controller.wait_points("web", 3, SOON)?;
        Ok(Self { a, b, link, agent, controller, guest, boot, _rig: rig })
    }

    /// The host is dark and comes back, with its disks and nothing else.
    fn power_cut(&mut self) -> Result<()> {
        self.agent.kill9()?;
        self.a.power_cut();
        // It is in the agent's own folder here, and not in /run.
        Ok(fs::remove_dir_all(self.agent.dir().join("run"))?)
    }

    fn power_on(&self) -> Result<()> {
        self.a.power_on()?;
        self.link.plug()
    }

    fn fail_over(&self) -> Result<Guest> {
        self.controller.failover("web", "latest")?;
        let replica = self.b.guest("web")?;
        replica_unharmed(&replica, &self.boot, 0, SOON)?;
        Ok(replica)
    }

    /// What the agent shows; nothing while it does not answer.
    fn fence(&self) -> Value {
        self.agent.vm("web").map_or(Value::Null, |row| row["fence"].clone())
    }

    fn wait_verdict(&self, verdict: &str) -> Result<()> {
        eventually(SOON, &format!("the verdict to be {verdict}"), || {
            Ok((self.fence()["verdict"] == verdict).then_some(()))
        })
    }

    /// The copy that diverged is put away, whole, and shown.
    fn is_put_away(&self) -> Result<()> {
        let row = eventually(SOON, "the diverged state to be kept", || {
            let rows = self.diverged()?;
            Ok(rows.into_iter().find(|row| row["kept"][0]["memory_bytes"].as_u64().is_some()))
        })?;
        ensure!(row["name"] == "web" && row["fenced_by"] == 2, "{row}");
        self.guest.wait_for_state("shut off", SOON)?;
        let shown = self.agent.wait_state("web", "fenced", SOON)?;
        let said = eventually(SOON, "status to say so", || {
            let what = self.fence()["what"].as_str().unwrap_or_default().to_owned();
            Ok(what.contains("does not run any more").then_some(what))
        })?;
        ensure!(
            said.contains("diverged show web") && said.contains("diverged discard web"),
            "{said} {shown}"
        );
        Ok(())
    }

    fn diverged(&self) -> Result<Vec<Value>> {
        let text = self.agent.command()?.args(["diverged", "--json"]).run()?;
        Ok(serde_json::from_str::<Value>(&text)?.as_array().cloned().unwrap_or_default())
    }

    /// libvirt says no, with a reason.
    fn start_is_refused(&self, words: &str) -> Result<()> {
        let output = self.a.command("virsh").args(["-q", "-c", "qemu:///system", "start", "web"]).output()?;
        ensure!(!output.status.success() && output.stderr.contains(words), "{output:?}");
        ensure!(self.guest.state()? == "shut off", "{}", self.guest.state()?);
        Ok(())
    }

    fn ticks_on(&self) -> Result<()> {
        let then = self.guest.last().context("it ticked before")?.tick;
        self.guest.wait_for_tick(then + 3, SOON).map(drop)
    }
}

/// Goal: a host that comes back after its VM was failed over does not run it, whoever starts it and whatever runs there.
/// Method: power cut, failover, power; the guest starts with its host. With the agent off and on, by autostart and by hand.
#[test]
fn a_host_that_comes_back_after_a_failover_never_starts_the_vm_again() -> Result<()> {
    let mut world = World::new("fence-back", "", true)?;
    world.power_cut()?;
    let replica = world.fail_over()?;
    world.power_on()?;
    assert_eq!(world.guest.state()?, "shut off", "libvirt has started what starts with the host");
    world.start_is_refused("the site has not said yet")?;
    world.agent.start()?;
    world.agent.wait_state("web", "fenced", SOON)?;
    world.wait_verdict("fenced")?;
    world.start_is_refused("it was failed over to the site")?;
    world.agent.kill9()?;
    world.a.restart_libvirtd()?;
    world.start_is_refused("it was failed over to the site")?;
    world.power_cut()?;
    world.power_on()?;
    world.start_is_refused("the site has not said yet")?;
    assert_eq!(replica.state()?, "running");
    replica_unharmed(&replica, &world.boot, 0, SOON)?;
    Ok(())
}

/// Goal: without the hook, a copy that was started all the same is paused by the agent, before the site answers, and stays so.
/// Method: as above, with the hook taken away before the power comes back a second time, and no site to ask.
#[test]
fn a_fenced_copy_that_somebody_started_is_paused_before_anything_else() -> Result<()> {
    let mut world = World::new("fence-nohook", "", true)?;
    world.power_cut()?;
    world.fail_over()?;
    world.power_on()?;
    world.agent.start()?;
    world.agent.wait_state("web", "fenced", SOON)?;
    eventually(SOON, "it to be noted", || Ok((world.fence()["since"].is_u64()).then_some(())))?;
    world.agent.command()?.args(["hook", "remove"]).run()?;
    world.power_cut()?;
    world.controller.stop()?;
    world.power_on()?;
    world.guest.wait_for_state("running", SOON)?;
    world.agent.start()?;
    eventually(SOON, "the guest to be paused, or put away", || {
        Ok((world.guest.state()? != "running").then_some(()))
    })?;
    world.is_put_away()?;
    world.agent.command()?.args(["diverged", "discard", "web", "--yes"]).run()?;
    ensure!(
        world.diverged()?.iter().all(|row| row["kept"] == serde_json::json!([])),
        "{:?}",
        world.diverged()?
    );
    Ok(())
}

/// Goal: a power cut without a failover costs the guest nothing but the wait for the site's word; and if the site is lost as
/// well, its operator has the last word. Method: power cut and back, with the agent off, the site off, and both on.
#[test]
fn after_a_power_cut_the_vm_starts_when_the_site_has_answered_or_its_operator_says_so() -> Result<()> {
    let mut world = World::new("fence-boot", "", true)?;
    world.power_cut()?;
    world.controller.stop()?;
    world.power_on()?;
    assert_eq!(world.guest.state()?, "shut off");
    world.agent.start()?;
    world.wait_verdict("unsure")?;
    world.start_is_refused("the site has not said yet")?;
    world.controller.start()?;
    world.guest.wait_for_state("running", SOON)?;
    world.controller.wait_more_points("web", 2, SOON)?;

    world.power_cut()?;
    world.controller.stop()?;
    world.power_on()?;
    world.start_is_refused("the site has not said yet")?;
    let unasked = world.agent.command()?.args(["allow", "web"]).output()?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("--yes"), "{unasked:?}");
    world.start_is_refused("the site has not said yet")?;
    world.agent.command()?.args(["allow", "web", "--yes"]).run()?;
    world.guest.start()?;
    world.guest.wait_for_state("running", SOON)?;
    world.agent.start()?;
    world.controller.start()?;
    world.controller.wait_more_points("web", 2, SOON)?;
    world.wait_verdict("owner")
}

/// Goal: a live source that was failed over is paused at once, and what only it knows is kept, wherever its agent dies on the
/// way; it can be brought back as it stood. Method: kill the agent at each step of fencing, resume the guest behind its
/// back, restart libvirt; then lose the replica, and restore the copy.
#[test]
fn a_live_source_is_paused_and_its_state_kept_wherever_its_agent_dies() -> Result<()> {
    let mut world = World::new("fence-live", "", true)?;
    world.agent.stop()?;
    world.agent.env = killed_at("fence.refused");
    world.agent.start()?;
    world.controller.wait_more_points("web", 2, SOON)?;
    let replica = world.fail_over()?;
    for (step, place) in ["fence.refused", "fence.noted", "fence.paused", "fence.saving", "fence.saved"]
        .into_iter()
        .enumerate()
    {
        if step > 0 {
            world.agent.env = killed_at(place);
            world.agent.start()?;
        }
        let ended = world.agent.process()?.wait(SOON);
        ended.with_context(|| format!("the agent should die at {place}"))?;
        world.agent.kill9()?;
        eprintln!("the agent died at {place}: the guest is {}", world.guest.state()?);
        if place == "fence.paused" {
            // What the next agent finds was resumed behind the back of this one, and libvirt is another.
            world.guest.wait_for_state("paused", SOON)?;
            world.a.restart_libvirtd()?;
            world.guest.resume()?;
            world.guest.wait_for_state("running", SOON)?;
        }
    }
    world.agent.start()?;
    world.is_put_away()?;
    assert_eq!(replica.state()?, "running");

    let too_early = world.agent.command()?.args(["diverged", "restore", "web"]).output()?;
    ensure!(!too_early.status.success() && too_early.stderr.contains("allow"), "{too_early:?}");
    replica.destroy()?;
    world.controller.stop()?;
    world.agent.command()?.args(["allow", "web", "--yes"]).run()?;
    world.agent.command()?.args(["diverged", "restore", "web"]).run()?;
    world.guest.wait_for_state("running", SOON)?;
    world.ticks_on()?;
    let report = world.guest.wait_full_check(SOON)?;
    ensure!(report.boot == world.boot && report.unharmed(), "it is not where it stood: {report:?}");
    ensure!(world.diverged()?.is_empty(), "it would be of another moment than the disks");
    Ok(())
}

/// Goal: what an agent that died in a cut left in the guest's QEMU does not keep its state from being put away. Method: kill it
/// while disks are read, and fail the VM over before the next one starts.
#[test]
fn a_copy_whose_agent_died_in_a_cut_is_put_away_whole() -> Result<()> {
    let mut world = World::new("fence-cut", "", true)?;
    world.agent.stop()?;
    world.agent.env = killed_at("cut.reading:2");
    world.agent.start()?;
    world.agent.process()?.wait(SOON).context("the agent should die in a cut")?;
    ensure!(!left_in_qemu(&world.guest)?.is_empty(), "nothing stands in the way of a save");
    let replica = world.fail_over()?;
    world.agent.start()?;
    world.is_put_away()?;
    assert_eq!(replica.state()?, "running");
    Ok(())
}

/// Goal: a guest whose site does not answer is paused if so configured, goes on when the site says that nobody failed it
/// over, and never otherwise. Method: ten times cut the line and heal it, with the agent killed, libvirt restarted, the guest
/// resumed by hand meanwhile; the last time it was failed over.
#[test]
fn ten_times_cut_off_and_back_the_guest_never_runs_beside_its_replica() -> Result<()> {
    let more = "on_isolation = \"pause\"\nisolation_after = \"5s\"";
    let mut world = World::new("fence-cycles", more, true)?;
    let isolated = |world: &World| -> Result<()> {
        eventually(SOON, "the guest to be paused as the site is silent", || {
            let row = world.agent.vm("web").unwrap_or_default();
            let why = row["reason"].as_str().unwrap_or_default().to_owned();
            Ok((world.guest.state()? == "paused" && why.contains("on_isolation")).then_some(()))
        })
    };
    for cycle in 0..10 {
        world.link.cut()?;
        isolated(&world).with_context(|| format!("cycle {cycle}"))?;
        match cycle % 4 {
            0 => {}
            1 => {
                world.agent.kill9()?;
                world.agent.start()?;
                isolated(&world)?;
            }
            2 => {
                world.a.crash_libvirtd()?;
                isolated(&world)?;
            }
            _ => {
                world.guest.resume()?;
                isolated(&world).context("resumed by hand, it is paused again")?;
            }
        }
        world.link.restore()?;
        world.guest.wait_for_state("running", SOON).with_context(|| format!("cycle {cycle}"))?;
        world.ticks_on()?;
        world.controller.wait_more_points("web", 1, SOON)?;
        eprintln!("cycle {cycle}: gone on");
    }
    world.link.cut()?;
    isolated(&world)?;
    let replica = world.fail_over()?;
    assert_eq!(world.guest.state()?, "paused");
    world.link.restore()?;
    world.is_put_away()?;
    assert_eq!(replica.state()?, "running");
    replica_unharmed(&replica, &world.boot, 0, SOON)?;
    Ok(())
}

/// Goal: with a `fence_command` no replica starts before it has ended well. Method: a command that notes what it was told and
/// fails, then works; the controller dies right after it; another failover goes on without it, as it was told to.
#[test]
fn a_failover_waits_for_the_command_that_ends_the_source() -> Result<()> {
    let rig = Rig::new("stonith")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::install(&b)?;
    let dir = b.dir("stonith")?;
    let (script, said, ok) = (dir.join("stonith"), dir.join("said"), dir.join("ok"));
    let text = format!(
        "#!/bin/sh\necho \"$*\" >>{}\n[ -e {} ] || {{ echo the switch is dark >&2; exit 4; }}\n",
        said.display(),
        ok.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let config = dir.parent().context("the site's folder")?.join("lb/site.toml");
    let command = format!("fence_command = [\"{}\", \"{{vm}}\", \"on {{agent}}\"]\n", script.display());
    fs::write(&config, fs::read_to_string(&config)? + &command)?;
    controller.start()?;
    let specs = [small("web").disk(DiskFormat::Raw, 16), small("db")];
    for spec in &specs {
        a.define_and_start(spec)?.wait_for_tick(3, BOOT)?;
    }
    let _agent = Agent::protecting(&a, &controller, &["web", "db"], "500ms")?;
    for spec in &specs {
        controller.wait_points(&spec.name, 2, SOON)?;
    }
    a.power_cut();
    let failed = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    ensure!(!failed.status.success() && failed.stderr.contains("the switch is dark"), "{failed:?}");
    ensure!(failed.stderr.contains("--skip-fence-command"), "{failed:?}");
    ensure!(b.virsh(["list", "--all", "--name"])?.trim().is_empty(), "something was defined");
    ensure!(controller.vm("web")?["failover"]["phase"] == "fenced", "{}", controller.vm("web")?);

    fs::write(&ok, "")?;
    controller.stop()?;
    controller.env = killed_at("failover.source-stopped");
    controller.start()?;
    let broken_off = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    ensure!(!broken_off.status.success(), "{broken_off:?}");
    controller.kill9()?;
    ensure!(b.virsh(["list", "--all", "--name"])?.trim().is_empty(), "something was defined");
    controller.start()?;
    controller.failover("web", "latest")?;
    ensure!(b.guest("web")?.state()? == "running");
    assert_eq!(fs::read_to_string(&said)?, "web on A\n".repeat(3), "what it was told, each time");

    fs::remove_file(&ok)?;
    controller.json(&["failover", "db", "--emergency", "--yes", "--skip-fence-command"])?;
    ensure!(b.guest("db")?.state()? == "running");
    assert_eq!(fs::read_to_string(&said)?.lines().count(), 3, "it was run though it was to be skipped");
    Ok(())
}
