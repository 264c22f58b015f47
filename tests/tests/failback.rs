//! There and home again: after a failover the VM is protected back to where it came from, fails over to there, and is
//! protected to the second site once more. Its disks lie at both sites, so that only what changed travels; and whoever was
//! fenced is let in again where the VM is, and nowhere else.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, GuestSpec, Link, Rig, Site,
    ends::REPROTECT,
    eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small, stand_still},
};
use serde_json::Value;
use std::{env, fs, io::Read, os::unix::fs::FileExt, path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(240);
const MAC: &str = "52:54:00:0b:0a:7e";

/// One end: a site with its own controller, and a host whose agent protects to the other end's.
struct End {
    site: Site,
    controller: Controller,
    agent: Agent,
    started: bool,
}

struct World {
    _rig: Rig,
    link: Link,
    a: End,
    b: End,
}

impl World {
    fn new(name: &str, vm: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let (at_a, at_b) = (Controller::running(&a)?, Controller::running(&b)?);
        let settings = format!("[defaults]\nmax_pause = \"20s\"\n[[vm]]\nname = \"web\"\n{vm}");
        let (of_a, of_b) = (Agent::install(&a, &at_b, &settings)?, Agent::install(&b, &at_a, &settings)?);
        let mut a = End { site: a, controller: at_a, agent: of_a, started: false };
        let b = End { site: b, controller: at_b, agent: of_b, started: false };
        a.start_agent()?;
        Ok(Self { _rig: rig, link, a, b })
    }
}

impl End {
    fn start_agent(&mut self) -> Result<()> {
        if !self.started {
            self.agent.start()?;
            self.started = true;
        }
        Ok(())
    }

    /// Fails the VM over to here, which is off at the other end. An agent here may have been fenced; nobody tells it anything.
    fn take(&self) -> Result<Value> {
        if self.started {
            self.agent.wait_state("web", "fenced", SOON)?;
        }
        let console = self.site.guest("web")?.console().path().to_owned();
        if console.exists() {
            fs::remove_file(&console).context("forgetting what it said when it was here before")?;
        }
        self.controller.failover("web", "latest")
    }

    fn claim(&self, into: &Path) -> Result<()> {
        let claim = self.controller.cli(&["claim", "web", "--json"])?.success()?;
        Ok(fs::write(into, claim)?)
    }

    /// Lets the other end's agent protect the VM to here.
    fn accept(&self, claim: &Path, agent: &str) -> Result<Value> {
        self.controller.json(&["accept", "web", "--claim", &claim.to_string_lossy(), "--agent", agent])
    }

    /// Points of a generation that an agent sent.
    fn points_of(&self, generation: &Value) -> Result<Vec<Value>> {
        let mut points = self.controller.points("web")?;
        points.retain(|point| point["generation"] == *generation && point["seed"] == false);
        Ok(points)
    }

    fn wait_points_of(&self, generation: &Value, count: usize) -> Result<Vec<Value>> {
        eventually(SOON, &format!("{count} points of generation {generation}"), || {
            let points = self.points_of(generation).unwrap_or_default();
            Ok((points.len() >= count).then_some(points))
        })
    }
}

/// What it cost to protect the VM back.
struct Cost {
    wire: u64,
    first: Value,
}

/// The VM runs at `from`: from now on it is protected to `to`, where its disks of before lie.
fn reprotect(from: &mut End, to: &End, link: &Link) -> Result<Cost> {
    let sent = |link: &Link| -> Result<u64> {
        let carried = link.bytes()?;
        Ok(if from.site.name() == "A" { carried.a_to_b } else { carried.b_to_a })
    };
    let before = sent(link)?;
    let claim = to.site.dir("claims")?.join("claim.json");
    from.claim(&claim)?;
    let accepted = to.accept(&claim, from.site.name())?;
    let seeded = accepted["seed"]["disks"].as_array().map_or(0, Vec::len);
    ensure!(seeded > 0, "no disks were taken in: {accepted}");
    if !from.started {
        from.agent.start()?;
        from.started = true;
    }
    let first = to.wait_points_of(&accepted["generation"], 1)?.remove(0);
    let wire = sent(link)? - before;
    from.agent.wait_state("web", "protected", SOON)?;
    Ok(Cost { wire, first })
}

fn changed(point: &Value, of: &str) -> u64 {
    point[format!("{of}_changed_bytes")].as_u64().unwrap_or(u64::MAX)
}

fn noise(seed: u8, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![seed; len];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A disk with bytes that do not pack, before the guest is started.
fn fill(site: &Site, spec: &GuestSpec, disk: usize) -> Result<()> {
    let path = site.host_path(spec.disk_path(disk))?;
    fs::create_dir_all(path.parent().context("a disk lies in a folder")?)?;
    Ok(fs::write(path, noise(1, (spec.disks[disk].size_mib as usize) << 20)?)?)
}

fn trips() -> usize {
    env::var("LIFEBOAT_TRIPS").ok().and_then(|trips| trips.parse().ok()).unwrap_or(2)
}

/// Goal: a guest that goes to the other site and home again, as often as one likes, goes on where it stood, is who it was,
/// and what travels is what it changed. Method: a working guest with a raw and a qcow2 disk, full of noise; it is made to
/// stand, so that nothing is lost, but for the first time, when its disks at home are ahead of the point that it goes on
/// from. Points and the line are counted.
#[test]
fn a_guest_goes_to_the_other_site_and_home_again_and_only_what_changed_travels() -> Result<()> {
    let World { a: mut home, b: mut away, link, _rig } = World::new("failback", "interval = \"500ms\"")?;
    let card = format!("<interface type='user'><mac address='{MAC}'/><model type='virtio'/></interface>");
    let spec = small("web").fill_mib(16).disk(DiskFormat::Raw, 48).disk(DiskFormat::Qcow2, 16);
    fill(&home.site, &spec, 0)?;
    let guest = home.site.define(&spec)?;
    let file = home.site.dir("domains")?.join("card.xml");
    fs::write(&file, card)?;
    home.site.virsh(["attach-device", "web", &file.to_string_lossy(), "--config"])?;
    guest.start()?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    // Points came while it booted: one that knows its boot is wanted.
    away.controller.wait_more_points("web", 2, SOON)?;
    let disks = 48 << 20;
    for trip in 0..trips() {
        for out in [true, false] {
            let (from, to) = if out { (&mut home, &mut away) } else { (&mut away, &mut home) };
            let loses = out && trip == 0;
            let guest = from.site.guest("web")?;
            if !loses {
                stand_still(&guest, &to.controller, "web", SOON)?;
            }
            let before = guest.last().context("it ticks")?;
            if loses {
                // What it writes now is on its disks here, and in no point.
                link.cut()?;
                guest.wait_for_tick(before.tick + 30, SOON)?;
            }
            guest.destroy()?;
            to.take()?;
            if loses {
                link.restore()?;
            }
            let replica = to.site.guest("web")?;
            if !loses {
                replica.resume()?;
            }
            let after = replica_unharmed(&replica, &boot, 0, SOON)?;
            let first = replica.console().reports().remove(0);
            ensure!(loses || first.tick + 1 >= before.tick, "it went back from {before:?} to {first:?}");
            let xml = to.site.virsh(["dumpxml", "web"])?;
            ensure!(xml.contains(&spec.uuid.to_string()) && xml.contains(MAC), "it is another: {xml}");
            let cost = reprotect(to, from, &link)?;
            let (memory, disk) = (changed(&cost.first, "memory"), changed(&cost.first, "disk"));
            eprintln!(
                "trip {trip}, to {}: memory {memory}, disks {disk}, line {}",
                to.site.name(),
                cost.wire
            );
            ensure!(disk < disks / 2, "the disks travelled: {}", cost.first);
            // The first way back the site has nothing to compare memory with.
            let first = trip == 0 && out;
            ensure!(first || memory < 24 << 20, "the memory travelled: {}", cost.first);
            ensure!(first || cost.wire < disks / 2, "the line carried {} bytes", cost.wire);
            ensure!(after.unharmed());
        }
    }
    for end in [&home, &away] {
        end.controller.cli(&["verify", "web"])?.success()?;
        let names: Vec<_> = end.controller.points("web")?.iter().map(|point| point["name"].clone()).collect();
        ensure!(names.iter().all(|name| name == "web"), "{names:?}");
    }
    Ok(())
}

/// Goal: of disks of which 1 % changed at the other site, no more than 2 % travels home. Method: a guest that writes nothing
/// itself, without memory; QEMU is told to write noise to its disk at the other site.
#[test]
fn of_disks_that_changed_by_one_per_cent_no_more_than_two_per_cent_travels_home() -> Result<()> {
    let settings = "interval = \"500ms\"\nmemory = \"off\"";
    let World { a: mut home, b: mut away, link, _rig } = World::new("one-per-cent", settings)?;
    let mib: u64 = env::var("LIFEBOAT_FAILBACK_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(256);
    let spec = small("web").disk(DiskFormat::Raw, mib).idle();
    fill(&home.site, &spec, 0)?;
    let guest = home.site.define_and_start(&spec)?;
    guest.wait_for_tick(2, BOOT)?;
    // Points came while it booted: one that knows its boot is wanted.
    away.controller.wait_more_points("web", 2, SOON)?;
    guest.destroy()?;
    away.take()?;
    let replica = away.site.guest("web")?;
    replica.wait_for_tick(2, BOOT)?;
    let bytes = mib << 20;
    let source = away.site.dir("noise")?.join("noise");
    let piece = (bytes / 1000) & !4095;
    fs::write(&source, noise(2, usize::try_from(piece)?)?)?;
    for at in 0..10 {
        let write = format!("write -s {} {} {piece}", source.display(), (at * bytes / 10) & !4095);
        let backend = "/machine/peripheral/virtio-disk0/virtio-backend";
        let io = format!("qemu-io -d {backend} \"{write}\"");
        let said = away.site.virsh(["qemu-monitor-command", "--hmp", "web", &io])?;
        ensure!(!said.contains("rror"), "{said}");
    }
    let cost = reprotect(&mut away, &home, &link)?;
    let disk = changed(&cost.first, "disk");
    eprintln!("{bytes} bytes of disk: {disk} changed, the line carried {}", cost.wire);
    ensure!(disk >= piece * 9, "what was written is not in the point: {}", cost.first);
    ensure!(cost.wire * 50 <= bytes, "{} bytes travelled of {bytes}", cost.wire);
    // And what is at home then is what is there.
    away.site.guest("web")?.destroy()?;
    home.take()?;
    let theirs = fs::read(replica_disk(&away.controller.replica_dir())?)?;
    let ours = fs::read(replica_disk(&home.controller.replica_dir())?)?;
    ensure!(ours == theirs, "the disk at home is another");
    home.start_agent()?;
    Ok(())
}

/// Goal: a controller that is killed in a seed or a hand-over loses nothing, lets nobody in too early, and the same command
/// finishes it; a claim that something came after is refused. Method: the VM went to the other site and home; the other
/// site is killed at each step of letting its agent in again.
#[test]
fn a_hand_over_is_finished_wherever_its_controller_died_and_an_old_claim_is_refused() -> Result<()> {
    let settings = "interval = \"500ms\"\nmemory = \"off\"";
    let World { a: home, b: mut away, link, _rig } = World::new("hand-over", settings)?;
    let spec = small("web").disk(DiskFormat::Raw, 16).idle();
    fill(&home.site, &spec, 0)?;
    let guest = home.site.define_and_start(&spec)?;
    guest.wait_for_tick(2, BOOT)?;
    // Points came while it booted: one that knows its boot is wanted.
    away.controller.wait_more_points("web", 2, SOON)?;
    let unclaimed = home.controller.cli(&["claim", "web"])?;
    ensure!(!unclaimed.status.success(), "it was never failed over to here: {unclaimed:?}");
    guest.destroy()?;
    away.take()?;
    home.agent.wait_state("web", "fenced", SOON)?;
    let old = home.site.dir("claims")?.join("old.json");
    away.claim(&old)?;
    // Where it runs nothing is handed over.
    let running = away.controller.cli(&["accept", "web", "--yes", "--agent", "A"])?;
    ensure!(!running.status.success() && running.stderr.contains("running"), "{running:?}");
    reprotect(&mut away, &home, &link)?;
    away.site.guest("web")?.destroy()?;
    home.take()?;
    home.site.guest("web")?.wait_for_tick(2, BOOT)?;
    home.agent.wait_state("web", "fenced", SOON)?;

    let claim = away.site.dir("claims")?.join("claim.json");
    home.claim(&claim)?;
    let before = away.controller.points("web")?;
    for place in REPROTECT {
        away.controller.stop()?;
        away.controller.env = killed_at(place);
        away.controller.start()?;
        let died = away.accept(&claim, "A");
        ensure!(died.is_err(), "{place}: {died:?}");
        away.controller.process()?.wait(SOON).with_context(|| format!("it should die at {place}"))?;
        away.controller.start()?;
        let status = away.controller.status()?;
        ensure!(status["findings"].as_array().is_some_and(Vec::is_empty), "{place}: {status}");
        let closed = away.controller.vm("web")?["failover"].is_null();
        ensure!(closed == (place == "accept.closed"), "{place}: {status}");
    }
    let generation = eventually(SOON, "the hand-over to be finished", || {
        Ok(away.accept(&claim, "A").ok().map(|report| report["generation"].clone()))
    })?;
    away.wait_points_of(&generation, 2)?;
    home.agent.wait_state("web", "protected", SOON)?;
    away.controller.cli(&["verify", "web"])?.success()?;
    let after = away.controller.points("web")?;
    ensure!(after.len() > before.len() && before.iter().zip(&after).all(|(a, b)| a["point"] == b["point"]));
    ensure!(away.controller.vm("web")?["failover"].is_null(), "its failover is closed");

    // The claim that the away site made when it had the VM, at home, where it has been since.
    let refused =
        home.controller.cli(&["accept", "web", "--claim", &old.to_string_lossy(), "--agent", "B"])?;
    ensure!(!refused.status.success(), "{refused:?}");
    let late = away.controller.cli(&["claim", "web"])?;
    ensure!(!late.status.success() && late.stderr.contains("never failed over"), "{late:?}");
    home.site.guest("web")?.wait_for_state("running", SOON)
}

/// Goal: a first copy need not travel if its disks were shipped. Method: a copy of the disk is taken while the guest is off,
/// and seeds the site; the guest then goes on, changes some of it, and its first point carries that.
#[test]
fn a_shipped_copy_spares_the_line_the_first_point() -> Result<()> {
    let rig = Rig::new("shipped")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Raw, 64).idle();
    fill(&a, &spec, 0)?;
    let guest = a.define(&spec)?;
    let shipped = b.dir("shipped")?;
    fs::copy(a.host_path(spec.disk_path(0))?, shipped.join("vda.raw"))?;
    let vm = spec.uuid.to_string();
    let nameless = controller.cli(&["seed", &vm, "--seed", &shipped.to_string_lossy()])?;
    ensure!(!nameless.status.success() && nameless.stderr.contains("--name"), "{nameless:?}");
    let report = controller.json(&["seed", &vm, "--name", "web", "--seed", &shipped.to_string_lossy()])?;
    ensure!(report["over"].is_null() && report["disks"][0]["target"] == "vda", "{report}");
    let row = controller.vm("web")?;
    ensure!(row["rpo_ms"].is_null() && row["latest"]["seed"] == true, "{row}");
    let latest = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    ensure!(!latest.status.success() && latest.stderr.contains("is a seed"), "{latest:?}");

    let disk = fs::OpenOptions::new().write(true).open(a.host_path(spec.disk_path(0))?)?;
    disk.write_all_at(&noise(3, 300 << 10)?, 1 << 20)?;
    guest.start()?;
    guest.wait_for_tick(2, BOOT)?;
    let carried = link.bytes()?.a_to_b;
    let mut agent =
        Agent::install(&a, &controller, "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmemory = \"off\"")?;
    agent.start()?;
    let points = controller.wait_points("web", 2, SOON)?;
    let (disk, wire) = (changed(&points[1], "disk"), link.bytes()?.a_to_b - carried);
    eprintln!("shipped: {disk} of disk, the line carried {wire}");
    ensure!((300 << 10..2 << 20).contains(&disk), "{}", points[1]);
    ensure!(wire < 4 << 20, "the line carried {wire}");
    // Nobody may take its history from it.
    let busy = controller.cli(&["seed", "web", "--seed", &shipped.to_string_lossy()])?;
    ensure!(!busy.status.success() && busy.stderr.contains("agent A"), "{busy:?}");
    a.power_cut();
    controller.failover("web", "latest")?;
    let booted = b.guest("web")?.wait_for_tick(2, BOOT)?;
    ensure!(booted.unharmed(), "{booted:?}");
    Ok(())
}

/// The first disk of the newest attempt.
fn replica_disk(dir: &Path) -> Result<std::path::PathBuf> {
    let vm = fs::read_dir(dir)?.next().context("a replica")??.path();
    let attempts = fs::read_dir(vm)?.flatten().map(|entry| entry.path());
    let newest = attempts.max_by_key(|attempt| fs::metadata(attempt).and_then(|data| data.modified()).ok());
    Ok(newest.context("an attempt")?.join("vda.raw"))
}
