//! What is restored is what the guest was, to the byte: memory against QEMU's own dump of it, disks against the source's.

use anyhow::{Context, Result, ensure};
use lifeboat::{
    format::manifest::ImageKind,
    id::VmId,
    qemu::stream::{Event, StreamReader},
    units::{ByteSize, Seq},
};
use lifeboat_site_controller::{
    failover::{images, progress::Watcher},
    restore::{Plan, Reader},
    store::{LocalObjects, Objects},
};
use rig::{
    DiskFormat, GuestSpec, Rig,
    product::{Agent, Controller, replica_unharmed, small},
};
use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
/// Between the VGA window and the first megabyte's end there are device memory and shadowed ROMs.
const NOT_PLAIN_RAM: std::ops::Range<usize> = 0xa_0000..0x10_0000;
/// What libvirt puts before the stream: magic, version and, then, how long the rest of its header is.
const SAVE_HEADER: usize = 92;

/// Goal: a point of several deltas is the guest's memory and disks. Method: suspend the guest, let a point be cut, have
/// QEMU dump the memory; compose what a failover would, and compare each byte: read by our own reader, by the script
/// that QEMU's developers use, and straight from the disks. The same point is then failed over to.
#[test]
fn a_composed_point_is_the_guest_s_memory_and_disks_to_the_byte() -> Result<()> {
    let rig = Rig::new("memory-image")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32);
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 3, SOON)?;
    guest.suspend()?;
    // The first of them may have been cut before.
    controller.wait_more_points("web", 2, SOON)?;
    agent.stop()?;
    let dump = fs::read(guest.dump_ram(spec.memory_mib << 20)?)?;
    a.virsh(["save", "web", SAVED])?;
    let saved = a.host_path(SAVED)?;
    let before = guest.last().context("it ticked")?;
    a.power_cut();
    let point = controller.points("web")?.pop().context("a point")?;
    let seq = Seq(point["seq"].as_u64().context("its number")?);
    controller.stop()?;

    let vm: VmId = spec.uuid.to_string().parse()?;
    let composed = compose(&controller.data_dir().join("store"), vm, seq, rig.folder(), false)?;
    same_memory("our own reader", &read_memory(&composed)?, &dump)?;
    match &rig.assets().analyze_migration {
        Some(script) => {
            let stream = described_as(&saved, &composed, rig.folder())?;
            let extracted = extract(script, &stream, &rig.folder().join("extracted"))?;
            same_memory("QEMU's script", &extracted, &dump)?;
        }
        None => eprintln!("skipped: QEMU's analyze-migration.py could not be had"),
    }
    same_disks(&spec, &a.host_path(spec.disk_path(0))?, &a.host_path(spec.disk_path(1))?, rig.folder())?;

    controller.start()?;
    controller.failover("web", "latest")?;
    let replica = b.guest("web")?;
    assert_eq!(replica.state()?, "paused", "as the source was");
    replica.resume()?;
    replica_unharmed(&replica, &before.boot, before.tick, SOON)?;
    Ok(())
}

/// Points of one guest that are compared one after the other.
const IN_A_ROW: usize = 4;

/// Goal: a background snapshot, taken of a busy guest that runs on meanwhile, is the memory of the instant of the disks.
/// Method: in each of several pauses in a row the agent is frozen just before QEMU is told to begin, QEMU dumps the
/// memory, and the agent goes on; each byte of each of these points is compared. The last one is failed over to.
#[test]
fn snapshots_of_a_busy_guest_are_its_memory_to_the_byte_and_run_on() -> Result<()> {
    let rig = Rig::new("snapshot-image")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32).as_root();
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let settings = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"60s\"\nmemory = \"on\"\n\
                    memory_engine = \"snapshot\"";
    let mut agent = Agent::install(&a, &controller, settings)?;
    let stops: Vec<_> = (2..IN_A_ROW + 2).map(|pass| format!("cut.disks-marked:{pass}")).collect();
    agent.env = vec![("LIFEBOAT_STOP_AT".into(), stops.join(","))];
    agent.start()?;
    let mut compared = Vec::new();
    let mut before = None;
    for nth in 0..IN_A_ROW {
        agent.wait_frozen(SOON)?;
        let dump = rig.folder().join(format!("dump-{nth}"));
        fs::rename(guest.dump_ram(spec.memory_mib << 20)?, &dump)?;
        before = guest.last();
        agent.process()?.thaw()?;
        let points = controller.wait_points("web", nth + 2, SOON)?;
        let seq = points.last().and_then(|point| point["seq"].as_u64()).context("its number")?;
        compared.push((Seq(seq), dump));
    }
    agent.kill9()?;
    a.power_cut();
    controller.stop()?;
    let vm: VmId = spec.uuid.to_string().parse()?;
    for (seq, dump) in compared {
        let composed = compose(&controller.data_dir().join("store"), vm, seq, rig.folder(), true)?;
        same_memory(&format!("point {seq}"), &read_memory(&composed)?, &fs::read(dump)?)?;
    }
    controller.start()?;
    controller.failover("web", "latest")?;
    let before = before.context("it ticked")?;
    replica_unharmed(&b.guest("web")?, &before.boot, before.tick, SOON)?;
    Ok(())
}

/// Memory and disks of a point in `folder`, as a failover composes them; returns the memory's file.
fn compose(store: &Path, vm: VmId, seq: Seq, folder: &Path, running: bool) -> Result<PathBuf> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let objects: Arc<dyn Objects> = Arc::new(LocalObjects::open(store, ByteSize(0)).await?);
        let plan = Arc::new(Plan::load(objects.as_ref(), vm, seq).await?);
        ensure!(plan.manifest.meta.was_running == running, "was the guest running?");
        let reader = Reader::new(objects, plan);
        let (to, _from) = tokio::sync::mpsc::channel(1);
        let (watcher, path) = (Watcher::new(to), folder.join("composed.save"));
        images::write_save_image(&reader, "<domain/>".into(), false, &path, &watcher).await?;
        for disk in ["vda", "vdb"] {
            reader.write_file(ImageKind::Disk, disk, &folder.join(disk), |_| ()).await?;
        }
        Ok(path)
    })
}

/// The bytes of a save image from the migration stream on.
fn stream_of(saved: &Path) -> Result<Vec<u8>> {
    let mut bytes = fs::read(saved)?;
    let len = bytes.get(20..24).context("a header")?;
    let header = SAVE_HEADER + u32::from_le_bytes(len.try_into()?) as usize;
    ensure!(bytes.len() > header, "{} ends in its header", saved.display());
    Ok(bytes.split_off(header))
}

/// Main memory, as our own reader finds it in a save image.
fn read_memory(saved: &Path) -> Result<Vec<u8>> {
    let stream = stream_of(saved)?;
    let mut reader = StreamReader::begin(stream.as_slice())?;
    let mut memory = Vec::new();
    loop {
        let (block, page, bytes) = match reader.next_event()? {
            Event::Page { block, page, bytes } => (block, page, *bytes),
            Event::Filled { block, page, byte } => (block, page, [byte; 4096]),
            Event::SectionEnd => continue,
            Event::Devices => return Ok(memory),
        };
        let main = &reader.blocks()[block];
        if main.name == "pc.ram" {
            memory.resize(usize::try_from(main.bytes)?, 0);
            let at = usize::try_from(page)? * bytes.len();
            memory[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }
}

/// The composed stream, ending with QEMU's own description of the same guest's devices, which the script needs.
fn described_as(saved: &Path, composed: &Path, folder: &Path) -> Result<PathBuf> {
    let (theirs, mut ours) = (stream_of(saved)?, stream_of(composed)?);
    let is_description = |at: &usize| {
        let rest = theirs.len() - at;
        let len = theirs.get(at + 1..at + 5).and_then(|len| len.try_into().ok()).map(u32::from_be_bytes);
        theirs[*at] == DESCRIPTION && len.is_some_and(|len| len as usize + 5 == rest)
    };
    let begins = (0..theirs.len().saturating_sub(5)).rev().find(is_description).context("a description")?;
    ensure!(ours.ends_with(b"\x06\0\0\0\x02{}"), "our stream ends with an empty description");
    ours.truncate(ours.len() - 7);
    ours.extend_from_slice(&theirs[begins..]);
    let path = folder.join("described");
    fs::write(&path, ours)?;
    Ok(path)
}

/// Main memory as QEMU's script takes it out of a stream; it reads every device on the way.
fn extract(script: &Path, stream: &Path, folder: &Path) -> Result<Vec<u8>> {
    fs::create_dir_all(folder)?;
    let out =
        Command::new("python3").arg(script).args(["-x", "-f"]).arg(stream).current_dir(folder).output()?;
    ensure!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    let state: serde_json::Value = serde_json::from_reader(File::open(folder.join("state.json"))?)?;
    ensure!(state.as_object().is_some_and(|sections| sections.len() > 20), "few devices: {state}");
    let mut memory = Vec::new();
    File::open(folder.join("pc.ram"))?.read_to_end(&mut memory)?;
    Ok(memory)
}

fn same_memory(who: &str, found: &[u8], dump: &[u8]) -> Result<()> {
    ensure!(found.len() == dump.len(), "{who}: {} bytes, the guest has {}", found.len(), dump.len());
    let pages = found.chunks(4096).zip(dump.chunks(4096)).enumerate();
    let differ =
        pages.filter(|(page, (found, dump))| !NOT_PLAIN_RAM.contains(&(page * 4096)) && found != dump);
    let differ: Vec<_> = differ.map(|(page, _)| format!("{:#x}", page * 4096)).collect();
    ensure!(differ.is_empty(), "{who}: {} pages differ: {:?}", differ.len(), &differ[..differ.len().min(20)]);
    Ok(())
}

fn same_disks(spec: &GuestSpec, first: &Path, second: &Path, folder: &Path) -> Result<()> {
    for ((disk, source), restored) in spec.disks.iter().zip([first, second]).zip(["vda", "vdb"]) {
        let out = Command::new("qemu-img")
            .args(["compare", "-f", &disk.format.to_string(), "-F", "raw"])
            .args([source, &folder.join(restored)])
            .output()?;
        ensure!(out.status.success(), "{restored}: {}", String::from_utf8_lossy(&out.stdout));
    }
    Ok(())
}

const SAVED: &str = "/var/lib/libvirt/qemu/web.image";
/// A description of the devices follows, with its length before it.
const DESCRIPTION: u8 = 6;
