//! A guest that moves between two protected hosts goes on being protected, as the same VM: real `virsh migrate` between two
//! hosts that share a folder of disks, an agent on each, one site. And a copy that did not move is refused.

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rig::{
    DiskFormat, Guest, GuestSpec, Link, Output, Proc, Rig, Shape, Site, eventually,
    product::{Agent, Controller, killed_at, left_in_qemu, replica_unharmed, small, stand_still},
};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[defaults]\ninterval = \"500ms\"\nmax_pause = \"5s\"\n[[vm]]\nname = \"web\"";
const IMAGES: &str = "/var/lib/libvirt/images";

/// Two hosts, each with its agent, and the site.
struct Hosts {
    one: Site,
    two: Site,
    site: Site,
    first: Agent,
    second: Agent,
    controller: Controller,
    boot: String,
    _links: [Link; 3],
    _rig: Rig,
}

impl Hosts {
    /// The guest runs on the first host and is protected.
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (one, two, site) = (rig.site("A1")?, rig.site("A2")?, rig.site("B")?);
        let link = |a: &Site, b: &Site| rig.link(a, b, Shape::default());
        let links = [link(&one, &site)?, link(&two, &site)?, link(&one, &two)?];
        let shared = one.folder().join("lib/images");
        two.run([Path::new("mount"), Path::new("--bind"), &shared, Path::new(IMAGES)])?;
        let controller = Controller::running(&site)?;
        let guest = one.define_and_start(&Self::spec())?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        // The libvirt that a guest leaves gives its disks back to root, as it takes them for nobody else's.
        one.run(["chmod", "0666", &Self::spec().disk_path(0)])?;
        let mut agents = [&one, &two].map(|host| Agent::install(host, &controller, WEB));
        for agent in agents.iter_mut().flatten() {
            // A guest that comes in is none that is started.
            agent.install_hook()?;
            agent.start()?;
        }
        let [first, second] = agents;
        let (first, second) = (first?, second?);
        controller.wait_points("web", 3, SOON)?;
        Ok(Self { one, two, site, first, second, controller, boot, _links: links, _rig: rig })
    }

    fn spec() -> GuestSpec {
        // Its UUID must be the same each time.
        let mut spec = small("web").disk(DiskFormat::Qcow2, 32);
        spec.uuid = uuid::Uuid::from_bytes([0x5a; 16]);
        spec
    }

    /// A migration that takes its time, from the first host to the second, and is not cancelled any more for having met a
    /// pause of ours: the agent yields to it, and its `virsh` runs on.
    fn migrating(&self) -> Result<Proc> {
        let (from, to) = (&self.one, &self.two);
        let socket = to.folder().join("run/libvirt/libvirt-sock");
        let there = format!("qemu+unix:///system?socket={}", socket.display());
        let words = ["-q", "-c", "qemu:///system", "migrate", "--live", "--unsafe", "--persistent"];
        let data = format!("tcp://{}", to.address());
        let more = ["--undefinesource", "--bandwidth", "8", "web", &there, "--migrateuri", &data];
        let start = || from.command("virsh").args(words).args(more).named("migrating").spawn();
        let (guest, mut virsh) = (from.guest("web")?, start()?);
        eventually(SOON, "memory to be on its way", || {
            if virsh.poll()?.is_some() {
                eprintln!("refused: {}", virsh.log().trim());
                virsh = start()?;
            }
            let yields = self.first.vm("web").is_ok_and(|row| row["state"] == "yielding");
            let goes = query_migrate(&guest)? == "active" && to.guest("web")?.qemu_pid().is_ok();
            Ok((yields && goes).then_some(()))
        })?;
        Ok(virsh)
    }

    fn try_migrate(from: &Site, to: &Site, more: &[&str]) -> Result<Output> {
        Self::try_migrate_over(from, to, &format!("tcp://{}", to.address()), more)
    }

    /// `data`: where the guest's memory goes.
    fn try_migrate_over(from: &Site, to: &Site, data: &str, more: &[&str]) -> Result<Output> {
        let socket = to.folder().join("run/libvirt/libvirt-sock");
        let there = format!("qemu+unix:///system?socket={}", socket.display());
        // The two libvirts can't tell that the folder is shared.
        let words = ["-q", "-c", "qemu:///system", "migrate", "--live", "--unsafe", "--persistent"];
        from.command("virsh").args(words).args(more).args(["web", &there, "--migrateuri", data]).output()
    }

    /// Live, while points are cut; libvirt may refuse while it meets our hold of the moment, and is asked again then.
    fn migrate(from: &Site, to: &Site) -> Result<Guest> {
        let mut refused = 0;
        eventually(SOON, "virsh migrate to work", || {
            let output = Self::try_migrate(from, to, &["--undefinesource"])?;
            if output.status.success() {
                eprintln!("migrated after {refused} refusals");
                return Ok(Some(()));
            }
            refused += 1;
            eprintln!("refused: {}", output.stderr.trim());
            ensure!(refused <= 12, "migrating does not work: {}", output.stderr);
            // As somebody who reads the message and tries again, and not in step with the points.
            std::thread::sleep(Duration::from_millis(1000 + 170 * refused));
            Ok(None)
        })?;
        let guest = to.guest("web")?;
        guest.wait_for_state("running", SOON)?;
        Ok(guest)
    }

    /// `agent` goes on with the VM's history; what its first point cost.
    fn goes_on_with(&self, agent: &Agent, name: &str, before: usize) -> Result<()> {
        let points = self
            .controller
            .wait_points("web", before + 3, SOON)
            .with_context(|| format!("{:?}\n{:?}", self.first.vm("web"), self.second.vm("web")))?;
        agent.wait_state("web", "protected", SOON)?;
        let seen = &self.controller.vm("web")?["agent"];
        ensure!(seen["agent"] == name && seen["connected"] == true, "{seen}");
        let wire = |point: &Value| point["wire_bytes"].as_u64().with_context(|| format!("{point}"));
        let (full, mut moved) = (wire(&points[0])?, 0);
        for point in &points[before..] {
            moved = moved.max(wire(point)?);
        }
        eprintln!("{name} took over: at most {moved} bytes for a point, {full} for the first one of all");
        ensure!(2 * moved < full, "what was not changed was sent again: {moved} of {full}");
        Ok(())
    }

    fn count(&self) -> Result<usize> {
        Ok(self.controller.points("web")?.len())
    }

    /// Still the guest that it was at the beginning; the tick that it has reached.
    fn is_unharmed(&self, guest: &Guest, after: &str) -> Result<u64> {
        let report = guest.wait_full_check(SOON)?;
        ensure!(report.unharmed() && report.boot == self.boot, "after {after}: {report:?}");
        Ok(report.tick)
    }

    /// Both hosts are lost, and the guest goes on at the site.
    fn lost_and_unharmed(self, tick: u64) -> Result<()> {
        self.one.power_cut();
        self.two.power_cut();
        self.controller.failover("web", "latest")?;
        replica_unharmed(&self.site.guest("web")?, &self.boot, tick, SOON)?;
        Ok(())
    }

    /// Refused at the agent, and shown at the site.
    fn is_refused(&self, agent: &Agent, name: &str, words: &str) -> Result<()> {
        let row = eventually(SOON, &format!("{name} to be refused"), || {
            let row = agent.vm("web")?;
            let why = row["reason"].as_str().unwrap_or_default();
            Ok((row["state"] == "refused" && why.contains(words)).then_some(row))
        })
        .with_context(|| format!("{:?}", agent.vm("web")))?;
        eprintln!("{name}: {}", row["reason"]);
        eventually(SOON, &format!("the site to show that {name} was refused"), || {
            let contender = self.controller.vm("web")?["agent"]["contender"].clone();
            let why = contender["why"].as_str().unwrap_or_default();
            Ok((contender["agent"] == name && why.contains(words)).then_some(()))
        })?;
        let shown = self.controller.cli(&["status"])?.success()?;
        ensure!(shown.contains(&format!("agent {name} was refused")), "{shown}");
        Ok(())
    }
}

/// What QEMU says of its migration.
fn query_migrate(guest: &Guest) -> Result<String> {
    let answer: Value = serde_json::from_str(&guest.qmp(r#"{"execute":"query-migrate"}"#)?)?;
    Ok(answer["return"]["status"].as_str().unwrap_or_default().to_owned())
}

/// Goal: a guest that is live-migrated goes on being protected by the other host's agent, as the same VM and for what it
/// changed; and so on its way back. Method: migrate it there and back under load, look at both agents and into QEMU, check
/// the site's history, then lose both hosts.
#[test]
fn a_live_migrated_guest_goes_on_being_protected_by_the_other_hosts_agent_and_back() -> Result<()> {
    let hosts = Hosts::new("moved")?;
    let before = hosts.count()?;
    let guest = Hosts::migrate(&hosts.one, &hosts.two)?;
    hosts.goes_on_with(&hosts.second, "A2", before)?;
    let row = hosts.first.wait_state("web", "moved", SOON)?;
    ensure!(row["reason"].as_str().is_some_and(|why| why.contains("another host")), "{row}");
    hosts.is_unharmed(&guest, "migration")?;

    // Its way back meets the second agent's points, and marks of the first one's are long gone.
    let before = hosts.count()?;
    let guest = Hosts::migrate(&hosts.two, &hosts.one)?;
    hosts.goes_on_with(&hosts.first, "A1", before)?;
    hosts.second.wait_state("web", "moved", SOON)?;
    let tick = hosts.is_unharmed(&guest, "the way back")?;
    hosts.first.command()?.args(["yield", "web"]).run()?;
    assert_eq!(left_in_qemu(&guest)?, Vec::<String>::new());
    hosts.first.command()?.args(["resume", "web"]).run()?;
    hosts.controller.wait_more_points("web", 1, SOON)?;

    let vms = hosts.controller.status()?["vms"].as_array().map(Vec::len);
    assert_eq!(vms, Some(1), "it is one VM all the time");
    assert_eq!(hosts.controller.json(&["verify"])?["findings"], json!([]));
    hosts.lost_and_unharmed(tick)
}

/// Goal: a copy that did not move is never taken for the VM, whoever starts it where, and whatever was restarted; an operator
/// has the last word. Method: after a migration start the source's old definition again, while the site is told nothing,
/// with the site restarted, with the other agent dead.
#[test]
fn a_stale_copy_started_on_the_host_that_the_guest_left_is_refused_until_an_operator_says_otherwise()
-> Result<()> {
    let mut hosts = Hosts::new("stale")?;
    // A disk of its own: two QEMUs on one would be the operator's ruin without any of us.
    let mut stale = Hosts::spec();
    stale.disks.clear();
    let before = hosts.count()?;
    let guest = Hosts::migrate(&hosts.one, &hosts.two)?;
    hosts.goes_on_with(&hosts.second, "A2", before)?;
    let copy = hosts.one.define_and_start(&stale)?;
    hosts.is_refused(&hosts.first, "A1", "agent A2 protects this VM and has it running")?;
    hosts.controller.wait_more_points("web", 2, SOON)?;
    let asked = hosts.controller.cli(&["release", "web"])?;
    ensure!(!asked.status.success() && asked.stderr.contains("agent `A1` has it running"), "{asked:?}");
    let said = hosts.controller.cli(&["release", "web", "--yes"])?;
    ensure!(!said.status.success() && said.stderr.contains("agent A2 says that the guest runs"), "{said:?}");

    // Nobody is left to ask.
    hosts.second.kill9()?;
    hosts.controller.kill9()?;
    hosts.controller.start()?;
    hosts.is_refused(&hosts.first, "A1", "agent A2 protects this VM and is not connected")?;
    hosts.second.start()?;
    hosts.second.wait_state("web", "protected", SOON)?;
    hosts.controller.wait_more_points("web", 2, SOON)?;
    let agents = hosts.controller.vm("web")?["agent"]["agent"].clone();
    ensure!(agents == "A2", "{agents}");

    guest.destroy()?;
    hosts.second.wait_state("web", "not-running", SOON)?;
    hosts.is_refused(&hosts.first, "A1", "it is off there")?;
    let before = hosts.count()?;
    hosts.controller.cli(&["release", "web", "--yes"])?.success()?;
    hosts.controller.wait_points("web", before + 2, SOON)?;
    hosts.first.wait_state("web", "protected", SOON)?;
    copy.wait_for_state("running", SOON).context("the agent's business is points, not the guest")?;
    assert_eq!(hosts.controller.json(&["verify"])?["findings"], json!([]));
    Ok(())
}

/// Goal: a failed migration leaves everything as it was; a guest whose agent is dead when it moves is taken up all the same,
/// also if the site dies in the change of hands, before it is written and after; and who comes back finds no guest. Method:
/// do all this, one after the other, and lose both hosts.
#[test]
fn a_guest_that_moves_while_its_agent_is_dead_and_the_site_dies_too_is_taken_up_all_the_same() -> Result<()> {
    let mut hosts = Hosts::new("dead")?;
    let nowhere =
        Hosts::try_migrate_over(&hosts.one, &hosts.two, "tcp://127.0.0.9:1", &["--undefinesource"])?;
    ensure!(!nowhere.status.success(), "nobody listens there");
    eprintln!("as was wanted: {}", nowhere.stderr.trim());
    let before = hosts.count()?;
    hosts.goes_on_with(&hosts.first, "A1", before)?;

    // Between two points: what an agent leaves that dies in one stands in the way of a migration until the next has started.
    hosts.first.stop()?;
    hosts.first.env = killed_at("cut.begin:2");
    hosts.first.start()?;
    hosts.first.process()?.wait(SOON).context("the agent should die")?;
    hosts.controller.stop()?;
    let guest = Hosts::migrate(&hosts.one, &hosts.two)?;
    for place in ["owner.before:1", "owner.after:1"] {
        hosts.second.kill9()?;
        hosts.controller.env = killed_at(place);
        hosts.controller.start()?;
        hosts.second.start()?;
        hosts.controller.process()?.wait(SOON).with_context(|| format!("the site should die at {place}"))?;
    }
    hosts.controller.start()?;
    let before = hosts.count()?;
    hosts.goes_on_with(&hosts.second, "A2", before)?;
    hosts.first.start()?;
    hosts.first.wait_state("web", "not-running", SOON)?;
    hosts.controller.wait_more_points("web", 2, SOON)?;
    let seen = hosts.controller.vm("web")?["agent"].clone();
    ensure!(seen["agent"] == "A2" && seen["contender"].is_null(), "{seen}");
    let tick = hosts.is_unharmed(&guest, "migration")?;
    hosts.lost_and_unharmed(tick)
}

/// Goal: a guest that its operator had suspended moves suspended, is taken up as it is, and nobody of ours resumes it.
#[test]
fn a_guest_that_moves_while_it_stands_is_taken_up_standing() -> Result<()> {
    let hosts = Hosts::new("stands")?;
    let guest = hosts.one.guest("web")?;
    let mut refused = 0;
    let before = eventually(SOON, "the guest to move", || {
        stand_still(&guest, &hosts.controller, "web", SOON)?;
        let before = hosts.count()?;
        let output = Hosts::try_migrate(&hosts.one, &hosts.two, &["--undefinesource"])?;
        if output.status.success() {
            return Ok(Some(before));
        }
        // Its memory goes out at once, and may have met a point that is being cut. QEMU lets it try again once it has run.
        eprintln!("refused: {}", output.stderr.trim());
        refused += 1;
        ensure!(refused <= 5, "migrating does not work: {output:?}");
        guest.resume()?;
        hosts.first.wait_state("web", "protected", SOON)?;
        Ok(None)
    })?;
    hosts.goes_on_with(&hosts.second, "A2", before)?;
    let there = hosts.two.guest("web")?;
    assert_eq!(there.state()?, "paused");
    there.resume()?;
    there.wait(SOON, "it to report", |_| true)?;
    hosts.is_unharmed(&there, "its operator resumed it").map(drop)
}

/// Goal: a migration that finds the guest standing in a pause of ours never leaves it standing: it is cancelled, its operator
/// told, and the next one works. Method: freeze the agent in its pauses, migrate, thaw it early and late, in the end kill it.
#[test]
fn a_migration_begun_in_the_middle_of_our_pause_is_cancelled_and_the_guest_runs_on_one_host() -> Result<()> {
    let mut hosts = Hosts::new("meets")?;
    // One that is there can't be kept: slowly, so that it is not.
    let slowly = ["--undefinesource", "--bandwidth", "4"];
    let waits = [100, 200, 300, 300];
    let places: Vec<_> = (1..=waits.len()).map(|round| format!("cut.memory-read:{}", 4 * round)).collect();
    hosts.first.stop()?;
    hosts.first.env = vec![("LIFEBOAT_STOP_AT".into(), places.join(","))];
    hosts.first.start()?;
    let guest = hosts.one.guest("web")?;
    for (round, wait) in waits.into_iter().enumerate() {
        hosts.first.wait_frozen(SOON)?;
        let moved = std::thread::scope(|scope| {
            let moving = scope.spawn(|| Hosts::try_migrate(&hosts.one, &hosts.two, &slowly));
            std::thread::sleep(Duration::from_millis(wait));
            if round + 1 < waits.len() {
                hosts.first.process()?.thaw()?;
            } else {
                hosts.first.kill9()?;
            }
            moving.join().map_err(|_| anyhow::anyhow!("virsh's thread"))?
        })?;
        eprintln!("thawed after {wait} ms: {}", moved.stderr.trim());
        ensure!(!moved.status.success(), "{moved:?}");
        let then = guest.last().context("it ticked before")?.tick;
        guest.wait_for_tick(then + 3, SOON).with_context(|| format!("thawed after {wait} ms"))?;
        guest.wait_for_state("running", SOON)?;
        if round + 1 < waits.len() {
            let log = hosts.first.process()?.log();
            ensure!(log.matches("began in a pause of ours").count() == round + 1, "{log}");
            hosts.controller.wait_more_points("web", 2, SOON)?;
        }
    }
    hosts.first.env.clear();
    hosts.first.start()?;
    let before = hosts.count()? + 1;
    hosts.controller.wait_points("web", before, SOON)?;
    let guest = Hosts::migrate(&hosts.one, &hosts.two)?;
    hosts.goes_on_with(&hosts.second, "A2", before)?;
    hosts.is_unharmed(&guest, "migration").map(drop)
}

/// Goal: a migration that fails midway leaves the guest where it was, running, and its agent goes on with what changed.
/// Method: the other host's QEMU dies while memory is on its way; then the operator's `virsh` does; then one succeeds.
#[test]
fn a_migration_that_fails_midway_leaves_the_guest_protected_where_it_was() -> Result<()> {
    let mut hosts = Hosts::new("midway")?;
    let guest = hosts.one.guest("web")?;
    for dies in ["QEMU", "virsh"] {
        let mut virsh = hosts.migrating()?;
        let row = hosts.first.wait_state("web", "yielding", SOON)?;
        ensure!(row["reason"].is_string(), "{row}");
        if dies == "QEMU" {
            kill(Pid::from_raw(hosts.two.guest("web")?.qemu_pid()?), Signal::SIGKILL)?;
            let ended = virsh.wait(SOON)?;
            ensure!(!ended.success(), "{ended}");
        } else {
            virsh.kill9()?;
        }
        let before = hosts.count()?;
        hosts.goes_on_with(&hosts.first, "A1", before).with_context(|| format!("after {dies} died"))?;
        guest.wait_for_state("running", SOON).with_context(|| format!("after {dies} died"))?;
        hosts.is_unharmed(&guest, &format!("the death of {dies}"))?;
        eventually(SOON, "nothing of it to be left at the other host", || {
            Ok(hosts.two.guest("web")?.qemu_pid().is_err().then_some(()))
        })?;
    }
    let before = hosts.count()?;
    let guest = Hosts::migrate(&hosts.one, &hosts.two)?;
    hosts.goes_on_with(&hosts.second, "A2", before)?;
    hosts.is_unharmed(&guest, "the migration that worked")?;
    hosts.first.stop()
}

/// Goal: where a migration's client dies before its last step, the guest never runs twice, no copy is protected beside it, and
/// once its operator has decided, protection goes on. Method: the other host's libvirt hangs until all memory is there, the
/// client dies, and that libvirt goes on.
#[test]
fn a_migration_whose_client_dies_before_its_last_step_never_leaves_two_guests_running() -> Result<()> {
    let hosts = Hosts::new("client")?;
    let (here, there) = (hosts.one.guest("web")?, hosts.two.guest("web")?);
    let mut virsh = hosts.migrating()?;
    hosts.two.freeze_libvirtd(true)?;
    let sent = eventually(SOON, "all memory to be there", || {
        Ok((query_migrate(&here)? == "completed").then_some(()))
    });
    let died = virsh.kill9();
    hosts.two.freeze_libvirtd(false)?;
    sent.and(died.map(drop))?;
    let states = || -> Result<[String; 2]> {
        let state = |guest: &Guest| guest.state().unwrap_or_else(|_| "not there".into());
        Ok([state(&here), state(&there)])
    };
    // What libvirt makes of it, given time; nobody of ours may add to it.
    let mut seen = Vec::new();
    let until = std::time::Instant::now() + Duration::from_secs(15);
    while std::time::Instant::now() < until {
        let now = states()?;
        ensure!(now.iter().filter(|state| *state == "running").count() <= 1, "{now:?}");
        if seen.last() != Some(&now) {
            seen.push(now);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    eprintln!("source and target: {seen:?}");
    eprintln!("{:?}\n{:?}", hosts.first.vm("web"), hosts.second.vm("web"));
    let [one, two] = states()?;
    let before = hosts.count()?;
    let guest = if two == "running" || two == "paused" {
        if two == "paused" {
            there.resume()?;
        }
        hosts.goes_on_with(&hosts.second, "A2", before)?;
        there
    } else {
        if one == "paused" {
            here.resume()?;
        }
        hosts.goes_on_with(&hosts.first, "A1", before)?;
        here
    };
    let tick = hosts.is_unharmed(&guest, "its operator's word")?;
    hosts.lost_and_unharmed(tick)
}
