//! Failovers of a group of three on two source hosts and a site: planned, with nothing lost and never both running, for trial,
//! and emergency.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, Shape, Site, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small},
};
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Two source hosts, with one guest and with two, in one group, and the site.
struct Scene {
    hosts: [Site; 2],
    agents: [Agent; 2],
    guests: Vec<Guest>,
    boots: Vec<String>,
    site: Site,
    controller: Controller,
    _links: [Link; 2],
    _rig: Rig,
}

const NAMES: [&str; 3] = ["web", "db", "mail"];
/// The host of each.
const HOSTS: [usize; 3] = [0, 1, 1];

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (one, two, site) = (rig.site("A1")?, rig.site("A2")?, rig.site("B")?);
        let links = [rig.link(&one, &site, Shape::default())?, rig.link(&two, &site, Shape::default())?];
        let controller = Controller::running(&site)?;
        let hosts = [one, two];
        let start =
            |(vm, host): (&&str, usize)| hosts[host].define_and_start(&small(vm).disk(DiskFormat::Raw, 16));
        let guests = NAMES.iter().zip(HOSTS).map(start).collect::<Result<Vec<_>>>()?;
        let boots = guests.iter().map(|guest| Ok(guest.wait_for_tick(2, BOOT)?.boot));
        let boots = boots.collect::<Result<Vec<_>>>()?;
        let begin = |host: &Site| {
            let mut agent = Agent::install(host, &controller, "[defaults]\nmax_pause = \"5s\"")?;
            agent.start()?;
            anyhow::Ok(agent)
        };
        let agents = [begin(&hosts[0])?, begin(&hosts[1])?];
        let scene = Self { hosts, agents, guests, boots, site, controller, _links: links, _rig: rig };
        eventually(SOON, "the group to be made", || {
            let members: Vec<&str> = NAMES.iter().flat_map(|name| ["--vm", name]).collect();
            let command = [&["group", "create", "shop", "--rpo", "2s"], members.as_slice()].concat();
            let made = scene.controller.cli(&command)?;
            Ok(made.status.success().then_some(()))
        })?;
        scene.controller.wait_more_group_points("shop", 2, SOON)?;
        Ok(scene)
    }

    /// Which copies run: the sources, and the replicas.
    fn running(&self) -> Result<[[bool; 3]; 2]> {
        let list = |site: &Site| site.virsh(["list", "--name", "--state-running"]);
        let at_sources = [list(&self.hosts[0])?, list(&self.hosts[1])?];
        let here = list(&self.site)?;
        let runs = |list: &str, vm: &str| list.lines().any(|name| name.trim() == vm);
        let of = |at: usize| runs(&at_sources[HOSTS[at]], NAMES[at]);
        Ok([[of(0), of(1), of(2)], NAMES.map(|name| runs(&here, name))])
    }

    /// All replicas run, go on where the sources stood, and no source runs.
    fn failed_over(&self) -> Result<()> {
        for (at, name) in NAMES.iter().enumerate() {
            let last = self.guests[at].last().context("the source said nothing")?;
            let replica = self.site.guest(name)?;
            replica.wait(SOON, "the replica to report", |_| true)?;
            let first = replica.console().reports().remove(0);
            // Nothing is lost: it goes on with the very next tick. The console may lag one behind memory.
            ensure!(first.boot == self.boots[at] && first.tick >= last.tick, "{first:?} after {last:?}");
            ensure!(first.tick <= last.tick + 2, "{first:?} after {last:?}");
            replica_unharmed(&replica, &self.boots[at], first.tick, SOON)?;
        }
        ensure!(self.running()? == HERE, "{:?}", self.running()?);
        Ok(())
    }
}

const THERE: [[bool; 3]; 2] = [[true; 3], [false; 3]];
const HERE: [[bool; 3]; 2] = [[false; 3], [true; 3]];

/// No source runs beside its replica.
fn never_both(running: [[bool; 3]; 2]) -> Result<()> {
    let [sources, replicas] = running;
    for (at, name) in NAMES.iter().enumerate() {
        ensure!(!(sources[at] && replicas[at]), "{name} runs at both sites: {running:?}");
    }
    Ok(())
}

/// Goal: a planned failover loses nothing, and in the end the replicas run and the sources are off for good. Method:
/// three guests at work on two hosts; their own counters, memory and disks are the witnesses.
#[test]
fn a_planned_failover_of_a_group_loses_nothing_and_shuts_the_sources_off() -> Result<()> {
    let mut scene = Scene::new("planned")?;
    let older = scene.controller.cli(&["failover", "shop", "--planned", "--point", "1m", "--yes"])?;
    ensure!(older.status.code() == Some(2) && older.stderr.contains("cannot be used with"), "{older:?}");
    let unasked = scene.controller.cli(&["failover", "shop", "--planned"])?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("nothing is lost"), "{unasked:?}");
    // They may stand for a cut at this moment.
    eventually(SOON, "the sources to run on", || Ok((scene.running()? == THERE).then_some(())))?;
    let report = scene.controller.json(&["failover", "shop", "--planned", "--yes"])?;
    ensure!(report["kind"] == "planned" && report["rpo_ms"] == 0, "{report}");
    ensure!(report["members"].as_array().is_some_and(|members| members.len() == 3), "{report}");
    scene.failed_over()?;
    // Neither a restarted agent nor an autostart brings a source back.
    for agent in &mut scene.agents {
        agent.stop()?;
        agent.start()?;
    }
    let again = scene.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
    ensure!(!again.status.success() && again.stderr.contains("already"), "{again:?}");
    ensure!(scene.running()? == HERE);
    Ok(())
}

/// Goal: wherever the controller dies, a planned failover is called off and the sources go on, or it goes on to its end;
/// never do source and replica run both. Method: it is killed at each step, in turn; until the commit the same group can
/// be tried again.
#[test]
fn a_planned_failover_ends_well_wherever_its_controller_dies() -> Result<()> {
    let mut scene = Scene::new("planned-killed")?;
    for step in ["planned.begun", "planned.named", "planned.restored", "planned.committed"] {
        scene.controller.stop()?;
        scene.controller.env = killed_at(step);
        scene.controller.start()?;
        scene.controller.wait_more_group_points("shop", 1, SOON)?;
        let ended = scene.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
        ensure!(!ended.status.success(), "{step}: {ended:?}");
        never_both(scene.running()?)?;
        scene.controller.kill9()?;
        scene.controller.start()?;
        if step == "planned.committed" {
            eventually(SOON, "the failover to go on", || {
                let running = scene.running()?;
                never_both(running)?;
                Ok((running == HERE).then_some(()))
            })?;
        } else {
            eventually(SOON, &format!("the sources to go on after {step}"), || {
                let running = scene.running()?;
                ensure!(running[1] == [false; 3], "a replica runs: {running:?}");
                Ok((running == THERE).then_some(()))
            })?;
            scene.controller.wait_more_group_points("shop", 1, SOON)?;
        }
    }
    scene.failed_over()
}

/// Goal: a drill, and an emergency failover with the primary dark, take all members of a group to one instant, also to one
/// that is named. Method: the drill is of an older point, by its id; the failover of another one, by its time.
#[test]
fn a_drill_and_an_emergency_failover_of_a_group_take_all_members_to_one_instant() -> Result<()> {
    let scene = Scene::new("group-emergency")?;
    let older = scene.controller.wait_more_group_points("shop", 2, SOON)?.pop().context("group points")?;
    let cut = older["cut"].as_str().context("its id")?;
    let drill = scene.controller.json(&["drill", "shop", "--point", cut])?;
    ensure!(drill["passed"] == true && drill["cut_at"] == older["cut_at"], "{drill:#}");
    let members = drill["members"].as_array().context("members")?;
    for (member, part) in members.iter().zip(older["members"].as_array().context("members")?) {
        ensure!(member["point"] == part["point"] && member["resumes"] == true, "{member:#} {part:#}");
    }
    ensure!(members.len() == 3, "{drill:#}");
    eventually(SOON, "the sources to run on", || Ok((scene.running()? == THERE).then_some(())))?;
    scene.controller.wait_more_group_points("shop", 2, SOON)?;
    scene.hosts.iter().for_each(Site::power_cut);
    let dry = scene.controller.cli(&["failover", "shop", "--emergency", "--dry-run"])?.success()?;
    ensure!(dry.contains("LOST"), "{dry}");
    // No point comes any more.
    let points = scene.controller.group_points("shop")?;
    let (newest, before) = (&points[points.len() - 1], &points[points.len() - 2]);
    let shown = scene.controller.cli(&["group", "points", "shop"])?.success()?;
    ensure!(shown.contains("SKEW") && shown.contains("memory"), "{shown}");
    let at = i64::try_from(before["cut_at"].as_u64().context("its time")?)?;
    let at = jiff::Timestamp::from_millisecond(at)?.to_string();
    let named = scene.controller.json(&["failover", "shop", "--emergency", "--dry-run", "--point", &at])?;
    ensure!(named["cut_at"] == before["cut_at"], "{named} {before}");
    let report = scene.controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(report["cut_at"] == newest["cut_at"], "{report} {newest}");
    for (at, name) in NAMES.iter().enumerate() {
        replica_unharmed(&scene.site.guest(name)?, &scene.boots[at], 0, SOON)?;
    }
    Ok(())
}
