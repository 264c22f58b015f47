//! A site of several KVM hosts: a second libvirtd beside the site's own, reached as a host elsewhere is. Replicas run
//! where their runbook lets them and there is room; a host that is gone is passed over, and none of its replicas is
//! started twice.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Link, Rig, SecondHost, Site, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small},
};
use serde_json::Value;
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

struct Scene {
    a: Site,
    b: Site,
    second: SecondHost,
    controller: Controller,
    guests: Vec<Guest>,
    boots: Vec<String>,
    _agent: Agent,
    _link: Link,
    _rig: Rig,
}

impl Scene {
    /// Guests at work at A, in a group of that name; `order` of the site's hosts, `one` and `two`.
    fn new(name: &str, vms: &[&str], order: [&str; 2], runbook: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let second = SecondHost::new(&b)?;
        let mut controller = Controller::install(&b)?;
        for host in order {
            let uri = if host == "two" { second.uri() } else { "qemu:///system".to_owned() };
            let lines = format!("name = \"{host}\"\nuri = \"{uri}\"\nmemory_reserve = \"1MiB\"\n");
            controller.configure(&format!("[[host]]\n{lines}"))?;
        }
        controller.start()?;
        let (mut guests, mut boots) = (Vec::new(), Vec::new());
        for vm in vms {
            guests.push(a.define_and_start(&small(vm).disk(DiskFormat::Raw, 16))?);
        }
        for guest in &guests {
            boots.push(guest.wait_for_tick(3, BOOT)?.boot);
        }
        let mut agent = Agent::install(&a, &controller, "[defaults]\nmax_pause = \"5s\"")?;
        agent.start()?;
        let file = a.folder().join("groups.toml");
        fs::write(&file, format!("[[group]]\nname = \"shop\"\nvms = {vms:?}\nrpo = \"1s\"\n{runbook}"))?;
        let file = file.display().to_string();
        eventually(SOON, "the group to be made", || {
            Ok(controller.cli(&["apply", "-f", &file])?.status.success().then_some(()))
        })?;
        controller.wait_more_group_points("shop", 2, SOON)?;
        Ok(Self { a, b, second, controller, guests, boots, _agent: agent, _link: link, _rig: rig })
    }

    /// What runs, and what is defined besides, at the one host and at the other.
    fn at_hosts(&self, list: &[&str]) -> Result<[Vec<String>; 2]> {
        let names = |text: String| {
            let mut names: Vec<String> = text.lines().map(str::trim).map(str::to_owned).collect();
            names.retain(|name| !name.is_empty());
            names.sort();
            names
        };
        Ok([names(self.b.virsh(list)?), names(self.second.virsh(list)?)])
    }

    fn check(&self) -> Result<(String, String)> {
        let said = self.controller.cli(&["check", "shop", "--json"])?;
        let found: Value = serde_json::from_str(&said.stdout)?;
        Ok((found[0]["verdict"].as_str().unwrap_or_default().to_owned(), found[0]["findings"].to_string()))
    }

    fn becomes(&self, verdict: &str, words: &[&str]) -> Result<()> {
        let mut last = None;
        let done = eventually(SOON, &format!("`lifeboat check` to say {verdict} {words:?}"), || {
            let (said, findings) = self.check()?;
            let fits = said == verdict && words.iter().all(|word| findings.contains(word));
            last = Some((said, findings));
            Ok(fits.then_some(()))
        });
        done.map_err(|error| error.context(format!("{last:?}")))
    }
}

const ALL: &[&str] = &["list", "--all", "--name"];
const RUNNING: &[&str] = &["list", "--name"];

const EACH_ITS_OWN: &str = "[group.runbook.vm.web]
hosts = [\"one\"]
[group.runbook.vm.db]
hosts = [\"two\"]
";

/// Goal: each replica runs at the host that its runbook names, and nowhere else, whether it is tried, failed over by a
/// controller that dies on the way, or taken to another point; a host that does not answer and may have a replica stops
/// what would start it twice. Method: two guests at work, one for each host; the controller is killed when the images
/// were made, and when the first replica was started; the second host's libvirtd is stopped while its replica runs.
#[test]
fn replicas_run_at_the_hosts_that_they_may_and_nowhere_twice_wherever_the_controller_dies() -> Result<()> {
    let mut scene = Scene::new("placement", &["web", "db"], ["one", "two"], EACH_ITS_OWN)?;
    scene.becomes("ready", &["it would start at host one", "it would start at host two"])?;
    let dry = scene.controller.cli(&["failover", "shop", "--emergency", "--dry-run"])?.success()?;
    ensure!(dry.contains("web starts at host one") && dry.contains("db starts at host two"), "{dry}");
    let dry = scene.controller.json(&["failover", "shop", "--planned", "--dry-run"])?;
    ensure!(dry["hosts"]["placed"].as_array().is_some_and(|placed| placed.len() == 2), "{dry:#}");
    drilled(&scene)?;

    let older = scene.controller.group_points("shop")?.pop().context("group points")?;
    scene.controller.wait_more_group_points("shop", 2, SOON)?;
    scene.a.power_cut();
    for step in ["group.restored", "failover.started"] {
        scene.controller.stop()?;
        scene.controller.env = killed_at(step);
        scene.controller.start()?;
        let broken = scene.controller.cli(&["failover", "shop", "--emergency", "--yes"])?;
        ensure!(!broken.status.success(), "{step}: {broken:?}");
        scene.controller.kill9()?;
        scene.controller.start()?;
    }
    let report = scene.controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    for (at, host) in ["one", "two"].iter().enumerate() {
        ensure!(report["members"][at]["host"] == *host, "{report:#}");
    }
    let each = [vec!["web".to_owned()], vec!["db".to_owned()]];
    ensure!(scene.at_hosts(ALL)? == each && scene.at_hosts(RUNNING)? == each, "{:?}", scene.at_hosts(ALL)?);
    let replicas = [scene.b.guest("web")?, scene.second.guest("db")];
    for (replica, boot) in replicas.iter().zip(&scene.boots) {
        replica_unharmed(replica, boot, 0, SOON)?;
    }
    unanswered(&mut scene)?;

    let no = older["no"].as_u64().context("its number")?;
    let cut = older["cut"].as_str().context("its id")?.to_owned();
    scene
        .controller
        .json(&["undo", "shop", "--point", &cut, "--yes"])
        .with_context(|| format!("point {no}"))?;
    ensure!(scene.at_hosts(ALL)? == each && scene.at_hosts(RUNNING)? == each, "{:?}", scene.at_hosts(ALL)?);
    let history = scene.controller.json(&["report", "db"])?["subjects"][0]["failovers"].clone();
    ensure!(
        history.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(|of| of["host"] == "two")),
        "{history}"
    );
    Ok(())
}

/// A drill is at both hosts, and nothing of it is left at either.
fn drilled(scene: &Scene) -> Result<()> {
    let kept = scene.controller.json(&["drill", "shop", "--keep"])?;
    ensure!(kept["passed"] == true, "{kept:#}");
    let hosts: Vec<&Value> =
        kept["members"].as_array().context("members")?.iter().map(|of| &of["host"]["name"]).collect();
    ensure!(hosts == ["one", "two"], "{kept:#}");
    let [one, two] = scene.at_hosts(RUNNING)?;
    ensure!(
        one.len() == 1 && one[0].starts_with("web-drill") && two.len() == 1 && two[0].starts_with("db-drill"),
        "{one:?} {two:?}"
    );
    let ended = scene.controller.json(&["drill", "shop", "--end"])?;
    ensure!(ended[0]["torn_down"] == true, "{ended:#}");
    let console =
        ended[0]["members"][1]["console"].as_str().context("a console that lies at the other host")?;
    let folder = scene.controller.data_dir().join("drills").join(kept["id"].as_str().context("its id")?);
    ensure!(fs::read_to_string(folder.join(console))?.contains(&scene.boots[1]));
    ensure!(scene.at_hosts(ALL)? == [Vec::<String>::new(), Vec::new()], "{:?}", scene.at_hosts(ALL)?);
    Ok(())
}

/// While the second host does not answer, its replica is started nowhere else, and its folder stays.
fn unanswered(scene: &mut Scene) -> Result<()> {
    let folders = scene.controller.json(&["replicas"])?["replicas"].clone();
    let needed = |folders: &Value| {
        folders.as_array().map_or(0, |all| all.iter().filter(|of| of["needed"]["by"] == "domain").count())
    };
    ensure!(needed(&folders) == 2, "{folders:#}");
    scene.second.stop()?;
    let again = scene.controller.cli(&["failover", "db", "--emergency", "--yes"])?;
    ensure!(!again.status.success() && again.stderr.contains("started nowhere else"), "{again:?}");
    let undo = scene.controller.cli(&["undo", "shop", "--point", "latest", "--yes"])?;
    ensure!(!undo.status.success() && undo.stderr.contains("started nowhere else"), "{undo:?}");
    let left = scene.controller.json(&["replicas", "--prune", "--yes"])?["replicas"].clone();
    ensure!(left.as_array().is_some_and(Vec::is_empty), "removed: {left:#}");
    ensure!(scene.b.virsh(RUNNING)?.trim() == "web", "{}", scene.b.virsh(RUNNING)?);
    scene.second.start(None)
}

/// Goal: a host whose QEMU is older than the source's is second choice, and said where there is no other; one that is down, or
/// does not see the replicas' folder, is passed over and said, before and after; where none is left, nothing is stopped; one at
/// which the replica was started keeps it. Method: the second host is first in site.toml, so that all would go there; a planned
/// failover is refused while the one host that the group may use is down, and its source runs on; another is begun, and its
/// host's libvirtd stopped right after the start.
#[test]
fn a_host_that_is_gone_is_passed_over_and_where_none_is_left_nothing_is_stopped() -> Result<()> {
    let mut scene = Scene::new("passed-over", &["web"], ["two", "one"], "")?;
    let only_two = |scene: &Scene, hosts: &str| -> Result<()> {
        let file = scene.a.folder().join("groups.toml");
        let text = format!(
            "[[group]]\nname = \"shop\"\nvms = [\"web\"]\nrpo = \"1s\"\n[group.runbook.vm.web]\nhosts = [{hosts}]\n"
        );
        fs::write(&file, text)?;
        scene.controller.cli(&["apply", "-f", &file.display().to_string()])?.success().map(drop)
    };
    scene.becomes("ready", &["it would start at host two"])?;
    scene.second.pretend_older_qemu(true)?;
    // First in site.toml, and taken where there is no other.
    scene.becomes("ready", &["it would start at host one"])?;
    only_two(&scene, "\"two\"")?;
    scene.becomes("degraded", &["qemu-older", "QEMU is 6.2.0 at host two", "it would start at host two"])?;
    only_two(&scene, "")?;
    scene.second.pretend_older_qemu(false)?;
    scene.becomes("ready", &["it would start at host two"])?;
    let stranger = only_two(&scene, "\"three\"").unwrap_err().to_string();
    ensure!(stranger.contains("no host `three`") && stranger.contains("two, one"), "{stranger}");

    scene.second.stop()?;
    scene.second.start(Some(&scene.controller.replica_dir()))?;
    scene.becomes("degraded", &["does not see the folder of the replicas", "it would start at host one"])?;
    scene.second.stop()?;
    scene
        .becomes("degraded", &["host two can't be used", "does not answer", "it would start at host one"])?;

    only_two(&scene, "\"two\"")?;
    scene.becomes("not-ready", &["no-host", "two: it does not answer", "one: is not among"])?;
    let planned = scene.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
    ensure!(!planned.status.success() && planned.stderr.contains("nothing was stopped"), "{planned:?}");
    let now = scene.guests[0].last().context("it ticks")?.tick;
    scene.guests[0].wait_for_tick(now + 2, SOON)?;

    only_two(&scene, "")?;
    scene.second.start(None)?;
    started_there(&mut scene, now)?;
    ensure!(left_by_probes(&scene.controller)? == 0, "what was put there to be seen is left");
    Ok(())
}

/// Goal: a replica whose host is gone goes to another one as long as nothing was started there, and nothing of it is
/// left at the first; a planned failover whose host is gone is called off, and the source goes on; hosts without room
/// are named. Method: the second host is first in site.toml; its libvirtd is stopped while the controller is dead.
#[test]
fn a_replica_that_was_not_started_yet_goes_to_another_host_when_its_own_is_gone() -> Result<()> {
    let mut scene = Scene::new("host-gone", &["web"], ["two", "one"], "")?;
    without_room(&mut scene)?;
    let broken_off = |scene: &mut Scene, step: &str, how: &str| -> Result<()> {
        scene.controller.stop()?;
        scene.controller.env = killed_at(step);
        scene.controller.start()?;
        scene.controller.wait_more_group_points("shop", 1, SOON)?;
        let ended = scene.controller.cli(&["failover", "shop", how, "--yes"])?;
        ensure!(!ended.status.success(), "{step}: {ended:?}");
        scene.controller.kill9()?;
        scene.second.stop()?;
        scene.controller.start()
    };
    broken_off(&mut scene, "planned.restored", "--planned")?;
    scene.guests[0].wait_for_state("running", SOON)?;
    let now = scene.guests[0].last().context("it ticks")?.tick;
    scene.guests[0].wait_for_tick(now + 2, SOON)?;
    scene.second.start(None)?;

    scene.becomes("ready", &["it would start at host two"])?;
    broken_off(&mut scene, "group.restored", "--emergency")?;
    let report = scene.controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(report["members"][0]["host"] == "one", "{report:#}");
    replica_unharmed(&scene.b.guest("web")?, &scene.boots[0], now, SOON)?;
    scene.second.start(None)?;
    ensure!(scene.at_hosts(ALL)? == [vec!["web".to_owned()], Vec::new()], "{:?}", scene.at_hosts(ALL)?);
    Ok(())
}

/// All memory of both hosts is kept from replicas, for a while.
fn without_room(scene: &mut Scene) -> Result<()> {
    let file = scene.b.dir("lb")?.join("site.toml");
    let before = fs::read_to_string(&file)?;
    fs::write(&file, before.replace("memory_reserve = \"1MiB\"", "memory_reserve = \"9000GiB\""))?;
    scene.controller.stop()?;
    scene.controller.start()?;
    scene.becomes("not-ready", &["no-host", "two: it takes 136.0 MiB of memory, and", "one: it takes"])?;
    let refused = scene.controller.cli(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(!refused.status.success() && refused.stderr.contains("are left for replicas"), "{refused:?}");
    let drill = scene.controller.json(&["drills"])?;
    ensure!(drill.as_array().is_some_and(Vec::is_empty), "{drill}");
    let tried = scene.controller.cli(&["drill", "shop", "--json"])?;
    ensure!(!tried.status.success() && tried.stdout.contains("no host of this site can take"), "{tried:?}");
    fs::write(&file, before)?;
    scene.controller.stop()?;
    scene.controller.start()?;
    scene.becomes("degraded", &["drill-failed", "it would start at host two"])?;
    scene.controller.json(&["drill", "shop"])?;
    scene.becomes("ready", &["it would start at host two"])
}

/// A planned failover to the second host, which is gone when the controller comes back that died right after the start: the
/// replica may run there, and the other host, which could take it, does not get it.
fn started_there(scene: &mut Scene, tick: u64) -> Result<()> {
    scene.controller.stop()?;
    scene.controller.env = killed_at("failover.started");
    scene.controller.start()?;
    scene.becomes("ready", &["it would start at host two"])?;
    let ended = scene.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
    ensure!(!ended.status.success(), "{ended:?}");
    scene.controller.kill9()?;
    scene.second.stop()?;
    scene.controller.start()?;
    eventually(SOON, "the failover to be refused while its host is gone", || {
        let again = scene.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
        ensure!(!again.status.success(), "{again:?}");
        Ok(again.stderr.contains("started nowhere else").then_some(()))
    })?;
    ensure!(scene.b.virsh(ALL)?.trim().is_empty(), "{}", scene.b.virsh(ALL)?);
    ensure!(scene.guests[0].state()? != "running", "its source runs");
    scene.second.start(None)?;
    let runs = || scene.controller.cli(&["failover", "shop", "--planned", "--yes"]);
    eventually(SOON, "the failover to be done", || {
        let said = runs()?;
        Ok((said.status.success() || said.stderr.contains("already")).then_some(()))
    })?;
    replica_unharmed(&scene.second.guest("web"), &scene.boots[0], tick, SOON)?;
    ensure!(scene.at_hosts(ALL)? == [Vec::new(), vec!["web".to_owned()]], "{:?}", scene.at_hosts(ALL)?);
    Ok(())
}

fn left_by_probes(controller: &Controller) -> Result<usize> {
    let entries = fs::read_dir(controller.replica_dir())?.flatten();
    Ok(entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("probe-")).count())
}

/// Goal: storage pools with which a controller that died had looked for files at a host go when another is started;
/// those of others, and those that somebody has defined, stay. Method: pools as such a look makes them, and others, at
/// the second host.
#[test]
fn pools_that_a_controller_that_died_has_left_at_a_host_go_and_those_of_others_stay() -> Result<()> {
    let rig = Rig::new("pools-left")?;
    let b = rig.site("b")?;
    let second = SecondHost::new(&b)?;
    let id = |digit: &str| format!("lifeboat-{}", digit.repeat(32));
    let (left, defined) = (id("a"), id("b"));
    for (how, name) in [
        ("pool-create-as", left.as_str()),
        ("pool-define-as", &defined),
        ("pool-create-as", "lifeboat-images"),
    ] {
        let folder = b.dir(name)?.display().to_string();
        second.virsh([how, name, "dir", "--target", &folder])?;
    }
    let pools = || -> Result<Vec<String>> {
        let text = second.virsh(["pool-list", "--all", "--name"])?;
        Ok(text.lines().map(|line| line.trim().to_owned()).filter(|name| !name.is_empty()).collect())
    };
    ensure!(pools()?.len() == 3, "{:?}", pools()?);
    let mut controller = Controller::install(&b)?;
    for uri in ["qemu:///system", &second.uri()] {
        controller.configure(&format!("[[host]]\nuri = \"{uri}\"\n"))?;
    }
    controller.start()?;
    eventually(SOON, "what was left to go", || Ok((!pools()?.contains(&left)).then_some(())))?;
    let mut stay = pools()?;
    stay.sort();
    ensure!(stay == [defined.as_str(), "lifeboat-images"], "{stay:?}");
    Ok(())
}
