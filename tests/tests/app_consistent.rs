//! Points without memory whose file systems are frozen for the instant: what is in them, and that the guest is thawed
//! whatever becomes of the agent, of its watchdog, or of the agent in the guest. The witness is the guest's own writing: it
//! stands still as long as its file system is frozen.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use rig::{
    DiskFormat, Guest, Rig, Site, eventually,
    product::{Agent, Controller, killed_at, small},
};
use serde_json::Value;
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[defaults]\ninterval = \"300ms\"\nmax_pause = \"5s\"\nmemory = \"off\"\nconsistency = \"app\"\n\
                   freeze_limit = \"10s\"\n[[vm]]\nname = \"web\"";
const GROUP: &str = "[[group]]\nname = \"shop\"\nvms = [\"web\", \"plain\"]\nrpo = \"2s\"\nmemory = \"off\"\n\
                     consistency = \"app\"\n";

/// A guest at work whose file system is never synced by itself, with an agent in it, and the site.
struct Scene {
    a: Site,
    b: Site,
    controller: Controller,
    guest: Guest,
    _rig: Rig,
}

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, _) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let guest = a.define_and_start(&small("web").files(16))?;
        guest.wait_for_agent(BOOT)?;
        guest.wait_for_tick(2, BOOT)?;
        Ok(Self { a, b, controller, guest, _rig: rig })
    }
}

/// Goal: an app-consistent point holds what its guest had written and not synced, each member of a group says what its
/// point is, and a guest without an agent is cut all the same. Method: a group of a guest whose file system is never synced
/// by itself, and of one that has no agent.
#[test]
fn a_line_that_nobody_synced_is_in_an_app_consistent_point() -> Result<()> {
    let Scene { _rig, a, b, controller, guest } = Scene::new("app-point")?;
    let plain = a.define_and_start(&small("plain").disk(DiskFormat::Raw, 16))?;
    plain.wait_for_tick(3, BOOT)?;
    let mut agent =
        Agent::install(&a, &controller, "[defaults]\nmax_pause = \"10s\"\nfreeze_limit = \"20s\"")?;
    agent.start()?;
    let file = a.folder().join("groups.toml");
    fs::write(&file, GROUP)?;
    let file = file.display().to_string();
    eventually(SOON, "the group to be made", || {
        Ok(controller.cli(&["apply", "-f", &file])?.status.success().then_some(()))
    })?;
    let is = |point: &Value, name: &str, what: &str| {
        let members = point["members"].as_array().into_iter().flatten();
        members.clone().any(|member| member["name"] == name && member["consistency"] == what)
    };
    let right = |point: &Value| is(point, "web", "app") && is(point, "plain", "crash");
    let last = || Ok(controller.group_points("shop")?.pop().filter(right));
    eventually(SOON, "an app-consistent point of the one that has an agent", last)?;
    let written = guest.last().context("it reports")?.lines;
    let now = controller.group_points("shop")?.len();
    eventually(SOON, "a point after that", || {
        let points = controller.group_points("shop")?;
        Ok(points.iter().skip(now + 2).any(right).then_some(()))
    })?;
    let status = agent.vm("plain")?;
    let why = status["consistency"]["words"].as_str().unwrap_or_default();
    ensure!(status["consistency"]["attained"] == false && why.contains("no channel"), "{status}");
    let told = controller.vm("plain")?;
    ensure!(told.to_string().contains("no channel"), "the site is told why: {told}");
    let shown = controller.cli(&["points", "web"])?.success()?;
    ensure!(shown.contains("disks, app"), "{shown}");
    let shown = controller.cli(&["group", "points", "shop"])?.success()?;
    ensure!(shown.contains("disks, crash"), "as the weakest of its members: {shown}");
    a.power_cut();
    controller.failover("shop", "latest")?;
    let replica = b.guest("web")?.wait(BOOT, "the replica to boot", |report| report.tick >= 1)?;
    ensure!(replica.found >= written, "of {written} lines it has {}", replica.found);
    ensure!(replica.unharmed() && b.guest("web")?.console().complaints().is_empty(), "{replica:?}");
    Ok(())
}

/// Goal: a planned failover without memory loses nothing that was written before it, synced or not. Method: the same guest;
/// its last point is cut while it stands, when nobody could freeze it any more.
#[test]
fn a_planned_failover_without_memory_takes_along_what_nobody_synced() -> Result<()> {
    let Scene { _rig, a, b, controller, guest } = Scene::new("flushed")?;
    let mut agent =
        Agent::install(&a, &controller, "[defaults]\nmax_pause = \"10s\"\nfreeze_limit = \"20s\"")?;
    agent.start()?;
    let group =
        ["group", "create", "shop", "--vm", "web", "--rpo", "2s", "--memory", "off", "--consistency", "app"];
    eventually(SOON, "the group to be made", || Ok(controller.cli(&group)?.status.success().then_some(())))?;
    controller.wait_more_group_points("shop", 1, SOON)?;
    let written = guest.wait(SOON, "it to write", |report| report.lines > 5)?.lines;
    controller.json(&["failover", "shop", "--planned", "--yes"])?;
    let replica = b.guest("web")?.wait(BOOT, "the replica to boot", |report| report.tick >= 1)?;
    ensure!(replica.found >= written, "of {written} lines it has {}", replica.found);
    ensure!(guest.state()? == "shut off", "the source is off");
    Ok(())
}

/// Goal: no guest stays frozen. Method: the agent is killed at each step of a freeze, and hangs at those between freeze and
/// thaw; then it dies together with its watchdog, which is for the service manager to notice.
#[test]
fn a_guest_that_was_frozen_is_thawed_wherever_its_agent_dies_or_hangs() -> Result<()> {
    let Scene { _rig, a, controller, guest, .. } = Scene::new("thawed")?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    for place in
        ["freeze.guarded", "freeze.frozen", "cut.disks-marked", "freeze.before-thaw", "freeze.thawed"]
    {
        agent.env = killed_at(place);
        agent.start()?;
        agent.process()?.wait(SOON).with_context(|| format!("the agent should die at {place}"))?;
        ensure!(agent.process()?.killed_by(Signal::SIGKILL), "at {place} it ended by itself");
        writes_on(&guest).with_context(|| format!("after the agent died at {place}"))?;
    }
    agent.env = vec![("LIFEBOAT_STOP_AT".into(), "freeze.frozen:1,freeze.before-thaw:2".into())];
    agent.start()?;
    for _ in 0..2 {
        agent.wait_frozen(SOON)?;
        writes_on(&guest).context("while the agent hangs")?;
        agent.process()?.thaw()?;
    }
    agent.kill9()?;
    agent.env = vec![("LIFEBOAT_STOP_AT".into(), "freeze.frozen".into())];
    agent.start()?;
    agent.wait_frozen(SOON)?;
    for watchdog in agent.watchdogs()? {
        kill(watchdog, Signal::SIGKILL)?;
    }
    agent.kill9()?;
    agent.command()?.arg("release-paused").run()?;
    writes_on(&guest).context("after agent and watchdog died")?;
    agent.start()?;
    app_consistent_again(&controller)
}

/// Goal: a silent agent in the guest costs nothing but consistency, and that only for as long as it is silent. Method: it
/// stops itself, and is woken up later from within.
#[test]
fn a_guest_whose_agent_is_silent_gets_crash_consistent_points_that_say_why() -> Result<()> {
    let Scene { _rig, a, controller, guest, .. } = Scene::new("silent")?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    app_consistent_again(&controller)?;
    // Its answer may get lost, and that be noticed late.
    let asked = guest.run_inside("P=$(pidof qemu-ga); (sleep 40; kill -CONT $P) & kill -STOP $P");
    eventually(SOON, "a point that is crash-consistent, and why", || {
        let crash = controller.points("web")?.last().is_some_and(|point| point["consistency"] == "crash");
        let told = agent.vm("web")?["consistency"].clone();
        let why = told["words"].as_str().unwrap_or_default();
        Ok((crash && told["attained"] == false && why.contains("did not answer")).then_some(()))
    })
    .with_context(|| format!("the guest was told to stop its agent: {asked:?}"))?;
    writes_on(&guest)?;
    app_consistent_again(&controller)?;
    writes_on(&guest)
}

fn app_consistent_again(controller: &Controller) -> Result<()> {
    let now = controller.points("web").map_or(0, |points| points.len());
    eventually(SOON, "an app-consistent point", || {
        let points = controller.points("web").unwrap_or_default();
        Ok(points.iter().skip(now).any(|point| point["consistency"] == "app").then_some(()))
    })
}

fn writes_on(guest: &Guest) -> Result<()> {
    let lines = guest.last().context("it reports")?.lines;
    guest.wait(SOON, "it to write on", |report| report.lines > lines + 2)?;
    Ok(())
}
