//! The rig keeps its own promises; and the witness, above all, must not be one that always says yes.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{DiskFormat, Guest, GuestSpec, Rig, Shape, Site, eventually};
use serde_json::json;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(60);

/// Goal: a site is a machine: a guest boots in it and works, and a power cut leaves nothing alive.
#[test]
fn a_power_cut_kills_everything_in_the_site_at_once() -> Result<()> {
    let rig = Rig::new("power-cut")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&GuestSpec::new("vm1").disk(DiskFormat::Raw, 32))?;
    let report = guest.wait_for_tick(5, BOOT)?;
    assert!(report.unharmed(), "{report:?}");
    let mut sleeper = site.spawn(["sleep", "1000"])?;
    let qemu = guest.qemu_pid()?;
    site.power_cut();
    assert!(!Path::new(&format!("/proc/{qemu}")).exists(), "QEMU outlived the power cut");
    sleeper.wait(SOON)?;
    assert!(site.run(["true"]).is_err(), "a site without power runs nothing");
    Ok(())
}

/// Goal: after a power cut the site comes back with its disks, its definitions and its link, but not its
/// guests.
#[test]
fn a_site_gets_its_power_back() -> Result<()> {
    let rig = Rig::new("power-on")?;
    let (a, b, link) = rig.pair()?;
    let guest = a.define_and_start(&GuestSpec::new("vm1").disk(DiskFormat::Qcow2, 32))?;
    let before = guest.wait_for_tick(2, BOOT)?;
    a.power_cut();
    a.power_on()?;
    link.plug()?;
    assert!(reaches(&a, &b)?, "the link works again");
    assert_eq!(guest.state()?, "shut off");
    guest.start()?;
    let after = guest.wait(BOOT, "the guest to boot anew", |report| report.boot != before.boot)?;
    assert!(after.unharmed(), "{after:?}");
    Ok(())
}

/// Goal: the lines that a guest writes tell whether its file system was frozen: what nobody synced is not on the disk, what
/// was written before a freeze is, and nobody writes while it lasts. Method: power cuts, and the agent itself.
#[test]
fn a_line_that_nobody_synced_is_on_the_disk_only_if_the_file_system_was_frozen() -> Result<()> {
    let rig = Rig::new("frozen")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&GuestSpec::new("vm1").disk(DiskFormat::Raw, 16).files(16))?;
    let first = guest.wait(BOOT, "lines to be written", |report| report.lines >= 5)?;
    guest.destroy()?;
    guest.start()?;
    let second = guest.wait(BOOT, "it to boot anew", |report| report.boot != first.boot)?;
    assert_eq!((second.found, second.disks), (0, 1), "{second:?}");
    guest.wait_for_agent(BOOT)?;
    guest.wait(SOON, "lines to be written", |report| report.boot == second.boot && report.lines >= 5)?;
    guest.ask_agent(&json!({ "execute": "guest-fsfreeze-freeze" }))?;
    let frozen = guest.last().context("it reports")?;
    let stands = |tick| guest.wait(SOON, "it to tick on", |report| report.tick > tick);
    let stood = stands(frozen.tick + 2)?;
    thread::scope(|scope| -> Result<()> {
        let asked = scope.spawn(|| guest.run_inside("true"));
        assert_eq!(stands(stood.tick + 5)?.lines, stood.lines, "it writes to a frozen file system");
        assert!(!asked.is_finished(), "whoever asks a frozen guest for more waits until it is thawed");
        assert_eq!(guest.ask_agent(&json!({ "execute": "guest-fsfreeze-thaw" }))?, 1);
        asked.join().expect("no panic").context("asked while it was frozen")
    })?;
    guest.wait(SOON, "it to write on", |report| report.lines > stood.lines + 3)?;
    guest.destroy()?;
    guest.start()?;
    let third = guest.wait(BOOT, "it to boot once more", |report| report.boot != second.boot)?;
    assert!((frozen.lines..=stood.lines).contains(&third.found), "{third:?} after {stood:?}");
    Ok(())
}

/// Goal: any number of disks of either format, on either machine type, all of them really written and
/// checked.
#[test]
fn guests_with_no_one_and_two_disks_work() -> Result<()> {
    let rig = Rig::new("disks")?;
    let site = rig.site("A")?;
    let specs = [
        GuestSpec::new("none").machine("q35"),
        GuestSpec::new("one").disk(DiskFormat::Qcow2, 16),
        GuestSpec::new("two").disk(DiskFormat::Raw, 16).disk(DiskFormat::Qcow2, 64).machine("q35"),
    ];
    let guests = specs.iter().map(|spec| site.define_and_start(spec)).collect::<Result<Vec<_>>>()?;
    for (disks, guest) in (0_u64..).zip(&guests) {
        guest.wait_for_tick(2, BOOT)?;
        let report = guest.wait_full_check(SOON)?;
        assert!(report.unharmed() && report.disks == disks, "{report:?}");
        assert_eq!(report.writes > 0, disks > 0, "{report:?}");
    }
    Ok(())
}

/// Goal: idle means that nothing changes but the counters.
#[test]
fn an_idle_guest_changes_nothing_and_goes_on_checking() -> Result<()> {
    let rig = Rig::new("idle")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&GuestSpec::new("vm1").disk(DiskFormat::Raw, 16).idle())?;
    guest.wait_for_tick(1, BOOT)?;
    let report = guest.wait_full_check(SOON)?;
    assert!(report.unharmed() && report.writes == 0 && report.dirtied == 0, "{report:?}");
    Ok(())
}

/// Goal: a cut link loses every packet in silence, and a restored one is as before.
#[test]
fn a_link_is_cut_and_restored() -> Result<()> {
    let rig = Rig::new("link")?;
    let (a, b, link) = rig.pair()?;
    assert!(reaches(&a, &b)? && reaches(&b, &a)?);
    link.cut()?;
    assert!(!reaches(&a, &b)? && !reaches(&b, &a)?);
    link.restore()?;
    assert!(reaches(&a, &b)? && reaches(&b, &a)?);
    Ok(())
}

/// Goal: a line of 8 Mbit/s carries 1 MB in about a second, and the counters see it.
#[test]
fn a_link_is_as_slow_as_it_should_be() -> Result<()> {
    let rig = Rig::new("shape")?;
    let (a, b) = (rig.site("A")?, rig.site("B")?);
    let link = rig.link(&a, &b, Shape::mbit(8))?;
    let listener = b.in_network(|| std::net::TcpListener::bind((b.address(), 7000)))??;
    let mut sender = a.in_network(|| std::net::TcpStream::connect((b.address(), 7000)))??;
    let (mut receiver, _) = listener.accept()?;
    let (before, began) = (link.bytes()?, Instant::now());
    let reader = thread::spawn(move || std::io::copy(&mut receiver, &mut std::io::sink()));
    std::io::Write::write_all(&mut sender, &vec![7; 1_000_000])?;
    drop(sender);
    let received = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let (took, after) = (began.elapsed(), link.bytes()?);
    assert_eq!(received, 1_000_000);
    assert!((0.7..4.0).contains(&took.as_secs_f64()), "took {took:?}");
    assert!(after.a_to_b - before.a_to_b >= 1_000_000, "{before:?} {after:?}");
    assert!(after.b_to_a - before.b_to_a < 200_000, "{before:?} {after:?}");
    Ok(())
}

/// Goal: rigs share nothing. Method: the same site and guest names twice; one loses power, the other never
/// notices.
#[test]
fn two_rigs_do_not_collide() -> Result<()> {
    let (first, second) = (Rig::new("collide-1")?, Rig::new("collide-2")?);
    let spec = GuestSpec::new("vm1").disk(DiskFormat::Raw, 16);
    let start = |rig: &Rig| -> Result<(Site, Guest)> {
        let site = rig.site("A")?;
        let guest = site.define_and_start(&spec)?;
        Ok((site, guest))
    };
    let (one, other) = thread::scope(|scope| {
        let one = scope.spawn(|| start(&first));
        (one.join(), start(&second))
    });
    let ((site, one), (_, other)) = (one.map_err(|_| anyhow::anyhow!("a thread panicked"))??, other?);
    let (seen, other_seen) = (one.wait_for_tick(3, BOOT)?, other.wait_for_tick(3, BOOT)?);
    assert_ne!(seen.boot, other_seen.boot);
    site.power_cut();
    let later = other.wait_for_tick(other_seen.tick + 10, SOON)?;
    assert!(later.unharmed() && later.boot == other_seen.boot, "{later:?}");
    Ok(())
}

/// Goal: the witness says yes when it should. Method: libvirt saves and restores the guest, as it may.
#[test]
fn a_guest_saved_and_restored_goes_on_unharmed() -> Result<()> {
    let rig = Rig::new("save")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&two_disks())?;
    guest.wait_for_tick(30, BOOT)?;
    guest.managed_save()?;
    let before = guest.last().context("reports from before")?;
    site.restart_libvirtd()?;
    guest.start()?;
    guest.wait_for_tick(before.tick + 1, SOON)?;
    let after = guest.wait_full_check(SOON)?;
    assert_eq!(after.boot, before.boot, "resumed, not booted");
    assert!(after.unharmed(), "{after:?} {:?}", guest.console().complaints());
    Ok(())
}

/// Goal: the witness sees a disk older than memory. Method: a copy of the disk from before is put under a
/// saved guest.
#[test]
fn memory_restored_on_an_older_disk_is_found_out() -> Result<()> {
    let rig = Rig::new("older-disk")?;
    let site = rig.site("A")?;
    let spec = two_disks();
    let guest = site.define_and_start(&spec)?;
    let then = guest.wait_for_tick(20, BOOT)?;
    let disk = site.host_path(spec.disk_path(1))?;
    let older = disk.with_extension("older");
    guest.suspend()?;
    fs::copy(&disk, &older)?;
    guest.resume()?;
    guest.wait(SOON, "the disks to change", |report| report.writes > then.writes + 20)?;
    guest.managed_save()?;
    fs::copy(&older, &disk)?;
    guest.start()?;
    let report = guest.wait(SOON, "the witness to complain", |report| report.disk_errors > 0)?;
    assert_eq!(report.mem_errors, 0, "memory was told the truth: {report:?}");
    assert!(guest.console().complaints().iter().all(|line| line.starts_with("error=disk disk=1 ")));
    Ok(())
}

/// Goal: the witness sees a disk newer than memory. Method: one saved image is restored twice, with work in
/// between.
#[test]
fn memory_restored_on_a_newer_disk_is_found_out() -> Result<()> {
    let rig = Rig::new("newer-disk")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&two_disks())?;
    let then = guest.wait_for_tick(20, BOOT)?;
    let image = "/var/lib/libvirt/qemu/vm1.image";
    site.virsh(["save", "vm1", image])?;
    site.virsh(["restore", image])?;
    let later = guest.wait(SOON, "the disks to change", |report| report.writes > then.writes + 80)?;
    assert!(later.unharmed(), "the first restore is honest: {later:?}");
    guest.destroy()?;
    site.virsh(["restore", image])?;
    let report = guest.wait(SOON, "the witness to complain", |report| report.disk_errors > 0)?;
    assert_eq!((report.mem_errors, &report.boot), (0, &later.boot), "{report:?}");
    Ok(())
}

/// Goal: the witness sees damaged memory. Method: one bit of one patterned page is flipped in a saved image.
#[test]
fn one_flipped_bit_in_memory_is_found_out() -> Result<()> {
    let rig = Rig::new("flipped-bit")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&GuestSpec::new("vm1").idle())?;
    guest.wait_for_tick(3, BOOT)?;
    let image = "/var/lib/libvirt/qemu/vm1.image";
    site.virsh(["save", "vm1", image])?;
    let file = site.host_path(image)?;
    let mut bytes = fs::read(&file)?;
    let at = find_patterned_page(&bytes).context("a patterned page in the image")?;
    bytes[at + 1000] ^= 0x10;
    fs::write(&file, bytes)?;
    site.virsh(["restore", image])?;
    guest.wait(SOON, "the witness to complain", |report| report.mem_errors > 0)?;
    Ok(())
}

/// Goal: what QEMU dumps is the guest's memory. Method: the witness's pattern is found in it, often enough.
#[test]
fn memory_is_dumped_whole() -> Result<()> {
    let rig = Rig::new("dump")?;
    let site = rig.site("A")?;
    let guest = site.define_and_start(&GuestSpec::new("vm1"))?;
    guest.wait_for_tick(3, BOOT)?;
    guest.suspend()?;
    let dump = fs::read(guest.dump_ram(160 << 20)?)?;
    assert_eq!(dump.len(), 160 << 20);
    let patterned = dump.chunks(4096).filter(|page| find_patterned_page(page) == Some(0)).count();
    assert!(patterned >= 24 * 256, "24 MiB are patterned, found {patterned} pages");
    Ok(())
}

/// Goal: a store can be full, and have room again.
#[test]
fn a_limited_store_is_filled_and_emptied() -> Result<()> {
    let rig = Rig::new("full")?;
    let site = rig.site("A")?;
    let store = site.dir("store")?;
    let write = |kib: &str| {
        site.run([
            "dd",
            "if=/dev/zero",
            &format!("of={}/x", store.display()),
            "bs=1K",
            &format!("count={kib}"),
        ])
    };
    site.limit_store(&store, 1 << 20)?;
    write("500")?;
    site.fill(&store)?;
    assert!(write("900").is_err(), "a full store takes no more");
    site.unfill(&store)?;
    write("900")?;
    assert!(write("2000").is_err());
    site.resize_store(&store, 4 << 20)?;
    write("2000")?;
    Ok(())
}

/// Goal: programs in a site are started, read, frozen, stopped and killed at will.
#[test]
fn a_program_in_a_site_is_under_control() -> Result<()> {
    let rig = Rig::new("proc")?;
    let site = rig.site("A")?;
    let folder = site.dir("work")?;
    let script = "pwd; echo value=$VALUE host=$(hostname); echo ready; exec sleep 1000";
    let shell =
        || site.command("sh").args(["-c", script]).env("VALUE", "7").dir(&folder).named("worker").spawn();
    let mut worker = shell()?;
    worker.wait_for_log("ready", SOON)?;
    assert_eq!(worker.log().lines().next(), folder.to_str());
    assert!(worker.log().contains("value=7 host=site-a"), "{}", worker.log());
    let pid = worker.pid_in_host()?;
    worker.freeze()?;
    let state =
        |pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.rsplit_once(") ")?.1.chars().next();
    eventually(SOON, "it to be stopped", || Ok((state(pid) == Some('T')).then_some(())))?;
    worker.kill9()?;
    assert!(
        worker.killed_by(nix::sys::signal::Signal::SIGKILL) && !Path::new(&format!("/proc/{pid}")).exists()
    );
    let mut worker = shell()?;
    worker.wait_for_log("ready", SOON)?;
    assert!(worker.memory_kib()?.0 > 0);
    worker.term()?;
    worker.wait(SOON)?;
    assert!(worker.killed_by(nix::sys::signal::Signal::SIGTERM));
    Ok(())
}

/// Goal: a test that panics leaves nothing running and no folder, but its logs.
#[test]
fn a_panic_takes_the_rig_down() -> Result<()> {
    let rig = Rig::new("panic")?;
    let (folder, logs) = (rig.folder().to_owned(), rig.logs()?);
    let site = rig.site("A")?;
    let qemu = site.define_and_start(&GuestSpec::new("vm1"))?.qemu_pid()?;
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _rig = rig;
        panic!("on purpose");
    }));
    assert!(panicked.is_err() && !site.is_up());
    assert!(!folder.exists() && !Path::new(&format!("/proc/{qemu}")).exists());
    assert!(logs.join("A/libvirt/libvirtd.log").exists());
    Ok(())
}

/// Goal: a rig that is killed takes its guests along, and the next one removes its folder.
/// Method: this test, run again as a victim by itself, is killed while its guest runs.
#[test]
fn a_killed_rig_leaves_nothing_behind() -> Result<()> {
    if let Some(note) = std::env::var_os("RIG_VICTIM") {
        let rig = Rig::new("victim")?;
        let guest = rig.site("A")?.define_and_start(&GuestSpec::new("vm1"))?;
        let text = format!("{} {}", guest.qemu_pid()?, rig.folder().display());
        let draft = Path::new(&note).with_extension("draft");
        fs::write(&draft, text)?;
        fs::rename(draft, note)?;
        loop {
            thread::park();
        }
    }
    let folder = tempfile::tempdir()?;
    let note = folder.path().join("note");
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["--exact", "a_killed_rig_leaves_nothing_behind", "--nocapture"])
        .env("RIG_VICTIM", &note)
        .stdout(Stdio::null())
        .spawn()?;
    let told = eventually(BOOT, "the victim's guest to run", || {
        ensure!(victim.try_wait()?.is_none(), "the victim ended by itself");
        Ok(fs::read_to_string(&note).ok())
    });
    victim.kill()?;
    victim.wait()?;
    let told = told?;
    let (qemu, left) = told.split_once(' ').context("a pid and a folder")?;
    eventually(SOON, "the victim's QEMU to be gone", || {
        Ok((!Path::new("/proc").join(qemu).exists()).then_some(()))
    })?;
    let _next = Rig::new("sweeper")?;
    assert!(!Path::new(left).exists(), "the next rig cleans up");
    Ok(())
}

fn two_disks() -> GuestSpec {
    GuestSpec::new("vm1").disk(DiskFormat::Raw, 16).disk(DiskFormat::Qcow2, 32)
}

/// Does a datagram get from one site to the other within a moment?
fn reaches(from: &Site, to: &Site) -> Result<bool> {
    let receiver = to.in_network(|| UdpSocket::bind((to.address(), 0)))??;
    let sender = from.in_network(|| UdpSocket::bind((from.address(), 0)))??;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    sender.send_to(b"there?", receiver.local_addr()?)?;
    Ok(receiver.recv(&mut [0; 16]).is_ok())
}

/// The first place where a page's worth of 64-bit numbers counts up by one, as only the witness's pages do.
fn find_patterned_page(bytes: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let counts = |at: usize, to: u64| {
        (1..to).all(|n| word(at).zip(word(at + 8 * n as usize)).is_some_and(|(a, b)| b == a.wrapping_add(n)))
    };
    (0..bytes.len()).find(|at| counts(*at, 4) && counts(*at, 512))
}
