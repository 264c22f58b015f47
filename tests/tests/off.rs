//! VMs that are off: their disks are protected as they stand, nobody is kept from starting them, and at the other site they
//! are off as well. The witnesses are their disks, byte by byte, and what a guest finds that is started from them.

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rig::{
    DiskFormat, Guest, GuestSpec, Link, Rig, Site, eventually,
    product::{Agent, Controller, small},
};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(120);
const MIB: usize = 1 << 20;

/// A source and a site.
struct Scene {
    a: Site,
    b: Site,
    controller: Controller,
    _link: Link,
    _rig: Rig,
}

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let controller = Controller::running(&b)?;
        Ok(Self { a, b, controller, _link: link, _rig: rig })
    }

    /// A second disk: qcow2 over a raw base that has something in it.
    fn chain(&self, spec: GuestSpec) -> Result<GuestSpec> {
        let spec = spec.disk(DiskFormat::Qcow2, 32);
        let top = spec.disk_path(spec.disks.len() - 1);
        let base = self.a.host_path("/var/lib/libvirt/images/base, of all.raw")?;
        fs::create_dir_all(base.parent().context("a folder")?)?;
        fs::File::create(&base)?.set_len(32 * MIB as u64)?;
        let file = fs::OpenOptions::new().write(true).open(&base)?;
        file.write_all_at(&noise(6 * MIB), 3 * MIB as u64)?;
        self.a.run([
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            "base, of all.raw",
            &top,
        ])?;
        Ok(spec)
    }

    /// Waits until the agent says that the VM is off and needs nothing.
    fn rests(&self, agent: &Agent, vm: &str) -> Result<Value> {
        eventually(SOON, &format!("{vm} to be protected as it is off"), || {
            // It may just have been started.
            let Ok(row) = agent.vm(vm) else { return Ok(None) };
            let why = row["reason"].as_str().unwrap_or_default();
            let rests = row["state"] == "protected" && row["off"] == true && why.contains("it is off");
            Ok(rests.then_some(row))
        })
    }

    fn last(&self, vm: &str) -> Result<Value> {
        self.controller.points(vm)?.pop().context("a point")
    }

    /// What the replica has is what the source has.
    fn same_disks(&self, spec: &GuestSpec) -> Result<()> {
        for (at, disk) in spec.disks.iter().enumerate() {
            let source = self.a.host_path(spec.disk_path(at))?;
            let name = format!("vd{}.raw", char::from(b'a' + at as u8));
            let folder = self.controller.replica_dir().join(spec.uuid.to_string());
            let replica = find(&folder, &name)?.context("the replica's disk")?;
            let compared = Command::new("qemu-img")
                .args(["compare", "-U", "-f", &disk.format.to_string(), "-F", "raw"])
                .args([&source, &replica])
                .output()?;
            ensure!(compared.status.success(), "disk {at}: {}", String::from_utf8_lossy(&compared.stdout));
        }
        Ok(())
    }
}

/// The guest syncs what it wrote, and powers itself off.
fn shut_itself_down(guest: &Guest) -> Result<()> {
    // Its answer is lost with it.
    let _ = guest.run_inside("sync; echo o > /proc/sysrq-trigger");
    guest.wait_for_state("shut off", SOON)
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 88172645463325252u64;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out
}

fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if path.ends_with(name) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Goal: what a guest wrote before it shut itself down is in the point that is made after it, at the cost of what changed; no
/// other point is made until something changes; and at the other site it is off, with its disks, until somebody starts it.
/// Method: a guest with a file system, and with a chain of images; it powers itself off, its agent is restarted, its disk is
/// written to by hand, and it is failed over.
#[test]
fn what_a_guest_wrote_before_it_shut_down_is_in_its_point_and_its_replica_is_off() -> Result<()> {
    let scene = Scene::new("off")?;
    let Scene { a, b, controller, .. } = &scene;
    let spec = scene.chain(small("web").files(16))?;
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_agent(BOOT)?;
    let mut agent = Agent::protecting(a, controller, &["web"], "1s")?;
    controller.wait_points("web", 2, SOON)?;
    let written = guest.wait(SOON, "it to write", |report| report.lines > 5)?.lines;
    shut_itself_down(&guest)?;
    let row = scene.rests(&agent, "web")?;
    ensure!(row["rpo_ms"] == 0, "{row}");
    let point = scene.last("web")?;
    ensure!(
        point["at_rest"] == true && point["stays_off"] == true && point["has_memory"] == false,
        "{point}"
    );
    let changed = point["disk_changed_bytes"].as_u64().context("changed")?;
    ensure!(changed < 4 * MIB as u64, "{changed} bytes travelled: {point}");
    ensure!(controller.vm("web")?["rpo_ms"] == 0, "{}", controller.vm("web")?);

    let before = controller.points("web")?;
    agent.stop()?;
    agent.start()?;
    scene.rests(&agent, "web")?;
    ensure!(controller.points("web")? == before, "nothing has changed");
    a.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 0x5a 20M 64k", &spec.disk_path(1)])?;
    let point = controller.wait_points("web", before.len() + 1, SOON)?.pop().context("a point")?;
    let changed = point["disk_changed_bytes"].as_u64().context("changed")?;
    ensure!(point["at_rest"] == true && changed == 64 << 10, "{point}");
    scene.rests(&agent, "web")?;
    let (_, verdict) = check(controller, "web")?;
    ensure!(
        verdict.iter().any(|code| code == "off") && !verdict.iter().any(|code| code == "rpo"),
        "{verdict:?}"
    );

    let shown = controller.cli(&["failover", "web", "--emergency", "--dry-run"])?.success()?;
    ensure!(shown.contains("NOT STARTED") && shown.contains("nothing is lost"), "{shown}");
    let report = controller.failover("web", "latest")?;
    ensure!(report["left_off"] == true && report["resumed"] == false, "{report}");
    let replica = b.guest("web")?;
    ensure!(replica.state()? == "shut off", "{}", replica.state()?);
    scene.same_disks(&spec)?;
    agent.wait_state("web", "fenced", SOON)?;
    let again = controller.failover("web", "latest")?;
    ensure!(again["already_done"] == true && replica.state()? == "shut off", "{again}");
    replica.start()?;
    let report = replica.wait(BOOT, "the replica to boot", |report| report.tick >= 1)?;
    ensure!(report.found >= written && report.unharmed(), "of {written} lines it has {}", report.found);
    ensure!(controller.json(&["verify"])?["findings"].as_array().is_some_and(Vec::is_empty));
    Ok(())
}

/// Whether all is well, and what was found.
fn check(controller: &Controller, name: &str) -> Result<(String, Vec<String>)> {
    let said = controller.cli(&["check", name, "--json"])?;
    let found: Value = serde_json::from_str(&said.stdout)?;
    let codes = found[0]["findings"].as_array().into_iter().flatten();
    let codes = codes.map(|finding| finding["code"].as_str().unwrap_or_default().to_owned()).collect();
    Ok((found[0]["verdict"].as_str().unwrap_or_default().to_owned(), codes))
}

/// Goal: a guest is started whenever its operator wants, with all of its images open for reading, and what was read before is
/// worth nothing then. Method: the agent is frozen in the middle of reading, and once it has read everything; the guest is
/// started, and runs on or is off again when the agent is let go.
#[test]
fn a_guest_starts_while_its_disks_are_read_and_what_was_read_counts_for_nothing() -> Result<()> {
    let scene = Scene::new("off-start")?;
    let Scene { a, b, controller, .. } = &scene;
    let spec = scene.chain(small("web").disk(DiskFormat::Raw, 32))?;
    let guest = a.define_and_start(&spec)?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let settings = "[defaults]\nmax_pause = \"5s\"\n[[vm]]\nname = \"web\"\ninterval = \"1s\"";
    let mut agent = Agent::install(a, controller, settings)?;
    let stopped_at = |place: &str| vec![("LIFEBOAT_STOP_AT".to_owned(), place.to_owned())];
    agent.env = stopped_at("off.reading:2");
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;

    guest.destroy()?;
    agent.wait_frozen(SOON)?;
    ensure!(readers(a)? >= 2, "its images are open");
    guest.start()?;
    let second = guest.wait(BOOT, "it to boot", |report| report.boot != boot && report.tick > 3)?.boot;
    agent.process()?.thaw()?;
    controller.wait_more_points("web", 2, SOON)?;
    let points = controller.points("web")?;
    ensure!(points.iter().all(|point| point["at_rest"] == false), "{points:?}");
    eventually(SOON, "nobody to read its images", || Ok((readers(a)? == 0).then_some(())))?;

    agent.stop()?;
    agent.env = stopped_at("off.read");
    agent.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    guest.destroy()?;
    agent.wait_frozen(SOON)?;
    guest.start()?;
    guest.wait(BOOT, "it to boot", |report| report.boot != second && report.tick > 3)?;
    guest.destroy()?;
    let before = controller.points("web")?.len();
    agent.process()?.thaw()?;
    scene.rests(&agent, "web")?;
    let points = controller.points("web")?;
    ensure!(points.len() == before + 1, "one that counts: {:?}", &points[before..]);

    // Its operator ended it, and wants it at the other site.
    let started = ["failover", "web", "--emergency", "--yes", "--start"];
    let report = controller.json(&started)?;
    ensure!(report["left_off"] == false && report["resumed"] == false, "{report}");
    let replica = b.guest("web")?;
    replica.wait(BOOT, "the replica to boot", |report| report.tick >= 1 && report.disks == 2)?;
    replica.destroy()?;
    Ok(())
}

/// Goal: a guest that nobody wanted off runs at the other site, from what it left on its disks. Method: its QEMU is killed; the
/// agent is restarted, and libvirtd forgets why it is off.
#[test]
fn a_guest_that_crashed_is_read_as_it_lies_and_its_replica_boots() -> Result<()> {
    let scene = Scene::new("off-crash")?;
    let Scene { a, b, controller, .. } = &scene;
    let spec = small("web").disk(DiskFormat::Raw, 16);
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::protecting(a, controller, &["web"], "1s")?;
    controller.wait_points("web", 2, SOON)?;
    kill(Pid::from_raw(guest.qemu_pid()?), Signal::SIGKILL)?;
    guest.wait_for_state("shut off", SOON)?;
    scene.rests(&agent, "web")?;
    let point = scene.last("web")?;
    ensure!(point["at_rest"] == true && point["stays_off"] == false, "{point}");
    agent.stop()?;
    a.restart_libvirtd()?;
    agent.start()?;
    scene.rests(&agent, "web")?;
    ensure!(scene.last("web")? == point, "nothing has changed");
    let report = controller.failover("web", "latest")?;
    ensure!(report["left_off"] == false && report["resumed"] == false, "{report}");
    b.guest("web")?.wait(BOOT, "the replica to boot", |report| report.tick >= 1 && report.disks == 1)?;
    Ok(())
}

/// Processes that read images at a source.
fn readers(site: &Site) -> Result<usize> {
    let found = site.command("pgrep").args(["-c", "-x", "qemu-nbd"]).output()?;
    found.stdout.trim().parse().context("how many there are")
}

/// A group of a guest that runs and of one that was never started.
fn group(scene: &Scene) -> Result<(Guest, Guest, GuestSpec, Agent)> {
    let Scene { a, controller, .. } = scene;
    let web = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16))?;
    let spec = scene.chain(small("db").disk(DiskFormat::Raw, 16))?;
    let db = a.define(&spec)?;
    fs::OpenOptions::new()
        .write(true)
        .open(a.host_path(spec.disk_path(0))?)?
        .write_all_at(&noise(2 * MIB), MIB as u64)?;
    web.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(a, controller, "[defaults]\nmax_pause = \"5s\"")?;
    agent.start()?;
    eventually(SOON, "the group to be made", || {
        let made =
            controller.cli(&["group", "create", "shop", "--vm", "web", "--vm", "db", "--rpo", "2s"])?;
        Ok(made.status.success().then_some(()))
    })?;
    controller.wait_more_group_points("shop", 4, SOON)?;
    Ok((web, db, spec, agent))
}

/// Goal: a group goes on getting points while a member is off, is ready, and is failed over as planned: what ran goes on, what
/// was off is off, and nothing runs at both sites. Method: a member that was never started; a drill, and a planned failover.
#[test]
fn a_group_with_a_member_that_is_off_has_points_and_is_failed_over_as_planned() -> Result<()> {
    let scene = Scene::new("off-planned")?;
    let Scene { b, controller, .. } = &scene;
    let (web, db, spec, agent) = group(&scene)?;
    let boot = web.last().context("it ticks")?.boot;
    let point = scene.last("db")?;
    ensure!(
        point["at_rest"] == true && point["cut"].is_string() && point["disk_changed_bytes"] == 0,
        "{point}"
    );
    ensure!(scene.last("web")?["has_memory"] == true);
    let row = agent.vm("db")?;
    ensure!(row["state"] == "protected" && row["off"] == true, "{row}");
    eventually(SOON, "the group to be ready", || {
        let (verdict, codes) = check(controller, "shop")?;
        Ok((verdict == "ready" && codes.iter().any(|code| code == "off")).then_some(()))
    })?;
    let drill = controller.json(&["drill", "shop"])?;
    ensure!(drill["passed"] == true && drill["notes"].to_string().contains("db: it was off"), "{drill:#}");

    let report = controller.json(&["failover", "shop", "--planned", "--yes"])?;
    let off = |name: &str| {
        let members = report["members"].as_array().into_iter().flatten();
        members.clone().find(|member| member["name"] == name).map(|member| member["left_off"].clone())
    };
    ensure!(off("db") == Some(true.into()) && off("web") == Some(false.into()), "{report:#}");
    let replica = b.guest("web")?;
    let first = replica.wait(SOON, "the replica to go on", |_| true)?;
    ensure!(first.boot == boot, "{first:?}");
    ensure!(b.guest("db")?.state()? == "shut off");
    scene.same_disks(&spec)?;
    for (guest, name) in [(&web, "web"), (&db, "db")] {
        ensure!(guest.state()? == "shut off", "{name} is {}", guest.state()?);
        let fenced = || {
            let row = agent.vm(name)?;
            Ok((row["state"] == "fenced" && row["fence"]["lease"] == false).then_some(()))
        };
        eventually(SOON, &format!("{name} to be fenced"), fenced)?;
    }
    Ok(())
}

/// Goal: a member that is shut down does not end its group's points, and one that is started again is cut as it runs; in an
/// emergency what was off is off. Method: a group on a host that is lost while one of its members is off again.
#[test]
fn a_member_that_is_shut_down_does_not_end_its_groups_points() -> Result<()> {
    let scene = Scene::new("off-emergency")?;
    let Scene { a, b, controller, .. } = &scene;
    let (web, db, spec, _agent) = group(&scene)?;
    let boot = web.last().context("it ticks")?.boot;
    let whole = |memory: bool| -> Result<()> {
        eventually(SOON, "a point of the group with db as it is", || {
            controller.wait_more_group_points("shop", 1, SOON)?;
            let point = controller.group_points("shop")?.pop().context("a group point")?;
            let of = point["members"].as_array().into_iter().flatten().find(|of| of["name"] == "db").cloned();
            let own = controller.points("db")?;
            let own = own.iter().find(|own| Some(&own["point"]) == of.as_ref().map(|of| &of["point"]));
            Ok(own.filter(|own| own["has_memory"] == memory && own["at_rest"] != memory).map(drop))
        })
    };
    db.start()?;
    db.wait_for_tick(3, BOOT)?;
    whole(true)?;
    db.destroy()?;
    whole(false)?;
    a.power_cut();
    let dry = controller.cli(&["failover", "shop", "--emergency", "--dry-run"])?.success()?;
    ensure!(dry.contains("NOT started, as they were off: db"), "{dry}");
    controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    let first = b.guest("web")?.wait(SOON, "the replica to go on", |_| true)?;
    ensure!(first.boot == boot, "{first:?}");
    ensure!(b.guest("db")?.state()? == "shut off");
    scene.same_disks(&spec)
}
