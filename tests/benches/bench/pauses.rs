//! How long a guest stands still for a point, by how much it changed, and what others' ways to a copy cost the same
//! guest in the same run.

use crate::{
    measure::percentile,
    parts,
    rows::Rows,
    scene::{GUEST, PATIENCE, Scene, changed, number},
};
use anyhow::Result;
use rig::{DiskFormat, GuestSpec};
use serde_json::Value;
use std::time::{Duration, Instant};

pub fn measure(rows: &mut Rows) -> Result<()> {
    let small = with_load(rows, 128, CUTS, true)?;
    let large = with_load(rows, 4096, CUTS / 8, false)?;
    let (more_ms, more_mb) = (large.0 - small.0, large.1 - small.1);
    rows.add(
        "pause_per_dirty_mb_ms",
        more_ms / more_mb.max(0.001),
        "ms/MB",
        0.4,
        format!(
            "from {:.1} to {:.1} MB changed in a point, medians of the step that depends on it (memory); limit: the aim",
            small.1, large.1
        ),
    );
    Ok(())
}

/// Medians of what memory took of the pause (ms) and of changed memory (MB), of a guest that gives so many KiB a new
/// content each 100 ms.
fn with_load(rows: &mut Rows, dirty_kib: u64, cuts: usize, tell: bool) -> Result<(f64, f64)> {
    let spec = GuestSpec::new(GUEST).memory_mib(256).disk(DiskFormat::Raw, 128).dirty_kib(dirty_kib);
    let mut scene = Scene::witness("pauses", 1000, &spec)?;
    scene.protect("250ms", "")?;
    scene.more_points(2, PATIENCE)?;
    let points = scene.more_points(cuts, Duration::from_secs(1200))?;
    let took = scene.pause_steps()?;
    let few: Vec<&Value> =
        points.iter().filter(|point| !tell || number(point, "memory_changed_bytes") <= SMALL_BYTES).collect();
    let pauses: Vec<f64> = few.iter().map(|point| number(point, "pause_us") as f64 / 1e3).collect();
    let memory: Vec<f64> =
        few.iter().map(|point| number(point, "memory_changed_bytes") as f64 / 1e6).collect();
    if tell {
        let mean = few.iter().map(|point| changed(point)).sum::<u64>() as f64 / few.len().max(1) as f64 / 1e6;
        let note = format!("{} cuts of {mean:.1} MB on average, 256 MiB guest, {}", few.len(), scene.says());
        rows.add("pause_p50_small_dirty_ms", percentile(&pauses, 0.5), "ms", None, note);
        let aim = 10.0 + 0.4 * percentile(&memory, 0.99);
        rows.add("pause_p99_small_dirty_ms", percentile(&pauses, 0.99), "ms", aim, "limit: the aim");
        for (row, step, what) in STEPS {
            rows.add(row, median(&took, step), "ms", None, format!("of the above: {what}"));
        }
        parts::measure(rows, &scene.guest, &took)?;
        scene.unprotect()?;
        others(rows, &scene)?;
    }
    Ok((median(&took, "memory"), percentile(&memory, 0.5)))
}

fn median(steps: &[(String, Vec<f64>)], step: &str) -> f64 {
    steps.iter().find(|(name, _)| name == step).map_or(0.0, |(_, took)| percentile(took, 0.5))
}

/// What libvirt's own ways to a copy of the same guest cost it.
fn others(rows: &mut Rows, scene: &Scene) -> Result<()> {
    let file = "/var/lib/libvirt/qemu/bench.save";
    let watch = Instant::now();
    scene.source.virsh(["save", GUEST, file])?;
    scene.source.virsh(["restore", file])?;
    let saved = watch.elapsed();
    let note = "the guest stands still from save to the end of restore, and once more for each copy";
    rows.add("pause_virsh_save_ms", saved.as_secs_f64() * 1e3, "ms", None, note);

    let mut events = scene
        .source
        .command("virsh")
        .args([
            "-q",
            "-c",
            "qemu:///system",
            "event",
            "--domain",
            GUEST,
            "--event",
            "lifecycle",
            "--loop",
            "--timestamp",
        ])
        .named("events")
        .spawn()?;
    // Its registration shows in nothing: an event of our own making says that it is there.
    rig::eventually(PATIENCE, "virsh to tell events", || {
        scene.guest.suspend()?;
        scene.guest.resume()?;
        Ok(events.log().contains("Resumed").then_some(()))
    })?;
    let before = events.log().lines().count();
    scene.source.virsh([
        "snapshot-create-as",
        GUEST,
        "bench",
        "--live",
        "--atomic",
        "--memspec",
        "file=/var/lib/libvirt/qemu/bench.mem,snapshot=external",
        "--diskspec",
        "vda,snapshot=external,file=/var/lib/libvirt/images/bench.qcow2",
    ])?;
    let paused = rig::eventually(PATIENCE, "the guest to have been resumed", || {
        let log = events.log();
        let told: Vec<&str> = log.lines().skip(before).collect();
        let at = |what: &str| told.iter().rev().find(|line| line.contains(what)).and_then(|line| stamp(line));
        Ok(at("Suspended").zip(at("Resumed")).filter(|(from, to)| to >= from).map(|(from, to)| to - from))
    })?;
    let note = "from libvirt's event of the stop to that of the resume; a full copy of memory each time";
    rows.add("pause_live_snapshot_ms", paused, "ms", None, note);

    // A raw disk can't be backed up a second time; the snapshot's overlay is qcow2.
    let watch = Instant::now();
    scene.source.virsh(["backup-begin", GUEST])?;
    let begun = watch.elapsed();
    let note = "the command's own time: disks only, no memory";
    rows.add("backup_begin_ms", begun.as_secs_f64() * 1e3, "ms", None, note);
    events.kill9()?;
    Ok(())
}

/// The milliseconds since midnight of a line that begins `2026-01-31 12:00:00.250+0000:`.
fn stamp(line: &str) -> Option<f64> {
    let time = line.split_whitespace().nth(1)?.get(..12)?;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    Some(((hour * 60.0 + minute) * 60.0 + second) * 1e3)
}

/// Row, the agent's name of the step, and what it is.
const STEPS: [(&str, &str, &str); 5] = [
    ("pause_p50_stop_ms", "stop", "marker, watchdog, QEMU's `stop`"),
    ("pause_p50_memory_ms", "memory", "finding and reading what changed"),
    ("pause_p50_device_ms", "device", "QEMU writes the state of its devices"),
    ("pause_p50_disk_ms", "disk", "the marks of all disks, in one transaction"),
    ("pause_p50_cont_ms", "cont", "QEMU's `cont`, and the guard's end"),
];
const CUTS: usize = 200;
/// 1,000 pages.
const SMALL_BYTES: u64 = 4_096_000;
