//! Nothing starts over: whatever is restarted, what the site holds already does not travel again. Asserted in bytes, as
//! the site counts them, and by what a failover then resumes.

use anyhow::{Context, Result, ensure};
use nix::{sys::signal::Signal, unistd::Pid};
use rig::{
    DiskFormat, Guest, Rig, eventually,
    product::{Agent, Controller, killed_at, replica_unharmed, small},
};
use serde_json::Value;
use std::{fs, os::unix::fs::FileExt, path::Path, time::Duration};

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(180);
const WEB: &str = "[defaults]\ninterval = \"500ms\"\nmax_pause = \"5s\"\n[[vm]]\nname = \"web\"";
const DISK_MIB: u64 = 48;

/// Goal: a restart of anything costs what changed. Method: a guest with much in memory and on disk; the agent is killed,
/// QEMU is killed and the guest started again, the site is stopped and started, killed while it is asked; each time the
/// points that follow are counted. At the end the guest goes on at the other site, and says whether all was right.
#[test]
fn after_a_restart_of_agent_guest_or_site_only_differences_travel() -> Result<()> {
    let rig = Rig::new("resync")?;
    let (a, b, link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let spec = small("web").fill_mib(32).disk(DiskFormat::Raw, DISK_MIB).disk(DiskFormat::Qcow2, 16);
    let disk = a.host_path(spec.disk_path(0))?;
    fs::create_dir_all(disk.parent().context("a disk lies in a folder")?)?;
    fs::write(&disk, noise((DISK_MIB as usize) << 20))?;
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    let points = controller.wait_points("web", 2, SOON)?;
    let first = points.first().context("a first point")?;
    let (memory, disks) = (changed(first, "memory"), changed(first, "disk"));
    ensure!(memory > 32 << 20 && disks >= DISK_MIB << 20, "the first point was to be large: {first}");

    // The agent forgets what the site holds of memory; the marks are in QEMU.
    agent.kill9()?;
    let carried = link.bytes()?.a_to_b;
    let cheap = Cheap { memory: memory / 4, disks: disks / 8 };
    let before = controller.points("web")?.len();
    agent.start()?;
    cheap.check(&controller.wait_points("web", before + 2, SOON)?[before..])?;
    let carried = link.bytes()?.a_to_b - carried;
    ensure!(carried < memory / 2, "the line carried {carried} bytes, the first point had {memory} of memory");

    // QEMU and its marks are gone; memory is another boot's, disks are what they were.
    let boot = crash(&guest)?;
    let before = controller.points("web")?.len();
    let points = controller.wait_points("web", before + 2, SOON)?;
    Cheap { memory: u64::MAX, disks: disks / 8 }.check(&points[before..])?;

    // Both at once, and the site dies while it is asked.
    agent.kill9()?;
    let boot = restart(&guest, &boot)?;
    controller.stop()?;
    controller.env = killed_at("compare.ask:2");
    controller.start()?;
    agent.start()?;
    controller.process()?.wait(SOON).context("the site should die when it is asked")?;
    controller.start()?;
    let before = controller.points("web")?.len();
    let points = controller.wait_points("web", before + 2, SOON)?;
    Cheap { memory: u64::MAX, disks: disks / 8 }.check(&points[before..])?;

    // A site that is restarted has forgotten nothing, and neither has the agent.
    agent.wait_state("web", "protected", SOON)?;
    controller.stop()?;
    let before = {
        controller.start()?;
        controller.points("web")?.len()
    };
    cheap.check(&controller.wait_points("web", before + 2, SOON)?[before..])?;

    // What changed behind QEMU's back is in no mark: only a comparison that was asked for finds it.
    let file = fs::OpenOptions::new().write(true).open(&disk)?;
    file.write_all_at(&[0x5a; 64 << 10], (DISK_MIB << 20) - (64 << 10))?;
    agent.command()?.args(["resync", "web"]).run()?;
    let compared = |agent: &mut Agent| {
        Ok::<_, anyhow::Error>(agent.process()?.log().matches("as was asked for").count())
    };
    eventually(SOON, "the comparison to begin", || Ok((compared(&mut agent)? == 1).then_some(())))?;
    let before = controller.points("web")?.len();
    cheap.check(&controller.wait_points("web", before + 2, SOON)?[before..])?;

    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    let tick = guest.last().context("it ticks")?.tick;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, tick.saturating_sub(20), SOON)?;
    same_blocks(&fs::read(&disk)?, &replica_disk(&controller.replica_dir())?, &boot)
}

/// Goal: a line that is down costs what changed meanwhile, once. Method: the guest rewrites the same memory and blocks
/// many times over while the line is cut, for longer than a point waits.
#[test]
fn a_line_that_was_down_costs_what_changed_once() -> Result<()> {
    let rig = Rig::new("resync-line")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("web").dirty_kib(2048).disk(DiskFormat::Raw, 16).disk_writes(64);
    let guest = a.define_and_start(&spec)?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;
    link.cut()?;
    agent.wait_state("web", "degraded", SOON)?;
    eventually(SOON, "the open point to be put back", || {
        let reason = agent.vm("web")?["reason"].to_string();
        Ok(reason.contains("put back").then_some(()))
    })?;
    let from = guest.last().context("it ticks")?.tick;
    guest.wait_for_tick(from + 40, SOON)?;
    link.restore()?;
    let before = controller.points("web")?.len();
    let points = controller.wait_points("web", before + 1, SOON)?;
    let after = points.get(before).context("a point")?;
    // Forty times 2 MiB of 8 MiB of memory, and forty times 256 KiB of 16 MiB of disk.
    ensure!(changed(after, "memory") < 40 << 20, "{after}");
    ensure!(changed(after, "disk") <= 16 << 20, "{after}");
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, from, SOON)?;
    Ok(())
}

/// What points after a restart may cost.
struct Cheap {
    memory: u64,
    disks: u64,
}

impl Cheap {
    fn check(&self, points: &[Value]) -> Result<()> {
        for point in points {
            let (memory, disks) = (changed(point, "memory"), changed(point, "disk"));
            eprintln!("after a restart: memory {memory}, disks {disks}");
            ensure!(memory <= self.memory, "{memory} bytes of memory travelled: {point}");
            ensure!(disks <= self.disks, "{disks} bytes of disks travelled: {point}");
        }
        Ok(())
    }
}

fn changed(point: &Value, of: &str) -> u64 {
    point[format!("{of}_changed_bytes")].as_u64().unwrap_or(u64::MAX)
}

/// Kills QEMU as a crash does, and starts the guest again; returns its new boot.
fn crash(guest: &Guest) -> Result<String> {
    let boot = guest.last().context("it ticked")?.boot;
    nix::sys::signal::kill(Pid::from_raw(guest.qemu_pid()?), Signal::SIGKILL)?;
    guest.wait_for_state("shut off", SOON)?;
    guest.start()?;
    Ok(guest.wait(BOOT, "the guest to boot anew", |report| report.boot != boot)?.boot)
}

fn restart(guest: &Guest, boot: &str) -> Result<String> {
    guest.destroy()?;
    guest.start()?;
    Ok(guest.wait(BOOT, "the guest to boot anew", |report| report.boot != boot)?.boot)
}

/// The replica's first disk.
fn replica_disk(dir: &Path) -> Result<Vec<u8>> {
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vda.")) {
                return Ok(fs::read(path)?);
            }
        }
    }
    anyhow::bail!("{} holds no disk vda", dir.display())
}

/// Blocks that only earlier boots wrote, or nobody, are the same; those of the last one the guest checks itself.
fn same_blocks(source: &[u8], replica: &[u8], boot: &str) -> Result<()> {
    let boot = u64::from_str_radix(boot, 16)?.to_le_bytes();
    ensure!(source.len() == replica.len(), "{} bytes became {}", source.len(), replica.len());
    for (at, (ours, theirs)) in source.chunks(4096).zip(replica.chunks(4096)).enumerate() {
        let written = ours.starts_with(&boot) || theirs.starts_with(&boot);
        ensure!(ours == theirs || written, "block {at} is another at the replica");
    }
    Ok(())
}

/// Bytes that do not pack.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
