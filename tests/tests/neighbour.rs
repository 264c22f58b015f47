//! A good neighbour: whatever an operator or a backup product does with a protected guest works, and protection goes on
//! after it. Real `virsh` commands against one protected guest after the other; each guest is lost in the end and must go
//! on at the other site as it was.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, GuestSpec, Output, Rig, Site, eventually,
    product::{Agent, Controller, left_in_qemu, replica_unharmed, small},
};
use serde_json::{Value, json};
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[defaults]\ninterval = \"300ms\"\nmax_pause = \"5s\"\n[[vm]]\nname = \"web\"";
const IMAGES: &str = "/var/lib/libvirt/images";

/// A protected guest, and what it takes to say that protection goes on.
struct Bench {
    rig: Rig,
    a: Site,
    b: Site,
    controller: Controller,
    agent: Agent,
    guest: Guest,
    boot: String,
}

impl Bench {
    fn new(name: &str) -> Result<Self> {
        Self::of(name, &small("web").disk(DiskFormat::Qcow2, 32))
    }

    fn of(name: &str, guest: &GuestSpec) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, _link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let guest = a.define_and_start(guest)?;
        let boot = guest.wait_for_tick(3, BOOT)?.boot;
        let mut agent = Agent::install(&a, &controller, WEB)?;
        agent.start()?;
        controller.wait_points("web", 2, SOON)?;
        Ok(Self { rig, a, b, controller, agent, guest, boot })
    }

    /// An operator's command, as it ends.
    fn virsh(&self, words: &[&str]) -> Result<Output> {
        self.a.command("virsh").args(["-q", "-c", "qemu:///system"]).args(words).output()
    }

    /// What an operator does must work; where it met our hold of the moment, it must work when tried again.
    fn works(&self, words: &[&str]) -> Result<String> {
        let mut refused = 0;
        eventually(SOON, &format!("virsh {words:?} to work"), || {
            let output = self.virsh(words)?;
            if output.status.success() {
                eprintln!("{words:?} worked after {refused} refusals");
                return Ok(Some(output.stdout));
            }
            refused += 1;
            eprintln!("refused: {}", output.stderr.trim());
            ensure!(refused <= 10, "{words:?} does not work: {}", output.stderr);
            // As somebody who reads the message and tries again, and not in step with the points.
            std::thread::sleep(Duration::from_millis(1000 + 170 * refused));
            Ok(None)
        })
    }

    /// The guest runs, and new points of it become durable.
    fn goes_on(&self, after: &str) -> Result<()> {
        let then = self.guest.last().context("it ticked before")?.tick;
        let report = self.guest.wait_for_tick(then + 3, SOON).with_context(|| format!("after {after}"))?;
        ensure!(report.unharmed() && report.boot == self.boot, "after {after}: {report:?}");
        self.controller.wait_more_points("web", 2, SOON).with_context(|| format!("after {after}"))?;
        self.agent.wait_state("web", "protected", SOON).with_context(|| format!("after {after}"))?;
        eprintln!("went on after {after}");
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        self.agent.vm("web")
    }

    fn yields(&self, to: &str) -> Result<()> {
        eventually(SOON, &format!("the agent to yield to {to}"), || {
            let row = self.status()?;
            let reason = row["reason"].as_str().unwrap_or_default().to_owned();
            Ok((row["state"] == "yielding" && reason.contains(to)).then_some(()))
        })
        .with_context(|| format!("{:?}", self.status()))
    }

    fn lost_and_unharmed(self) -> Result<()> {
        assert_eq!(self.controller.json(&["verify"])?["findings"], json!([]));
        self.a.power_cut();
        self.controller.failover("web", "latest")?;
        replica_unharmed(&self.b.guest("web")?, &self.boot, 0, SOON)?;
        drop(self.rig);
        Ok(())
    }
}

/// Goal: what takes all of the guest through QEMU's migration slot works. Method: save and restore, managed save and start,
/// a dump, an internal snapshot, an operator's pause.
#[test]
fn a_protected_guest_can_be_saved_dumped_and_snapshot_and_protection_goes_on() -> Result<()> {
    let bench = Bench::new("nb-save")?;
    let saved = format!("{IMAGES}/web.save");
    bench.works(&["save", "web", &saved])?;
    bench.works(&["restore", &saved])?;
    bench.goes_on("save and restore")?;
    bench.works(&["managedsave", "web"])?;
    eventually(SOON, "the agent to see that it is off", || {
        Ok((bench.status()?["state"] == "not-running").then_some(()))
    })?;
    bench.works(&["start", "web"])?;
    bench.goes_on("managedsave and start")?;
    bench.works(&["dump", "--live", "web", &format!("{IMAGES}/web.dump")])?;
    bench.goes_on("dump")?;
    bench.works(&["snapshot-create-as", "web", "inside"])?;
    bench.goes_on("an internal snapshot")?;
    bench.guest.suspend()?;
    bench.controller.wait_more_points("web", 2, SOON)?;
    // Nobody resumes it but its operator; one that met our own pause is the operator's to repeat.
    if bench.guest.state()? != "paused" {
        eprintln!("the suspend met a cut");
        bench.guest.suspend()?;
    }
    bench.controller.wait_more_points("web", 2, SOON)?;
    ensure!(bench.guest.state()? == "paused", "an operator's pause was ended");
    bench.guest.resume()?;
    bench.goes_on("an operator's pause")?;
    bench.lost_and_unharmed()
}

/// Freezes the agent in the pauses of some of its points, begins each time one of `commands`, thaws the agent after one of
/// `waits`, and sees the guest run again without anybody's help, whether the command worked or not. Says which did.
fn in_the_middle_of_a_pause(bench: &mut Bench, commands: &[&[&str]], waits: &[u64]) -> Result<Vec<bool>> {
    let rounds: Vec<_> =
        waits.iter().flat_map(|wait| commands.iter().map(move |words| (*wait, *words))).collect();
    // Whole points in between, so that no engine is put aside for pauses that are too long.
    let places: Vec<_> = (1..=rounds.len()).map(|round| format!("cut.memory-read:{}", 4 * round)).collect();
    bench.agent.stop()?;
    bench.agent.env = vec![("LIFEBOAT_STOP_AT".into(), places.join(","))];
    bench.agent.start()?;
    let mut worked = Vec::new();
    for (wait, words) in rounds {
        bench.agent.wait_frozen(SOON)?;
        let virsh = bench.a.command("virsh").named("virsh-in-a-pause");
        let mut command = virsh.args(["-q", "-c", "qemu:///system"]).args(words).spawn()?;
        std::thread::sleep(Duration::from_millis(wait));
        bench.agent.process()?.thaw()?;
        let (ended, what) = (command.wait(SOON)?, format!("{}, thawed after {wait} ms", words[0]));
        eprintln!("{what}: {ended} {}", command.log().trim());
        if ended.success() && words[0].ends_with("save") {
            eventually(SOON, "the agent to see that it is off", || {
                Ok((bench.status()?["state"] == "not-running").then_some(()))
            })?;
            let back = if words[0] == "save" { ["restore", words[2]] } else { ["start", "web"] };
            bench.works(&back)?;
        }
        bench.goes_on(&what)?;
        worked.push(ended.success());
    }
    Ok(worked)
}

/// Goal: a save or a dump that finds the guest standing in our pause, and fails, does not leave it so. Method: with the
/// filters of a disk in place, which QEMU refuses to save.
#[test]
fn a_save_that_fails_in_the_middle_of_our_pause_leaves_the_guest_running() -> Result<()> {
    let mut bench = Bench::new("nb-fails")?;
    let dumped = format!("{IMAGES}/web.dump");
    let commands: [&[&str]; 2] = [&["managedsave", "web"], &["dump", "--live", "web", &dumped]];
    let worked = in_the_middle_of_a_pause(&mut bench, &commands, &[0, 50, 200, 2500])?;
    ensure!(worked.contains(&false), "none failed: nothing was shown");
    bench.lost_and_unharmed()
}

/// Goal: a save that finds the guest standing in our pause never brings it back standing: it is cancelled, and a managed one
/// that was faster than that is set to run. Method: a guest without disks, which QEMU would save; what is saved all the
/// same comes back running.
#[test]
fn a_save_in_the_middle_of_our_pause_is_cancelled_and_the_guest_goes_on() -> Result<()> {
    // Large enough for a save to a file, of which nobody could tell us where it is, not to be the faster one.
    let mut bench = Bench::of("nb-works", &small("web").memory_mib(512).pattern_mib(384))?;
    let saved = format!("{IMAGES}/web.save");
    let mut worked = in_the_middle_of_a_pause(&mut bench, &[&["save", "web", &saved]], &[30, 50])?;
    let managed: [&[&str]; 1] = [&["managedsave", "web"]];
    worked.extend(in_the_middle_of_a_pause(&mut bench, &managed, &[50, 150, 1000, 2500])?);
    ensure!(worked.contains(&false), "none was cancelled: nothing was shown");
    let log = bench.agent.process()?.log();
    ensure!(
        log.contains("the managed save will run when it starts"),
        "none was saved standing: nothing was shown"
    );
    bench.lost_and_unharmed()
}

/// Goal: what changes or reads the guest's disks works. Method: an external snapshot and its commit, a pull backup, a disk
/// that comes and goes, a disk that grows, a crash of libvirt.
#[test]
fn a_protected_guests_disks_can_be_changed_and_backed_up_and_protection_goes_on() -> Result<()> {
    let bench = Bench::new("nb-disks")?;
    let overlay = format!("vda,file={IMAGES}/web-overlay.qcow2");
    bench.works(&[
        "snapshot-create-as",
        "web",
        "outside",
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        &overlay,
    ])?;
    bench.goes_on("an external snapshot")?;
    bench.works(&["blockcommit", "web", "vda", "--active", "--wait", "--verbose"])?;
    bench.yields("block job")?;
    bench.works(&["blockjob", "web", "vda", "--pivot"])?;
    bench.goes_on("a block commit")?;

    let backup = bench.a.dir("jobs")?.join("backup.xml");
    fs::write(
        &backup,
        format!(
            "<domainbackup mode='pull'><server transport='unix' socket='/var/lib/libvirt/qemu/backup.sock'/><disks>\
             <disk name='vda' type='file'><scratch file='{IMAGES}/backup.scratch'/></disk></disks></domainbackup>"
        ),
    )?;
    bench.works(&["backup-begin", "web", &backup.to_string_lossy()])?;
    bench.yields("libvirt's backup")?;
    let exports: Value =
        serde_json::from_str(&bench.guest.qmp(r#"{"execute":"query-block-exports"}"#)?).context("exports")?;
    ensure!(exports["return"].as_array().is_some_and(|all| all.len() == 1), "the backup's export: {exports}");
    bench.works(&["domjobabort", "web"])?;
    bench.goes_on("a pull backup")?;

    let extra = format!("{IMAGES}/extra.qcow2");
    bench.a.run(["qemu-img", "create", "-q", "-f", "qcow2", &extra, "8M"])?;
    bench.works(&["attach-disk", "web", &extra, "vdb", "--subdriver", "qcow2", "--live"])?;
    bench.goes_on("a disk was plugged in")?;
    bench.works(&["detach-disk", "web", "vdb", "--live"])?;
    eventually(SOON, "the disk to be unplugged", || {
        let left = bench.works(&["domblklist", "web"])?;
        Ok((!left.contains("vdb")).then_some(()))
    })?;
    bench.goes_on("a disk was unplugged")?;
    bench.works(&["blockresize", "web", "vda", "40M"])?;
    bench.goes_on("a disk grew")?;
    bench.a.crash_libvirtd()?;
    bench.goes_on("a crash of libvirt")?;
    bench.lost_and_unharmed()
}

/// Goal: an operator can have us out of the way, for as long as asked, and nothing is sent twice for it. Method: yield,
/// look into QEMU, restart the agent, resume; then end the protection, and compare QEMU with what it was before us.
#[test]
fn an_operator_can_have_the_agent_out_of_the_way_and_leave_no_trace() -> Result<()> {
    let rig = Rig::new("nb-yield")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let untouched = traces(&guest)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    let first = controller.wait_points("web", 2, SOON)?;
    let told = agent.command()?.args(["yield", "web", "--for", "10m"]).env("USER", "ada").run()?;
    ensure!(told.contains("nothing is held"), "{told}");
    assert_eq!(left_in_qemu(&guest)?, Vec::<String>::new());
    let row = agent.wait_state("web", "yielding", SOON)?;
    ensure!(row["reason"].as_str().is_some_and(|why| why.contains("asked by ada")), "{row}");
    let points = controller.points("web")?.len();
    let then = guest.last().context("it ticks")?.tick;
    guest.wait_for_tick(then + 30, SOON)?;
    assert_eq!(controller.points("web")?.len(), points, "points were cut while yielding");
    agent.command()?.args(["resume", "web"]).run()?;
    let next = controller.wait_more_points("web", 1, SOON)?;
    let (full, delta) = (&first[0], &next[points]);
    let wire = |point: &Value| point["wire_bytes"].as_u64().with_context(|| format!("{point}"));
    ensure!(2 * wire(delta)? < wire(full)?, "what was not changed was sent again: {delta}, {full}");

    agent.command()?.args(["yield", "web"]).run()?;
    agent.kill9()?;
    agent.start()?;
    agent.wait_state("web", "yielding", SOON)?;
    let unknown = agent.command()?.args(["resume", "wob"]).output()?;
    ensure!(!unknown.status.success() && unknown.stderr.contains("wob"), "{unknown:?}");
    agent.command()?.args(["resume", "web"]).run()?;
    controller.wait_more_points("web", 2, SOON)?;

    agent.command()?.args(["unprotect", "web"]).run()?;
    assert_eq!(traces(&guest)?, untouched, "after unprotect");
    agent.kill9()?;
    // Killed in mid cut, then taken out of the configuration: the next start knows nothing but what it had noted.
    for place in ["cut.braked:1", "cut.disks-marked:2", "cut.reading:2"] {
        agent.configure(&controller.address(), WEB)?;
        agent.env = rig::product::killed_at(place);
        agent.start()?;
        agent.process()?.wait(SOON).with_context(|| format!("the agent should die at {place}"))?;
        agent.configure(&controller.address(), "")?;
        agent.start()?;
        eventually(SOON, &format!("QEMU to be as it was, after {place}"), || {
            Ok((traces(&guest)? == untouched).then_some(()))
        })
        .with_context(|| format!("{:?}\nbefore: {untouched:?}", traces(&guest)))?;
        agent.stop()?;
    }
    // And without any daemon.
    agent.configure(&controller.address(), WEB)?;
    agent.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    agent.stop()?;
    ensure!(traces(&guest)? != untouched, "marks stay when an agent stops");
    agent.command()?.args(["unprotect", "web"]).run()?;
    assert_eq!(traces(&guest)?, untouched, "after unprotect without a daemon");
    agent.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// What anybody could have left in a QEMU: nodes, bitmaps, exports, jobs, descriptors, migration parameters and capabilities.
fn traces(guest: &Guest) -> Result<Vec<String>> {
    let ask = |command: &str| -> Result<Value> {
        let answer: Value = serde_json::from_str(&guest.qmp(&json!({ "execute": command }).to_string())?)?;
        Ok(answer["return"].clone())
    };
    let mut found = Vec::new();
    for command in [
        "query-block-exports",
        "query-jobs",
        "query-block-jobs",
        "query-fdsets",
        "query-migrate-capabilities",
    ] {
        found.push(format!("{command}: {}", ask(command)?));
    }
    let mut parameters = ask("query-migrate-parameters")?;
    // QEMU can't unset a mapping; an empty one maps nothing, as before.
    if parameters["block-bitmap-mapping"] == json!([]) {
        parameters.as_object_mut().context("parameters")?.remove("block-bitmap-mapping");
    }
    found.push(format!("parameters: {parameters}"));
    for node in ask("query-named-block-nodes")?.as_array().context("nodes")? {
        found.push(format!("node {} with bitmaps {}", node["node-name"], node["dirty-bitmaps"]));
    }
    for device in ask("query-block")?.as_array().context("devices")? {
        found.push(format!("device {} on {}", device["qdev"], device["inserted"]["node-name"]));
    }
    Ok(found)
}
