//! A completed failover is taken to another point: the VM goes on from there, and what the replica did meanwhile is kept.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Rig, Site,
    product::{Agent, Controller, id, killed_at, replica_unharmed, small},
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: within the window a failover is taken to an older point, whole as it was, wherever the controller dies; the
/// disks of the replica that ran stay as they were; a point that is damaged is refused, and the replica runs on. Method:
/// a working guest; its counter tells which point it is. Half of the newest packs is overwritten. The controller is
/// killed when the images were made, when the replica was stopped, and when the other point was named.
#[test]
fn a_failover_is_taken_to_an_older_point_and_what_the_replica_did_is_kept_aside() -> Result<()> {
    let rig = Rig::new("undo")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 32))?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let older = controller.wait_points("web", 2, SOON)?.pop().context("two points")?;
    let then = guest.last().context("it ticks")?;
    guest.wait_for_tick(then.tick + 30, SOON)?;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();

    let none = controller.cli(&["undo", "web", "--point", &id(&older), "--yes"])?;
    ensure!(!none.status.success() && none.stderr.contains("no failover"), "{none:?}");
    controller.failover("web", "latest")?;
    let replica = b.guest("web")?;
    let newest = replica_unharmed(&replica, &then.boot, then.tick, SOON)?;
    let console = replica.console().path().to_owned();
    let disks = b.virsh(["domblklist", "web"])?;

    let unasked = controller.cli(&["undo", "web", "--point", &id(&older)])?;
    ensure!(!unasked.status.success() && unasked.stderr.contains("SET ASIDE"), "{unasked:?}");
    replica.wait_for_state("running", SOON)?;

    // A point that is folded needs nothing of its own pack.
    let (sent, folded) = controller.newest_packs()?;
    let mut wholes = Vec::new();
    for pack in [Some(sent), folded].into_iter().flatten() {
        let whole = fs::read(&pack)?;
        let half = whole.len() / 2;
        fs::write(&pack, [&whole[..half], &vec![0; whole.len() - half]].concat())?;
        wholes.push((pack, whole));
    }
    let damaged = controller.cli(&["undo", "web", "--point", "latest", "--yes"])?;
    ensure!(
        !damaged.status.success()
            && damaged.stderr.contains("nothing was changed")
            && damaged.stderr.contains("--point OTHER"),
        "{damaged:?}"
    );
    replica.wait_for_state("running", SOON)?;
    ensure!(b.virsh(["domblklist", "web"])? == disks, "it runs on what it ran on");
    for (pack, whole) in wholes {
        fs::write(pack, whole)?;
    }

    for step in ["undo.staged", "undo.stopped", "undo.named"] {
        controller.stop()?;
        controller.env = killed_at(step);
        controller.start()?;
        let broken = controller.cli(&["undo", "web", "--point", &id(&older), "--yes"])?;
        ensure!(!broken.status.success(), "{step}: {broken:?}");
        controller.kill9()?;
        let stands = if step == "undo.staged" { "running" } else { "shut off" };
        replica.wait_for_state(stands, SOON).with_context(|| step.to_owned())?;
        controller.env = Vec::new();
        controller.start()?;
    }
    fs::write(&console, "").context("forgetting what it said before")?;
    let report = controller.json(&["undo", "web", "--point", &id(&older), "--yes"])?;
    ensure!(report["point"] == older["point"] && report["resumed"] == true, "{report}");
    let audited = controller.json(&["report", "web"])?;
    let told = audited["subjects"][0]["failovers"].as_array().context("failovers")?;
    let kinds: Vec<String> =
        told.iter().map(|of| format!("{} {} {}", of["what"], of["outcome"], of["resumed"])).collect();
    ensure!(kinds == ["\"emergency\" \"ran\" true", "\"undo\" \"ran\" true"], "{audited:#}");
    ensure!(told.iter().all(|of| of["rto_ms"].as_u64() > Some(0)), "{told:#?}");
    replica.wait(SOON, "the replica to report", |_| true)?;
    let first = replica.console().reports().remove(0);
    ensure!(first.tick <= then.tick + 2 && first.tick < newest.tick, "{first:?}, {then:?}, {newest:?}");
    replica_unharmed(&replica, &then.boot, first.tick, SOON)?;

    let now = b.virsh(["domblklist", "web"])?;
    let file = |list: &str| list.split_whitespace().find(|word| word.ends_with(".raw")).map(str::to_owned);
    let (before, now) = (file(&disks).context("its disk")?, file(&now).context("its disk")?);
    ensure!(before != now && b.host_path(&before)?.exists(), "{before} is not kept beside {now}");
    only_what_nobody_needs_is_removed(&b, &controller, &now, &before)
}

/// Of folders that a replica runs from, that an undo keeps, that an overlay stands on, and that nobody knows of.
fn only_what_nobody_needs_is_removed(
    b: &Site,
    controller: &Controller,
    now: &str,
    before: &str,
) -> Result<()> {
    let folder = |file: &str| Path::new(file).parent().map(Path::to_owned).context("a disk lies in a folder");
    let (running, kept) = (folder(now)?, folder(before)?);
    let (base, left) = (running.with_file_name("77-1"), running.with_file_name("77-2"));
    for made in [&base, &left] {
        b.run(["mkdir", &made.to_string_lossy()])?;
        b.run(["truncate", "-s", "1M", &made.join("vda.raw").to_string_lossy()])?;
    }
    // qemu-img's own way to name a base.
    let overlay = b.dir("overlay")?.join("top.qcow2").to_string_lossy().into_owned();
    let below = base.join("vda.raw").to_string_lossy().into_owned();
    b.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", &below, &overlay])?;
    let xml = format!(
        "<domain type='qemu'><name>clone</name><memory>65536</memory><os><type>hvm</type></os><devices><disk type='file'>\
         <driver name='qemu' type='qcow2'/><source file='{overlay}'/><target dev='vda'/></disk></devices></domain>"
    );
    let definition = b.dir("overlay")?.join("clone.xml");
    fs::write(&definition, xml)?;
    b.virsh(["define", &definition.to_string_lossy()])?;

    let removed = controller.json(&["replicas", "--prune", "--yes"])?;
    let dirs = |list: &Value| -> Vec<PathBuf> {
        let rows = list["replicas"].as_array().into_iter().flatten();
        rows.filter_map(|row| row["dir"].as_str().map(PathBuf::from)).collect()
    };
    ensure!(dirs(&removed) == [left.clone()] && !b.host_path(&left)?.exists(), "{removed}");
    let list = controller.json(&["replicas"])?;
    let by = |dir: &Path| {
        let rows = list["replicas"].as_array().into_iter().flatten();
        rows.clone().find(|row| row["dir"] == *dir.to_string_lossy()).map(|row| row["needed"]["by"].clone())
    };
    let needed = [&running, &kept, &base].map(|dir| by(dir).unwrap_or_default());
    ensure!(needed == ["domain", "undo", "domain"], "{list}");
    Ok(())
}
