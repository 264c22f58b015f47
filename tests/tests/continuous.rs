//! One point after the other, of a guest that never rests: each is, to the byte, what the guest was at its instant, and
//! any of them continues it. `LIFEBOAT_CONTINUOUS_POINTS` says how many are compared; a few unless said.

use anyhow::{Context, Result, ensure};
use lifeboat::{
    format::manifest::ImageKind,
    id::VmId,
    units::{ByteSize, Seq},
};
use lifeboat_site_controller::{
    restore::{Plan, Reader, RestoreError},
    store::{LocalObjects, Objects},
};
use rig::{
    DiskFormat, Guest, GuestSpec, Report, Rig, eventually,
    product::{Agent, Controller, Held, replica_unharmed, small},
};
use std::{
    fs,
    path::Path,
    sync::Arc,
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const PAGE: usize = 4096;
/// Between the VGA window and the first megabyte's end there are device memory and shadowed ROMs.
const NOT_PLAIN_RAM: std::ops::Range<usize> = 0xa_0000..0x10_0000;

/// Goal: no changed page or block is ever missed, and every point restores. Method: a guest under load; at a random
/// moment it is suspended as by its operator, a point is cut of it as it stands, and its memory is read where QEMU says
/// that it is (each tenth time QEMU dumps it, which is slow); it goes on, points are cut while it runs, and so again and
/// again. Afterwards each of those points is read from the store and compared with memory and disk; the first, a middle
/// and the last one, and the newest of the running guest, are failed over to, where the guest checks all that it
/// remembers.
#[test]
fn every_point_of_a_busy_guest_is_exact_and_continues_it() -> Result<()> {
    let rig = Rig::new("continuous")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let spec = small("busy").disk(DiskFormat::Raw, 16).disk(DiskFormat::Qcow2, 16);
    let spec = spec.tick_ms(20).dirty_kib(512).disk_writes(8);
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let agent = Agent::protecting(&a, &controller, &["busy"], "500ms")?;
    controller.wait_points("busy", 1, SOON)?;
    let (wanted, seed) = (wanted_points()?, uuid::Uuid::new_v4().as_u64_pair().0);
    eprintln!("{wanted} points, seed {seed}, memory by {}", agent.vm("busy")?["memory"]);

    let mut truths: Vec<Truth> = Vec::new();
    for round in 0..wanted {
        let tick = guest.last().context("it ticks")?.tick + 1 + mix(seed ^ round as u64) % 6;
        guest.wait_for_tick(tick, SOON)?;
        sleep(Duration::from_millis(mix(seed ^ !(round as u64)) % 100));
        let truth = suspended(&guest, &controller, &spec, round % 10 == 0)?;
        truths.push(truth);
        guest.resume()?;
        if round % 10 == 9 {
            eprintln!("{} points so far; now {:?}", round + 1, guest.last());
        }
    }
    // The last one to be tried is of the running guest.
    let newest = controller.wait_more_points("busy", 2, SOON)?.pop().context("a point")?;
    let row = agent.vm("busy")?;
    let last = guest.last().context("it ticks")?;
    ensure!(last.unharmed(), "the source itself: {last:?}");
    a.power_cut();
    let held = Held::by(&mut controller, rig.folder())?;
    eprintln!("memory was captured by {}; the site holds {} points", row["memory"], number(&newest, "seq")?);
    let store = controller.data_dir().join("store");
    compare(&store, spec.uuid.to_string().parse()?, &truths)?;

    let some = [truths.first(), truths.get(truths.len() / 2), truths.last()];
    for truth in some.into_iter().flatten() {
        continues(&held, &mut controller, &truth.id, Some(&truth.report), &last.boot)?;
    }
    continues(&held, &mut controller, newest["point"].as_str().context("an id")?, None, &last.boot)
}

/// What the suspended guest is: digests of the pages of its memory and of its first disk.
struct Truth {
    /// Points that were cut meanwhile; the last is of the suspended guest (it found no change), the others may be.
    seqs: Vec<Seq>,
    /// The last one's id.
    id: String,
    report: Report,
    memory: Vec<u128>,
    disk: Vec<u128>,
}

fn wanted_points() -> Result<usize> {
    match std::env::var("LIFEBOAT_CONTINUOUS_POINTS") {
        Ok(text) => {
            text.parse().with_context(|| format!("LIFEBOAT_CONTINUOUS_POINTS={text}: write a number"))
        }
        Err(_) => Ok(6),
    }
}

/// Suspends the guest, waits for a point of it as it stands, and looks at it. It stays suspended.
fn suspended(guest: &Guest, controller: &Controller, spec: &GuestSpec, dumped: bool) -> Result<Truth> {
    let mut since = suspend(guest)?;
    let points = eventually(SOON, "a point of the suspended guest", || {
        let mut points = controller.points(guest.name())?;
        points.retain(|point| number(point, "cut_at").is_ok_and(|cut| cut > since));
        let changed = |field| points.last().is_some_and(|point| point[field] != 0);
        if points.len() > 1 && !changed("memory_changed_bytes") && !changed("disk_changed_bytes") {
            return Ok(Some(points));
        }
        // An agent that had stopped the guest already resumes it: then it was not us who suspended it.
        if points.len() > 2 {
            since = suspend(guest)?;
        }
        Ok(None)
    })?;
    let report = guest.last().context("it ticked")?;
    let bytes = spec.memory_mib << 20;
    let memory = if dumped { fs::read(guest.dump_ram(bytes)?)? } else { guest.read_ram(bytes)? };
    let disk = fs::read(guest.site().host_path(spec.disk_path(0))?)?;
    let (memory, disk) = (digests(&memory), digests(&disk));
    let id = points.last().and_then(|point| point["point"].as_str()).context("a point's id")?.to_owned();
    let seqs: Result<_> = points.iter().map(|point| number(point, "seq").map(Seq)).collect();
    Ok(Truth { seqs: seqs?, id, report, memory, disk })
}

/// Returns a time since which it has been so, unless somebody resumes it.
fn suspend(guest: &Guest) -> Result<u64> {
    guest.suspend()?;
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?)
}

fn number(point: &serde_json::Value, field: &str) -> Result<u64> {
    point[field].as_u64().with_context(|| format!("a point without {field}: {point}"))
}

/// Reads each of the points from the store, and compares every page.
fn compare(store: &Path, vm: VmId, truths: &[Truth]) -> Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let objects: Arc<dyn Objects> = Arc::new(LocalObjects::open(store, ByteSize(0)).await?);
        let (mut wrong, mut exact) = (Vec::new(), 0);
        for truth in truths {
            for seq in &truth.seqs {
                let plan = Arc::new(Plan::load(objects.as_ref(), vm, *seq).await?);
                if plan.manifest.meta.was_running {
                    ensure!(Some(seq) != truth.seqs.last(), "point {} is of the running guest", seq.0);
                    continue;
                }
                let differ = differences(&Reader::new(objects.clone(), plan), truth).await?;
                exact += usize::from(differ.is_empty());
                wrong.extend(differ.into_iter().map(|what| format!("point {}: {what}", seq.0)));
            }
        }
        ensure!(wrong.is_empty(), "not what the guest was:\n{}", wrong.join("\n"));
        eprintln!("{exact} points are exact");
        ensure!(exact >= truths.len(), "{exact} points compared");
        Ok(())
    })
}

/// What of the point is not as it was.
async fn differences(reader: &Reader, truth: &Truth) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (kind, name, real) in
        [(ImageKind::Ram, "pc.ram", &truth.memory), (ImageKind::Disk, "vda", &truth.disk)]
    {
        let held = read(reader, kind, name, real.len()).await?;
        let plain = |page: &usize| kind == ImageKind::Disk || !NOT_PLAIN_RAM.contains(&(page * PAGE));
        let differ = (0..real.len()).filter(plain).filter(|page| held[*page] != real[*page]);
        let differ: Vec<String> = differ.map(|page| format!("{:#x}", page * PAGE)).collect();
        if !differ.is_empty() {
            found.push(format!("{} pages of {name}: {:?}", differ.len(), &differ[..differ.len().min(8)]));
        }
    }
    Ok(found)
}

async fn read(reader: &Reader, kind: ImageKind, name: &str, pages: usize) -> Result<Vec<u128>> {
    let planned = reader.plan().image(kind, name).with_context(|| format!("the point has no {name}"))?;
    ensure!(planned.image.bytes == (pages * PAGE) as u64, "{name}: {} bytes", planned.image.bytes);
    let mut found = vec![0; pages];
    let each = |first: u64, bytes: bytes::Bytes| {
        for (at, page) in bytes.chunks(PAGE).enumerate() {
            found[first as usize + at] = digest(page);
        }
        Ok::<(), RestoreError>(())
    };
    reader.for_each_run(kind, name, |_| (), each).await?;
    Ok(found)
}

/// One digest a page; 0 stands for a page of zeros.
fn digests(bytes: &[u8]) -> Vec<u128> {
    bytes.chunks(PAGE).map(digest).collect()
}

fn digest(page: &[u8]) -> u128 {
    if page == [0; PAGE] {
        return 0;
    }
    let hash = blake3::hash(page);
    u128::from_le_bytes(std::array::from_fn(|at| hash.as_bytes()[at]))
}

/// Goes back to `point`, where the site has been asked nothing yet, and sees the guest go on.
fn continues(
    held: &Held,
    controller: &mut Controller,
    point: &str,
    suspended: Option<&Report>,
    boot: &str,
) -> Result<()> {
    let replica = held.failover(controller, "busy", point)?;
    if suspended.is_some() {
        ensure!(replica.state()? == "paused", "{point}: as the source was");
        replica.resume()?;
    }
    let tick = suspended.map_or(0, |report| report.tick);
    let report = replica_unharmed(&replica, boot, tick, SOON).with_context(|| format!("point {point}"))?;
    eprintln!("point {point} went on: {report:?}");
    held.discard(controller, &replica)
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}
