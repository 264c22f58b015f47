//! The products around a real guest: latency, pause, what goes over the wire, what the daemons hold in memory, and how
//! fast the guest's memory comes back out of the site's store.

use crate::{
    measure::{Watch, drop_cache, percentile, read_all},
    pipeline::LEVEL,
    rows::Rows,
    store::files_below,
};
use anyhow::{Context, Result};
use lifeboat::{
    format::{
        frame::{self, RAW_MAX},
        manifest::{ImageKind, blob},
    },
    id::VmId,
    units::{ByteSize, Seq},
};
use lifeboat_site_controller::{
    failover::{images, progress::Watcher},
    restore::{Plan, Reader},
    store::{LocalObjects, Objects, StoreError, paths, read_index, read_manifest},
};
use rig::{
    DiskFormat, GuestSpec, LogLine, Rig, Shape,
    product::{Agent, Controller},
};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};
use tokio::runtime::Runtime;

pub fn measure(runtime: &Runtime, scratch: &Path, rows: &mut Rows) -> Result<()> {
    let rig = Rig::new("bench")?;
    let (a, b) = (rig.site("A")?, rig.site("B")?);
    let _link = rig.link(&a, &b, Shape::mbit(1000))?;
    let mut controller = Controller::running(&b)?;
    let spec = GuestSpec::new(NAME)
        .memory_mib(MEMORY_MIB)
        .disk(DiskFormat::Raw, 128)
        .disk(DiskFormat::Qcow2, 128)
        .dirty_kib(512);
    a.define_and_start(&spec)?.wait_for_tick(3, PATIENCE)?;
    let mut agent = Agent::protecting(&a, &controller, &[NAME], "500ms")?;
    controller.wait_points(NAME, POINTS, PATIENCE)?;
    let (agent_rss, agent_peak) = agent.process()?.memory_kib()?;
    let (site_rss, site_peak) = controller.process()?.memory_kib()?;
    agent.process()?.term()?;
    agent.process()?.wait(PATIENCE)?;
    let log = agent.process()?.log();
    let points = controller.points(NAME)?;
    controller.stop()?;

    let accel = format!("{MEMORY_MIB} MiB guest, {}, 1 Gbit/s", rig.accel());
    let later: Vec<&Value> = points.iter().skip(1).filter(|point| changed(point) <= CHANGED_MAX).collect();
    latencies(&later, &log, &accel, rows);
    runtime.block_on(from_the_store(&controller.data_dir().join("store"), &later, scratch, rows))?;
    let mib = |kib: u64| kib as f64 / 1024.0;
    let after =
        format!("peak {:.0} MiB, after {} points of a {MEMORY_MIB} MiB guest", mib(agent_peak), points.len());
    rows.add("agent_rss_mb", mib(agent_rss), "MiB", None, after);
    let after = format!("peak {:.0} MiB", mib(site_peak));
    rows.add("controller_rss_mb", mib(site_rss), "MiB", None, after);
    Ok(())
}

fn number(point: &Value, key: &str) -> u64 {
    point[key].as_u64().unwrap_or_default()
}

fn changed(point: &Value) -> u64 {
    number(point, "memory_changed_bytes") + number(point, "disk_changed_bytes")
}

fn latencies(later: &[&Value], log: &str, accel: &str, rows: &mut Rows) {
    let told: BTreeMap<&str, f64> = LogLine::saying(log, "point is durable")
        .filter_map(|line| Some((line.value("point")?, line.number("latency_ms")? as f64)))
        .collect();
    let told: Vec<f64> =
        later.iter().filter_map(|point| told.get(point["point"].as_str()?).copied()).collect();
    let mean = later.iter().map(|point| changed(point)).sum::<u64>() as f64 / later.len().max(1) as f64 / 1e6;
    let note = format!(
        "{} later points, {mean:.1} MB changed each; {accel}; limit: the aim (p99 of so few is nearly the worst)",
        told.len()
    );
    rows.add("cut_to_acknowledged_p50", percentile(&told, 0.5), "ms", LATENCY_AIM_MS, note);
    rows.add("cut_to_acknowledged_p99", percentile(&told, 0.99), "ms", LATENCY_AIM_MS, "");
    let pauses: Vec<f64> = later.iter().map(|point| number(point, "pause_us") as f64 / 1e3).collect();
    rows.add("pause_p50", percentile(&pauses, 0.5), "ms", None, "from the guest's stop to its resume");
    rows.add("pause_p99", percentile(&pauses, 0.99), "ms", None, "");
}

async fn from_the_store(root: &Path, later: &[&Value], scratch: &Path, rows: &mut Rows) -> Result<()> {
    let objects: Arc<dyn Objects> = Arc::new(LocalObjects::open(root, ByteSize(0)).await?);
    let newest = later.last().context("no point after the first")?;
    let vm: VmId = newest["vm"].as_str().context("a point has a VM")?.parse()?;
    let (mut wire, mut raw, mut packed, mut changed) = (0, 0, 0, 0);
    for point in later {
        let Some((bytes, best)) = repacked(objects.as_ref(), vm, Seq(number(point, "seq"))).await? else {
            continue;
        };
        (wire, raw, packed) = (wire + number(point, "wire_bytes"), raw + bytes, packed + best);
        changed += self::changed(point);
    }
    rows.add(
        "wire_ratio",
        wire as f64 / changed.max(1) as f64,
        "of changed",
        packed as f64 / raw.max(1) as f64,
        format!(
            "{:.1} MB of frames for {:.1} MB; limit: the same pages in full 256 KiB groups, zstd {LEVEL}, no heads",
            wire as f64 / 1e6,
            changed as f64 / 1e6
        ),
    );
    restore_memory(objects, root, vm, Seq(number(newest, "seq")), scratch, rows).await
}

/// Bytes of pages in a point's frames, and what they pack to when each image's are put in full groups. `None`: the point was
/// folded since, and what came over the wire is gone.
async fn repacked(objects: &dyn Objects, vm: VmId, seq: Seq) -> Result<Option<(u64, u64)>> {
    let (manifest, _, _) = read_manifest(objects, vm, seq).await?;
    let mut images: BTreeMap<u16, Vec<u8>> = BTreeMap::new();
    for pack in &manifest.packs {
        let path = paths::pack(vm, pack.id);
        let mut pages = Vec::new();
        let index = match read_index(objects, vm, pack).await {
            Err(StoreError::Missing { .. }) => return Ok(None),
            index => index?,
        };
        for entry in index {
            let from = entry.body_offset();
            let body = objects.get_range(&path, from..from + u64::from(entry.head.body_len)).await?;
            frame::open(&entry.head, &body, &mut pages)?;
            images.entry(entry.head.image).or_default().extend_from_slice(&pages);
        }
    }
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    let (mut raw, mut packed) = (0, 0);
    for group in images.values().flat_map(|pages| pages.chunks(RAW_MAX)) {
        raw += group.len() as u64;
        packed += compressor.compress(group)?.len() as u64;
    }
    Ok(Some((raw, packed)))
}

async fn restore_memory(
    objects: Arc<dyn Objects>,
    root: &Path,
    vm: VmId,
    seq: Seq,
    scratch: &Path,
    rows: &mut Rows,
) -> Result<()> {
    let files = files_below(root)?;
    files.iter().try_for_each(|file| drop_cache(file))?;
    let watch = Watch::start();
    let plan = Plan::load(objects.as_ref(), vm, seq).await?;
    let ram = plan.images().iter().filter(|planned| planned.image.kind == ImageKind::Ram);
    let bytes: u64 = ram.map(|planned| planned.live_bytes).sum();
    let reader = Reader::new(objects, Arc::new(plan));
    let xml = images::text_blob(&reader, blob::DOMAIN_XML).await?;
    let (tell, _nobody) = tokio::sync::mpsc::channel(1);
    let target = scratch.join("memory.save");
    images::write_save_image(&reader, xml, true, &target, &Watcher::new(tell)).await?;
    let took = watch.stop();
    files.iter().try_for_each(|file| drop_cache(file))?;
    let watch = Watch::start();
    let stored = read_all(&files)?;
    let reading = watch.stop();
    rows.add(
        "restore_memory",
        took.gb_per_s(bytes),
        "GB/s",
        reading.gb_per_s(bytes),
        format!(
            "{:.0} MB of memory composed from {} points ({:.0} MB); limit: reading the store's bytes, uncached",
            bytes as f64 / 1e6,
            seq.0,
            stored as f64 / 1e6
        ),
    );
    Ok(std::fs::remove_file(target)?)
}

const NAME: &str = "web";
const MEMORY_MIB: u64 = 256;
const POINTS: usize = 41;
/// Later points that changed more are not what the aim is about.
const CHANGED_MAX: u64 = 20_000_000;
const LATENCY_AIM_MS: f64 = 1000.0;
const PATIENCE: Duration = Duration::from_secs(120);
