//! Groups: VMs of several hosts are protected as one, with points of all of them at one instant; what operators do with
//! groups, on two source hosts and a site, through the commands that they type.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, Shape, Site, eventually,
    product::{Agent, Controller, killed_at, small},
    stillness::Stillness,
};
use serde_json::Value;
use std::{fs, path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Two source hosts, each with its agent, and the site.
struct Scene {
    hosts: [Site; 2],
    agents: [Agent; 2],
    site: Site,
    controller: Controller,
    _links: [Link; 2],
    _rig: Rig,
}

impl Scene {
    /// Agents whose configuration names no VM: the site's groups say what is protected.
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (one, two, site) = (rig.site("A1")?, rig.site("A2")?, rig.site("B")?);
        let links = [rig.link(&one, &site, Shape::default())?, rig.link(&two, &site, Shape::default())?];
        let controller = Controller::running(&site)?;
        let agent = |host: &Site| {
            let mut agent = Agent::install(host, &controller, "[defaults]\nmax_pause = \"5s\"")?;
            agent.start()?;
            anyhow::Ok(agent)
        };
        let agents = [agent(&one)?, agent(&two)?];
        Ok(Self { hosts: [one, two], agents, site, controller, _links: links, _rig: rig })
    }

    /// A guest at work on a host.
    fn guest(&self, host: usize, name: &str) -> Result<Guest> {
        let guest = self.hosts[host].define_and_start(&small(name).disk(DiskFormat::Raw, 16))?;
        guest.wait_for_tick(2, BOOT)?;
        Ok(guest)
    }

    /// Waits until the site knows of these VMs.
    fn wait_known(&self, names: &[&str]) -> Result<()> {
        eventually(SOON, "the site to know the VMs", || {
            let list = self.controller.json(&["inventory"])?;
            let rows = list["vms"].as_array().cloned().unwrap_or_default();
            let known = |name: &&str| rows.iter().any(|row| row["name"] == *name && row["running"] == true);
            Ok(names.iter().all(known).then_some(()))
        })
    }

    fn group(&self, arguments: &[&str]) -> Result<Value> {
        self.controller.json(&[&["group"], arguments].concat())
    }
}

/// Goal: a group point is one instant: there is a moment at which all members stood, by QEMU's own times of their stops.
/// Method: three guests on two hosts, all at work; each group point is held against the stops of each.
#[test]
fn a_group_point_is_of_one_instant_across_hosts() -> Result<()> {
    let scene = Scene::new("group-instant")?;
    let guests = [scene.guest(0, "web")?, scene.guest(1, "db")?, scene.guest(1, "mail")?];
    scene.wait_known(&["web", "db", "mail"])?;
    let watches = guests.iter().map(Stillness::watch).collect::<Result<Vec<_>>>()?;
    scene.group(&["create", "shop", "--vm", "web", "--vm", "db", "--vm", "mail", "--rpo", "2s"])?;
    scene.controller.wait_more_group_points("shop", 2, SOON)?;
    let before = scene.controller.group_points("shop")?.len();
    let points = scene.controller.wait_more_group_points("shop", 8, SOON)?;
    let mut seen = 0;
    for point in &points[before..] {
        let cut_at = Duration::from_millis(point["cut_at"].as_u64().context("cut_at")?);
        // One machine, one clock: the stop of this cut is the first one after it was ordered.
        let stop_of = |watch: &Stillness| watch.stops().into_iter().find(|(stop, _)| *stop >= cut_at);
        let stops: Option<Vec<_>> = watches.iter().map(stop_of).collect();
        let stops = stops.with_context(|| format!("a guest did not stop for {point}"))?;
        let last_stop = stops.iter().map(|(stop, _)| *stop).max().context("stops")?;
        let first_resume = stops.iter().map(|(_, resume)| *resume).min().context("stops")?;
        ensure!(last_stop <= first_resume, "they never stood together: {stops:?} in {point}");
        ensure!(last_stop - cut_at < Duration::from_secs(5), "another cut's stop: {stops:?} in {point}");
        ensure!(point["members"].as_array().is_some_and(|members| members.len() == 3), "{point}");
        ensure!(point["skew_us"].is_u64(), "{point}");
        seen += 1;
    }
    ensure!(seen >= 8, "{seen} points");
    // Each member's own points bear the instant of the group's.
    for member in points.last().and_then(|point| point["members"].as_array()).context("members")? {
        let name = member["name"].as_str().context("name")?;
        let own = scene.controller.points(name)?;
        let own = own.iter().find(|own| own["point"] == member["point"]).context("the member's point")?;
        ensure!(own["cut_at"] == points.last().context("points")?["cut_at"], "{own}");
        ensure!(own["has_memory"] == true, "{own}");
    }
    let row = scene.group(&["show", "shop"])?;
    ensure!(row["state"] == "protected" || row["state"] == "late", "{row}");
    for guest in &guests {
        // It may stand for a cut at this moment.
        guest.wait_for_state("running", SOON)?;
        guest.wait_full_check(SOON)?;
    }
    Ok(())
}

/// Goal: what is partial is never offered, and the group goes on by itself. Method: one host's agent is killed, also in the
/// moment in which its guest stands with the others; then the controller, in the middle of the cuts.
#[test]
fn a_partial_group_point_is_never_offered_and_the_group_goes_on() -> Result<()> {
    let mut scene = Scene::new("group-partial")?;
    let guests = [scene.guest(0, "web")?, scene.guest(1, "db")?];
    scene.wait_known(&["web", "db"])?;
    scene.group(&["create", "shop", "--vm", "web", "--vm", "db", "--rpo", "2s"])?;
    scene.controller.wait_more_group_points("shop", 2, SOON)?;

    scene.agents[1].kill9()?;
    scene.agents[1].env = killed_at("together.stands:2");
    scene.agents[1].start()?;
    eventually(SOON, "the agent to die where it was told to", || {
        Ok((!scene.agents[1].process()?.running()).then_some(()))
    })?;
    for guest in &guests {
        guest.wait_for_state("running", SOON)?;
    }
    // The other member goes on to get points of its own.
    scene.controller.wait_more_points("web", 2, SOON)?;
    let row = eventually(SOON, "the group to say who holds it up", || {
        let row = scene.group(&["show", "shop"])?;
        Ok(row["reason"].as_str().is_some_and(|why| why.contains("db")).then_some(row))
    })?;
    whole(&scene, &row)?;
    scene.agents[1].start()?;
    scene.controller.wait_more_group_points("shop", 3, SOON)?;

    let before = scene.controller.group_points("shop")?;
    scene.controller.kill9()?;
    scene.controller.start()?;
    let after = scene.controller.wait_more_group_points("shop", 3, SOON)?;
    ensure!(after.starts_with(&before), "what was offered stays: {before:?} {after:?}");
    whole(&scene, &scene.group(&["show", "shop"])?)?;
    for guest in &guests {
        guest.wait_full_check(SOON)?;
    }
    Ok(())
}

/// Every group point that is offered has a whole point of each member.
fn whole(scene: &Scene, row: &Value) -> Result<()> {
    let members = row["group"]["members"].as_array().context("members")?.len();
    for point in scene.controller.group_points("shop")? {
        let of = point["members"].as_array().context("members")?;
        ensure!(of.len() == members, "{point}");
        for member in of {
            let own = scene.controller.points(member["name"].as_str().context("name")?)?;
            ensure!(
                own.iter().any(|own| own["point"] == member["point"] && own["state"] == "ok"),
                "{member}"
            );
        }
    }
    Ok(())
}

/// Goal: groups are what their operator says, at once and after restarts. Method: every command, on one host with two VMs.
#[test]
fn groups_are_made_changed_and_forgotten_without_losing_points() -> Result<()> {
    let mut scene = Scene::new("group-commands")?;
    let _guests = [scene.guest(0, "web")?, scene.guest(0, "db")?];
    scene.wait_known(&["web", "db"])?;
    let refused = scene.controller.cli(&["group", "create", "shop", "--vm", "ghost"])?;
    ensure!(!refused.status.success() && refused.stderr.contains("lifeboat inventory"), "{refused:?}");
    scene.group(&["create", "shop", "--vm", "web", "--rpo", "2s"])?;
    scene.controller.wait_more_group_points("shop", 2, SOON)?;
    let twice = scene.controller.cli(&["group", "create", "other", "--vm", "web"])?;
    ensure!(!twice.status.success() && twice.stderr.contains("group `shop`"), "{twice:?}");

    scene.group(&["add", "shop", "db"])?;
    eventually(SOON, "points of both", || {
        let points = scene.controller.group_points("shop")?;
        let both = |point: &Value| point["members"].as_array().is_some_and(|members| members.len() == 2);
        Ok(points.last().is_some_and(both).then_some(()))
    })?;
    scene.group(&["rename", "shop", "store"])?;
    let set = scene.group(&["set", "store", "--keep", "all for 2h", "--memory", "on"])?;
    let spec = &set["group"]["spec"];
    ensure!(spec["keep"][0] == "all for 2h" && spec["memory"] == "on" && spec["rpo"] == "2s", "{set}");
    scene.group(&["pause", "store"])?;
    scene.agents[0].wait_state("web", "yielding", SOON)?;
    ensure!(scene.agents[0].vm("web")?["group"] == "store");
    let paused = scene.controller.points("web")?.len();
    scene.agents[0].stop()?;
    scene.agents[0].start()?;
    scene.controller.stop()?;
    scene.controller.start()?;
    scene.agents[0].wait_state("web", "yielding", SOON)?;
    ensure!(scene.controller.points("web")?.len() == paused, "no point while it is paused");
    scene.group(&["resume", "store"])?;
    scene.controller.wait_more_group_points("store", 2, SOON)?;

    let file = scene.site.dir("lb")?.join("groups.toml");
    fs::write(&file, "[[group]]\nname = \"store\"\nvms = [\"web\"]\nrpo = \"4s\"\n")?;
    let path = file.display().to_string();
    let would = scene.controller.json(&["apply", "-f", &path, "--diff"])?;
    ensure!(would[0]["what"] == "change", "{would}");
    ensure!(scene.group(&["show", "store"])?["group"]["spec"]["rpo"] == "2s", "only shown");
    scene.controller.json(&["apply", "-f", &path])?;
    let again = scene.controller.json(&["apply", "-f", &path])?;
    ensure!(again[0]["what"] == "keep", "{again}");
    // The VM that left is no longer protected, and its points are there.
    eventually(SOON, "db to be left alone", || Ok(scene.agents[0].vm("db").is_err().then_some(())))?;
    ensure!(!scene.controller.points("db")?.is_empty());

    let unasked = scene.controller.cli(&["group", "delete", "store"])?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("--yes"), "{unasked:?}");
    let points = scene.controller.points("web")?.len();
    let history = scene.controller.group_points("store")?;
    scene.group(&["delete", "store", "--yes"])?;
    ensure!(scene.group(&["list"])?.as_array().is_some_and(Vec::is_empty));
    ensure!(scene.controller.points("web")?.len() >= points, "its VMs' points stay");

    // What a file does not name goes only if that is asked for, and confirmed. What is made again has its history.
    scene.controller.json(&["apply", "-f", &path])?;
    let now = scene.controller.group_points("store")?;
    ensure!(history.len() > 4 && history.iter().all(|point| now.contains(point)), "{history:?} {now:?}");
    fs::write(&file, "")?;
    ensure!(scene.controller.json(&["apply", "-f", &path])?.as_array().is_some_and(Vec::is_empty));
    ensure!(scene.controller.json(&["apply", "-f", &path, "--prune", "--diff"])?[0]["what"] == "delete");
    let unasked = scene.controller.cli(&["apply", "-f", &path, "--prune"])?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("--yes"), "{unasked:?}");
    ensure!(scene.group(&["list"])?.as_array().is_some_and(|rows| rows.len() == 1));
    scene.controller.json(&["apply", "-f", &path, "--prune", "--yes"])?;
    ensure!(scene.group(&["list"])?.as_array().is_some_and(Vec::is_empty));
    moved_between_groups(&scene, &file)
}

/// A file says where VMs are, and not in which order they are to get there; one that is wrong anywhere changes nothing.
fn moved_between_groups(scene: &Scene, file: &Path) -> Result<()> {
    let path = file.display().to_string();
    let apply = |text: &str, more: &[&str]| -> Result<Value> {
        fs::write(file, text)?;
        scene.controller.json(&[&["apply", "-f", &path], more].concat())
    };
    let group = |name: &str, vms: &str| format!("[[group]]\nname = \"{name}\"\nvms = [{vms}]\n");
    let after = "[group.runbook.vm.web]\nafter = [\"db\"]\n";
    let both = group("store", "\"web\", \"db\"") + after;
    fs::write(file, both.clone() + &group("mail", "\"mail\"") + "rpo = \"soon\"\n")?;
    let wrong = scene.controller.cli(&["apply", "-f", &path])?;
    ensure!(!wrong.status.success() && wrong.stderr.contains("rpo"), "{wrong:?}");
    ensure!(scene.group(&["list"])?.as_array().is_some_and(Vec::is_empty), "half of it was done");
    apply(&both, &[])?;
    // Its member that waited for the one that goes waits for nobody then.
    let apart = group("mail", "\"db\"") + &group("store", "\"web\"");
    let done = apply(&apart, &[])?;
    ensure!(done[0]["what"] == "create" && done[1]["what"] == "change", "{done}");
    let again = apply(&apart, &[])?;
    ensure!(again[0]["what"] == "keep" && again[1]["what"] == "keep", "{again}");
    let done = apply(&both.replace("store", "shop"), &["--prune", "--yes"])?;
    let what = |at: usize| done[at]["what"].as_str().unwrap_or_default();
    ensure!((what(0), what(1), what(2)) == ("create", "delete", "delete"), "{done}");
    let left = scene.group(&["remove", "shop", "db"])?;
    ensure!(left["group"]["spec"]["vms"].as_array().is_some_and(|vms| vms.len() == 1), "{left}");
    ensure!(
        left["group"]["spec"]["runbook"]["vm"]["web"]["after"].as_array().is_some_and(Vec::is_empty),
        "{left}"
    );
    Ok(())
}
