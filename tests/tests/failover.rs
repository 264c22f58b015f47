//! The main job, end to end: a running VM is protected, its site is lost, and it goes on at the other site.

use anyhow::{Context, Result};
use rig::{
    DiskFormat, GuestSpec, Rig, eventually,
    product::{Agent, Controller, id, replica_unharmed, small},
};
use std::{fs, process::Command, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: the VM goes on where it stood. Method: protect a working guest with a raw and a qcow2 disk, power-cut its site,
/// fail over to the newest point; the guest itself says whether memory and disks are of one instant.
#[test]
fn a_lost_site_s_vm_goes_on_at_the_other_site() -> Result<()> {
    let rig = Rig::new("failover")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = GuestSpec::new("web").disk(DiskFormat::Raw, 64).disk(DiskFormat::Qcow2, 64);
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "1s")?;
    controller.wait_points("web", 4, SOON)?;
    let before = guest.last().expect("it ticks");
    a.power_cut();
    let report = controller.failover("web", "latest")?;
    assert_eq!(report["resumed"], true, "{report}");
    let replica = b.guest("web")?;
    let after = replica_unharmed(&replica, &before.boot, 0, SOON)?;
    assert!(after.writes > 0);
    Ok(())
}

/// Goal: any stored point will do, whole as it was; and a failover is asked for once, however often it is typed.
/// Method: the guest's counters tell which point it is. Without a confirmation nothing happens; done twice it is done
/// once; another point is refused afterwards.
#[test]
fn an_older_point_is_chosen_by_its_id_and_nothing_is_done_unasked_or_twice() -> Result<()> {
    let rig = Rig::new("older-point")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32).machine("q35"))?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let chosen = controller.wait_points("web", 2, SOON)?.pop().context("two points")?;
    let then = guest.last().context("it ticks")?;
    guest.wait_for_tick(then.tick + 40, SOON)?;
    controller.wait_more_points("web", 2, SOON)?;

    let unasked = controller.cli(&["failover", "web", "--emergency"])?;
    assert!(!unasked.status.success() && unasked.stderr.contains("--yes"), "{unasked:?}");
    assert!(controller.vm("web")?["failover"].is_null(), "nothing was begun");
    assert!(b.virsh(["list", "--all", "--name"])?.trim().is_empty(), "nothing was defined");
    controller.wait_more_points("web", 1, SOON)?; // and the source was not fenced

    a.power_cut();
    let report = controller.failover("web", &id(&chosen)[..10])?;
    assert_eq!((&report["point"], &report["already_done"]), (&chosen["point"], &false.into()), "{report}");
    let replica = b.guest("web")?;
    replica.wait(SOON, "the replica to report", |_| true)?;
    let first = replica.console().reports().remove(0);
    // The console may lag a tick behind memory.
    assert!(first.boot == then.boot && first.tick <= then.tick + 2, "{first:?} {then:?}");
    replica_unharmed(&replica, &then.boot, first.tick, SOON)?;

    for point in ["latest", &id(&chosen)] {
        let again = controller.failover("web", point)?;
        assert_eq!((&again["already_done"], &again["point"]), (&true.into(), &chosen["point"]), "{again}");
    }
    let newest = controller.points("web")?.pop().context("points")?;
    let other = controller.cli(&["failover", "web", "--emergency", "--yes", "--point", &id(&newest)])?;
    assert!(!other.status.success() && other.stderr.contains(&id(&chosen)), "{other:?}");
    assert_eq!(replica.state()?, "running");
    Ok(())
}

/// Goal: VMs do not get in each other's way, at either site. Method: two guests, one without a disk, under one agent;
/// both failed over at once.
#[test]
fn two_vms_are_protected_by_one_agent_and_failed_over_at_once() -> Result<()> {
    let rig = Rig::new("two-vms")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let specs = [small("one"), small("two").disk(DiskFormat::Raw, 32).machine("q35")];
    let guests = specs.iter().map(|spec| a.define_and_start(spec)).collect::<Result<Vec<_>>>()?;
    guests.iter().try_for_each(|guest| guest.wait_for_tick(2, BOOT).map(drop))?;
    let _agent = Agent::protecting(&a, &controller, &["one", "two"], "1s")?;
    for guest in &guests {
        controller.wait_points(guest.name(), 3, SOON)?;
    }
    let before = guests.iter().map(|guest| guest.last().context("it ticks")).collect::<Result<Vec<_>>>()?;
    a.power_cut();
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| controller.failover("one", "latest"));
        (one.join(), controller.failover("two", "latest"))
    });
    one.map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    two?;
    for (guest, before) in guests.iter().zip(before) {
        let after = replica_unharmed(&b.guest(guest.name())?, &before.boot, 0, SOON)?;
        assert_eq!(after.disks, before.disks);
    }
    Ok(())
}

/// Goal: `memory = "off"` is said wherever the VM is shown, and its disks are those of the point to the byte.
/// Method: a guest that itself writes nothing; QEMU is told to write to its disks, before the first point and after.
#[test]
fn a_vm_without_its_memory_boots_from_the_disks_of_the_point() -> Result<()> {
    let rig = Rig::new("memory-off")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("cold").disk(DiskFormat::Raw, 16).disk(DiskFormat::Qcow2, 16).idle();
    let guest = a.define_and_start(&spec)?;
    let before = guest.wait_for_tick(2, BOOT)?;
    let write = |byte: u8, at: &str| {
        // By device: what its nodes are called differs between releases of libvirt.
        for (device, file) in [("virtio-disk0", spec.disk_path(0)), ("virtio-disk1", spec.disk_path(1))] {
            let backend = format!("/machine/peripheral/{device}/virtio-backend");
            let io = format!("qemu-io -d {backend} \"write -P {byte} {at}\"");
            let said = a.virsh(["qemu-monitor-command", "--hmp", "cold", &io])?;
            anyhow::ensure!(!said.contains("rror"), "writing to {file}: {said}");
        }
        anyhow::Ok(())
    };
    write(1, "1M 300k")?;
    let mut agent =
        Agent::install(&a, &controller, "[[vm]]\nname = \"cold\"\ninterval = \"500ms\"\nmemory = \"off\"")?;
    agent.start()?;
    controller.wait_points("cold", 2, SOON)?;
    write(2, "1200k 64k")?;
    write(3, "9M 12k")?;
    let points = controller.wait_more_points("cold", 2, SOON)?;
    assert!(points.iter().all(|point| point["has_memory"] == false), "{points:?}");
    let told = [
        agent.vm("cold")?["memory"].to_string(),
        controller.vm("cold")?["agent"]["report"]["memory"].to_string(),
    ];
    assert!(told.iter().all(|memory| memory.contains("off")), "{told:?}");
    a.power_cut();
    for (done, resumed) in [(false, false), (true, false)] {
        let report = controller.failover("cold", "latest")?;
        assert_eq!(
            (&report["already_done"], &report["resumed"]),
            (&done.into(), &resumed.into()),
            "{report}"
        );
    }
    let replica = b.guest("cold")?;
    let after = replica.wait(BOOT, "the replica to boot", |report| report.tick >= 2)?;
    assert!(after.boot != before.boot && after.disks == 2 && after.unharmed(), "{after:?}");
    let folder = controller.replica_dir().join(spec.uuid.to_string());
    let attempt = fs::read_dir(&folder)?.next().context("one attempt")??.path();
    for (at, disk) in ["vda.raw", "vdb.raw"].into_iter().enumerate() {
        let source = a.host_path(spec.disk_path(at))?;
        let out = Command::new("qemu-img")
            .args(["compare", "-U", "-f", &spec.disks[at].format.to_string(), "-F", "raw"])
            .args([source, attempt.join(disk)])
            .output()?;
        assert!(out.status.success(), "{disk}: {}", String::from_utf8_lossy(&out.stdout));
    }
    Ok(())
}

/// Goal: a source that was given up too early writes no more points. Method: fail over while it is alive, then restart
/// its agent: both the one that was told and the one that comes back are turned away. What becomes of its guest is the
/// business of tests/fencing.rs; here it is to run on.
#[test]
fn a_source_that_is_still_alive_is_fenced() -> Result<()> {
    let rig = Rig::new("fenced")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let settings = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"5s\"\non_fenced = \"keep\"";
    let mut agent = Agent::install(&a, &controller, settings)?;
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    agent.wait_state("web", "fenced", SOON)?;
    let points = controller.points("web")?;
    agent.stop()?;
    agent.start()?;
    let row = agent.wait_state("web", "fenced", SOON)?;
    assert!(row["reason"].is_string(), "{row}");
    assert_eq!(controller.points("web")?, points);
    let what = eventually(SOON, "what holds of the copy", || {
        Ok(agent.vm("web")?["fence"]["what"].as_str().map(str::to_owned))
    })?;
    assert!(what.contains("RUNS ON"), "{what}");
    guest.wait_for_state("running", SOON).context("its end is its operator's decision")
}

/// Goal: what can't be protected now is shown with its reason, and is protected as soon as it can.
#[test]
fn a_vm_that_is_unknown_or_off_is_shown_as_such_and_protected_once_it_runs() -> Result<()> {
    let rig = Rig::new("not-running")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define(&small("later"))?;
    let agent = Agent::protecting(&a, &controller, &["ghost", "later"], "1s")?;
    let said = |vm: &str, words: &str| {
        eventually(SOON, &format!("{vm} to be shown as not running"), || {
            let row = agent.vm(vm).ok().filter(|row| row["state"] == "not-running");
            Ok(row.filter(|row| row["reason"].as_str().is_some_and(|reason| reason.contains(words))))
        })
    };
    said("ghost", "libvirt knows no VM `ghost`")?;
    let row = said("later", "`later` is shut off")?;
    assert_eq!(row["points_lost"], 0, "nothing was begun: {row}");
    guest.start()?;
    controller.wait_points("later", 2, SOON)?;
    agent.wait_state("later", "protected", SOON)?;
    guest.destroy()?;
    said("later", "`later` is")?;
    guest.start()?;
    controller.wait_more_points("later", 2, SOON)?;
    assert_eq!(agent.vm("ghost")?["state"], "not-running");
    Ok(())
}
