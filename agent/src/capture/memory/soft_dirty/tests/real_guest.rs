//! Goal: points are the memory of a real guest under load, to the byte, huge pages or not, lost points in between.
//! Method: the test guest in a QEMU of our own (KVM where that works), cut a hundred times; each time, while it is
//! stopped, its memory is read where QEMU says that it is, and every tenth time QEMU itself dumps it (which is slow).
//! Needs a kernel with soft-dirty flags and says so where there is none.

use super::*;
use crate::capture::disk::tests::rig::Qmp;
use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const MIB: u64 = 96;
/// Between the VGA window and the first megabyte's end there are device memory and shadowed ROMs.
const NOT_PLAIN_RAM: std::ops::Range<usize> = 0xa_0000..0x10_0000;

/// A QEMU with the test guest, a disk that it reads past the host's page cache, and a console.
struct Machine {
    dir: tempfile::TempDir,
    dumps: tempfile::TempDir,
    qemu: Child,
    monitor: Arc<Qmp>,
}

/// Where tests/setup.sh puts the test guest.
fn assets() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let found = program.ancestors().map(|folder| folder.join("rig")).find(|rig| rig.join("vmlinuz").exists());
    found.expect("no test guest beside the target folder: run tests/setup.sh")
}

impl Machine {
    fn start(huge_pages: bool) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::File::create(path("disk")).unwrap().set_len(64 << 20).unwrap();
        let accel = if kvm_works() { "kvm" } else { "tcg" };
        eprintln!("accelerator {accel}, transparent huge pages {huge_pages}");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", accel, "-display", "none", "-machine", "q35", "-nodefaults"]);
        command.args([
            "-m",
            &MIB.to_string(),
            "-device",
            "VGA",
            "-serial",
            &format!("file:{}", path("console")),
        ]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))]);
        let file = path("disk");
        command.args([
            "-blockdev",
            &format!("driver=raw,node-name=d,file.driver=file,file.filename={file},cache.direct=on"),
        ]);
        command.args(["-device", "virtio-blk-pci,drive=d"]);
        command.arg("-kernel").arg(assets().join("vmlinuz")).arg("-initrd").arg(assets().join("initrd"));
        let load = "lb.tick_ms=100 lb.pattern_mib=12 lb.dirty_kib=256 lb.disk_writes=4";
        command.args(["-append", &format!("console=ttyS0 quiet panic=-1 tsc=reliable {load}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        if !huge_pages {
            forbid_huge_pages(&mut command);
        }
        let qemu = command.spawn().unwrap();
        let monitor = Arc::new(Qmp::connect(&dir.path().join("qmp")));
        let dumps = tempfile::tempdir_in("/dev/shm").unwrap();
        let machine = Self { dir, dumps, qemu, monitor };
        machine.wait_for_tick(3);
        machine
    }

    fn target(&self) -> Target {
        let pid = self.qemu.id() as i32;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let started = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let process = QemuProcess { pid, started };
        Target { monitor: self.monitor.clone(), process, may_have_reset: false }
    }

    fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.monitor.execute(command, arguments).unwrap()
    }

    /// Its memory from guest address 0 on, straight from the process.
    fn memory(&self) -> Vec<u8> {
        let answer = self.monitor.human("gpa2hva 0x0").unwrap();
        let address = answer.rsplit_once(" is 0x").unwrap().1.trim();
        let address = u64::from_str_radix(address, 16).unwrap();
        let mut memory = vec![0; (MIB << 20) as usize];
        process_memory::read(self.target().process, address, &mut memory).unwrap();
        memory
    }

    /// What QEMU says its memory is.
    fn dump(&self) -> Vec<u8> {
        let file = self.dumps.path().join("dump");
        self.qmp("pmemsave", json!({ "val": 0, "size": MIB << 20, "filename": file.to_str() }));
        fs::read(file).unwrap()
    }

    fn last_tick(&self) -> Option<(u64, String)> {
        let console = fs::read(self.dir.path().join("console")).ok()?;
        let console = String::from_utf8_lossy(&console).into_owned();
        // The newest line may be in the middle of being written.
        console.lines().rev().filter(|line| line.starts_with("tick=")).find_map(|line| {
            let (_, tick) = line.split_once(" end=")?;
            Some((tick.trim().parse().ok()?, line.to_owned()))
        })
    }

    fn wait_for_tick(&self, wanted: u64) {
        let deadline = Instant::now() + Duration::from_secs(240);
        while self.last_tick().is_none_or(|(tick, _)| tick < wanted) {
            assert!(Instant::now() < deadline, "the guest said no tick {wanted}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn huge_kib(&self) -> u64 {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.qemu.id())).unwrap();
        let line = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A nested /dev/kvm may run only half of the instructions: believed where its processor has virtualisation.
fn kvm_works() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    fs::exists("/dev/kvm").unwrap() && flags.split(' ').any(|flag| matches!(flag, "svm" | "vmx"))
}

fn forbid_huge_pages(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let forbid = || {
        // SAFETY: changes only how the kernel backs this process's memory.
        match unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(forbid) };
}

struct Figures(Vec<(&'static str, Duration)>);

impl Figures {
    fn say(&self) {
        let mut names: Vec<&str> = self.0.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let mut all: Vec<_> =
                self.0.iter().filter(|(of, _)| *of == name).map(|(_, took)| *took).collect();
            all.sort_unstable();
            let at = |part: usize| all[(all.len() - 1) * part / 100];
            eprintln!("{name:>10}: p50 {:?} p99 {:?} of {}", at(50), at(99), all.len());
        }
    }
}

/// Cuts points of the running guest; of every six one is lost after the pause, and one before it.
fn cut_points(machine: &Machine, wanted: u32) {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = SoftDirty::new(Staging::new(16 << 20, dir.path().into()));
    let target = machine.target();
    let (mut site, mut basis) = (Vec::<Vec<u8>>::new(), None);
    let (mut compared, mut changed, mut figures) = (0, 0, Figures(Vec::new()));
    let mut stopped = |name: &'static str, work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        figures.0.push((name, started.elapsed()));
    };
    for attempt in 0u32.. {
        if compared == wanted {
            break;
        }
        machine.wait_for_tick(machine.last_tick().unwrap().0 + u64::from(attempt % 3));
        let started = Instant::now();
        let images = engine.begin(&target, basis).unwrap();
        let begun = started.elapsed();
        let mut arriving = site.clone();
        arriving.resize(images.len(), Vec::new());
        for (image, bytes) in images.iter().zip(&mut arriving) {
            if image.full {
                *bytes = vec![0; image.block.bytes as usize];
            }
        }
        assert_eq!(images.iter().all(|image| image.full), basis.is_none());
        while engine.wants_early_pause() {
            machine.qmp("stop", json!({}));
            stopped("early", &mut || engine.early_pause().unwrap());
            machine.qmp("cont", json!({}));
            apply(&mut arriving, before(&mut engine));
        }
        apply(&mut arriving, before(&mut engine));
        if attempt % 6 == 5 {
            engine.put_back();
            continue;
        }
        stopped("stop", &mut || drop(machine.qmp("stop", json!({}))));
        stopped("drain", &mut || engine.drain().unwrap());
        let cost = engine.round.as_ref().unwrap().cost;
        let dump = if compared % 10 == 0 { machine.dump() } else { machine.memory() };
        stopped("cont", &mut || drop(machine.qmp("cont", json!({}))));
        let dumped = started.elapsed();
        changed += apply(&mut arriving, after(&mut engine));
        let ram = images.iter().position(|image| image.block.name == "pc.ram").unwrap();
        same(&arriving[ram], &dump, compared);
        compared += 1;
        if compared % 10 == 1 {
            let all = started.elapsed();
            eprintln!(
                "{compared} points; the last: {cost:?}, begun in {begun:?}, dumped after {dumped:?} of {all:?}"
            );
        }
        if attempt % 6 == 3 {
            engine.put_back();
        } else {
            engine.sent(point(compared as u8));
            engine.settle(point(compared as u8));
            (site, basis) = (arriving, Some(point(compared as u8)));
        }
    }
    figures.say();
    eprintln!(
        "{compared} points were the guest's memory; {} pages a point in their pauses",
        changed / u64::from(wanted)
    );
}

fn same(site: &[u8], dump: &[u8], point: u32) {
    assert_eq!(site.len(), dump.len());
    let pages = site.chunks(PAGE).zip(dump.chunks(PAGE)).enumerate();
    let differ = pages.filter(|(page, (site, dump))| !NOT_PLAIN_RAM.contains(&(page * PAGE)) && site != dump);
    let differ: Vec<usize> = differ.map(|(page, _)| page).collect();
    assert!(
        differ.is_empty(),
        "point {point}: {} pages differ, {:?}",
        differ.len(),
        &differ[..differ.len().min(8)]
    );
}

fn wanted() -> u32 {
    std::env::var("LIFEBOAT_POINTS").map_or(100, |points| points.parse().unwrap())
}

fn a_hundred_points(huge_pages: bool) {
    if !kernel_has_flags().unwrap() {
        eprintln!("SKIPPED: this kernel has no soft-dirty flags; run this where it has (tests/kvm)");
        return;
    }
    let machine = Machine::start(huge_pages);
    eprintln!("{} KiB of huge pages", machine.huge_kib());
    assert!(huge_pages || machine.huge_kib() == 0);
    cut_points(&machine, wanted());
    machine.wait_for_tick(machine.last_tick().unwrap().0 + 3);
    let (_, line) = machine.last_tick().unwrap();
    assert!(line.contains("mem_errors=0 disk_errors=0"), "the guest was harmed: {line}");
}

#[test]
fn a_hundred_points_under_load_are_the_guest_s_memory_with_huge_pages() {
    a_hundred_points(true);
}

#[test]
fn a_hundred_points_under_load_are_the_guest_s_memory_without_huge_pages() {
    a_hundred_points(false);
}
