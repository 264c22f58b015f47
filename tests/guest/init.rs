//! The witness: PID 1 of the test guest, and all there is in it.
//! Keeps patterned memory and numbered disk blocks, changes both, and checks both all the time. What every
//! disk block must hold is remembered in RAM only, so the checks pass after a resume if RAM and disks are
//! of one instant, and fail if either is older, newer or damaged. Says so on the console, a line a tick.
//! Built by tests/setup.sh as a static binary (std only); its console is read by `rig::console`.
//!
//! Kernel parameters: `lb.tick_ms`, `lb.pattern_mib`, `lb.dirty_kib` (per tick), `lb.disk_writes` (4 KiB
//! blocks per tick and disk), `lb.idle=1` (change nothing, go on checking), `lb.fill_mib` (memory filled
//! once and left alone), `lb.agent=1` (start the guest agent that is there), `lb.files=vdb` (no blocks on that disk, but
//! an ext4 file system, and lines written to a file that nobody syncs), `lb.net=1` (load a driver for its network cards).

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn main() {
    prepare_machine();
    let settings = Settings::read();
    let mut console = Console::open();
    if settings.net {
        ["failover", "net_failover", "virtio_net"].into_iter().for_each(load_module);
    }
    if settings.agent {
        start_agent(&mut console);
    }
    let boot = random();
    let mut memory = Memory::new(settings.pattern_mib, boot);
    let filler = Memory::new(settings.fill_mib, boot ^ 1);
    let names = disk_names();
    let witnessed = names.iter().filter(|name| settings.files != **name).enumerate();
    let mut disks: Vec<Disk> = witnessed.filter_map(|(at, name)| Disk::open(name, at, boot)).collect();
    let found = write_lines(&settings, &mut console);
    console.say(&format!(
        "hello boot={boot:016x} disks={} pattern_mib={}",
        disks.len(),
        settings.pattern_mib
    ));
    let began = Instant::now();
    for tick in 1_u64.. {
        if !settings.idle {
            memory.dirty(settings.dirty_kib / 4);
            disks.iter_mut().for_each(|disk| disk.write(settings.disk_writes, &mut console));
        }
        memory.check(MEMORY_CHECKED_PER_TICK, &mut console);
        disks.iter_mut().for_each(|disk| disk.check(SLOTS_CHECKED_PER_TICK, &mut console));
        console.say(&format!(
            "tick={tick} boot={boot:016x} up={} mem_errors={} disk_errors={} disks={} dirtied={} writes={} \
             mem_sweeps={} disk_sweeps={} found={found} lines={} clock={} end={tick}",
            began.elapsed().as_millis(),
            memory.errors,
            disks.iter().map(|disk| disk.errors).sum::<u64>(),
            disks.len(),
            memory.dirtied,
            disks.iter().map(|disk| disk.written).sum::<u64>(),
            memory.sweeps,
            disks.iter().map(|disk| disk.sweeps).min().unwrap_or(0),
            LINES.load(Ordering::Relaxed),
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis()),
        ));
        sleep(settings.tick);
    }
    drop(filler);
}

/// Number of the last line that was written.
static LINES: AtomicU64 = AtomicU64::new(0);

/// Says how many lines a boot before this one has left on the file system, and begins to write further ones. Nobody syncs
/// them, and the kernel never does by itself: they are on the disk if the file system was frozen after them, and not
/// otherwise. A file system that is frozen makes the writer wait, and nobody else.
fn write_lines(settings: &Settings, console: &mut Console) -> u64 {
    if settings.files.is_empty() {
        return 0;
    }
    let _ = fs::write("/proc/sys/vm/dirty_writeback_centisecs", "0");
    let disk = CString::new(format!("/dev/{}", settings.files)).unwrap_or_default();
    // SAFETY: all strings are NUL-terminated.
    let mounted = unsafe {
        mount(disk.as_ptr(), c"/data".as_ptr(), c"ext4".as_ptr(), 0, c"commit=86400".as_ptr().cast())
    };
    let before = fs::read_to_string("/data/lines").unwrap_or_default();
    let found = before.lines().last().and_then(|last| last.parse::<u64>().ok()).unwrap_or(0);
    let whole = before.lines().map(str::parse::<u64>).eq((1..=found).map(Ok))
        && before.ends_with('\n') == (found > 0);
    let file = OpenOptions::new().append(true).create(true).open("/data/lines");
    let (0, true, Ok(mut file)) = (mounted, whole, file) else {
        console.complain(&format!("error=files mounted={mounted} whole={whole} found={found}"));
        return found;
    };
    let tick = settings.tick;
    spawn(move || {
        for number in found + 1.. {
            if file.write_all(format!("{number}\n").as_bytes()).is_ok() {
                LINES.store(number, Ordering::Relaxed);
            }
            sleep(tick);
        }
    });
    found
}

/// The guest agent, where there is a channel for it.
fn start_agent(console: &mut Console) {
    load_module("virtio_console");
    let is_ours = |port: &String| {
        let name = fs::read_to_string(format!("/sys/class/virtio-ports/{port}/name"));
        name.is_ok_and(|name| name.trim() == "org.qemu.guest_agent.0")
    };
    let port = (0..200).find_map(|_| {
        sleep(Duration::from_millis(20));
        names_in("/sys/class/virtio-ports").into_iter().find(is_ours)
    });
    let Some(port) = port else { return console.complain("error=agent no channel") };
    let agent = Command::new("/usr/sbin/qemu-ga")
        .args(["-m", "virtio-serial", "-t", "/run", "-p", &format!("/dev/{port}")])
        .env("PATH", "/bin:/sbin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if let Err(error) = agent {
        console.complain(&format!("error=agent {error}"));
    }
}

/// Pages that hold a function of (boot, page, generation), and the table of generations.
struct Memory {
    pages: &'static mut [[u64; WORDS]],
    generations: Vec<u64>,
    seed: u64,
    dirtied: u64,
    checked: usize,
    sweeps: u64,
    errors: u64,
}

impl Memory {
    fn new(mib: u64, seed: u64) -> Self {
        let count = (mib as usize) << 8;
        let pages = if count == 0 { &mut [] } else { zeroed_pages(count) };
        let generations = vec![0; count];
        let mut memory = Self { pages, generations, seed, dirtied: 0, checked: 0, sweeps: 0, errors: 0 };
        (0..count).for_each(|page| memory.stamp(page, 0));
        memory
    }

    fn stamp(&mut self, page: usize, generation: u64) {
        self.generations[page] = generation;
        let first = pattern(self.seed, page as u64, generation);
        for (at, word) in self.pages[page].iter_mut().enumerate() {
            *word = first.wrapping_add(at as u64);
        }
    }

    /// Gives `count` scattered pages their next generation.
    fn dirty(&mut self, count: u64) {
        for _ in 0..if self.pages.is_empty() { 0 } else { count } {
            self.dirtied += 1;
            let page = (mix(self.dirtied) % self.pages.len() as u64) as usize;
            self.stamp(page, self.generations[page] + 1);
        }
    }

    /// Compares the next `count` pages with what they must hold; wraps around.
    fn check(&mut self, count: usize, console: &mut Console) {
        for _ in 0..count.min(self.pages.len()) {
            let (page, generation) = (self.checked, self.generations[self.checked]);
            let first = pattern(self.seed, page as u64, generation);
            let wrong = self.pages[page]
                .iter()
                .enumerate()
                .find(|(at, word)| **word != first.wrapping_add(*at as u64));
            if let Some((at, word)) = wrong {
                self.errors += 1;
                let address = &raw const self.pages[page];
                console.complain(&format!(
                    "error=memory page={page} at={address:p} generation={generation} word={at} found={word:016x}"
                ));
            }
            self.checked = (self.checked + 1) % self.pages.len();
            self.sweeps += u64::from(self.checked == 0);
        }
    }
}

/// A disk seen as slots, one block each, spread over all of it; `held` says which number each must hold (0:
/// unknown).
struct Disk {
    file: File,
    at: usize,
    boot: u64,
    stride_blocks: u64,
    held: Vec<u64>,
    block: &'static mut [u64; WORDS],
    written: u64,
    checked: usize,
    sweeps: u64,
    errors: u64,
}

impl Disk {
    fn open(name: &str, at: usize, boot: u64) -> Option<Self> {
        let path = format!("/dev/{name}");
        let mut file =
            OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT | O_SYNC).open(path).ok()?;
        let blocks = file.seek(SeekFrom::End(0)).ok()? / BLOCK as u64;
        let slots = blocks.min(SLOTS);
        let held = vec![0; usize::try_from(slots).ok()?];
        let block = &mut zeroed_pages(1)[0];
        Some(Self {
            file,
            at,
            boot,
            stride_blocks: blocks / slots.max(1),
            held,
            block,
            written: 0,
            checked: 0,
            sweeps: 0,
            errors: 0,
        })
    }

    /// Where a slot's block is: anywhere in its stride, always at the same place.
    fn offset(&self, slot: usize) -> u64 {
        (slot as u64 * self.stride_blocks + mix(slot as u64 + 1) % self.stride_blocks) * BLOCK as u64
    }

    fn write(&mut self, count: u64, console: &mut Console) {
        for _ in 0..if self.held.is_empty() { 0 } else { count } {
            let number = self.written + 1;
            let slot = (mix(number) % self.held.len() as u64) as usize;
            self.compose(slot, number);
            match self.file.write_all_at(bytes(self.block), self.offset(slot)) {
                Ok(()) => (self.held[slot], self.written) = (number, number),
                Err(error) => self.fail(console, slot, format_args!("write of {number}: {error}")),
            }
        }
    }

    /// Reads the next `count` slots and compares them with what RAM remembers.
    fn check(&mut self, count: usize, console: &mut Console) {
        for _ in 0..count.min(self.held.len()) {
            let slot = self.checked;
            if self.held[slot] != 0 {
                self.check_slot(slot, console);
            }
            self.checked = (self.checked + 1) % self.held.len();
            self.sweeps += u64::from(self.checked == 0);
        }
    }

    fn check_slot(&mut self, slot: usize, console: &mut Console) {
        let offset = self.offset(slot);
        if let Err(error) = self.file.read_exact_at(bytes_mut(self.block), offset) {
            return self.fail(console, slot, format_args!("read: {error}"));
        }
        let found = *self.block;
        self.compose(slot, self.held[slot]);
        if found != *self.block {
            let number = found[3];
            let whole = {
                self.compose(slot, number);
                found == *self.block
            };
            self.fail(console, slot, format_args!("found={number} whole={whole}"));
        }
    }

    fn compose(&mut self, slot: usize, number: u64) {
        let first = pattern(self.boot ^ self.at as u64, slot as u64, number);
        self.block[..4].copy_from_slice(&[self.boot, self.at as u64, slot as u64, number]);
        for (at, word) in self.block.iter_mut().enumerate().skip(4) {
            *word = first.wrapping_add(at as u64);
        }
    }

    fn fail(&mut self, console: &mut Console, slot: usize, what: std::fmt::Arguments<'_>) {
        self.errors += 1;
        let (disk, offset, wanted) = (self.at, self.offset(slot), self.held[slot]);
        console
            .complain(&format!("error=disk disk={disk} slot={slot} offset={offset} wanted={wanted} {what}"));
    }
}

struct Settings {
    tick: Duration,
    pattern_mib: u64,
    dirty_kib: u64,
    disk_writes: u64,
    fill_mib: u64,
    idle: bool,
    agent: bool,
    net: bool,
    /// The disk with a file system; none: empty.
    files: String,
}

impl Settings {
    fn read() -> Self {
        let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let word =
            |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let value =
            |key: &str, default: u64| word(key).and_then(|value| value.parse().ok()).unwrap_or(default);
        Self {
            tick: Duration::from_millis(value("lb.tick_ms", 100)),
            pattern_mib: value("lb.pattern_mib", 32),
            dirty_kib: value("lb.dirty_kib", 256),
            disk_writes: value("lb.disk_writes", 4),
            fill_mib: value("lb.fill_mib", 0),
            idle: value("lb.idle", 0) != 0,
            agent: value("lb.agent", 0) != 0,
            net: value("lb.net", 0) != 0,
            files: word("lb.files").unwrap_or_default().to_owned(),
        }
    }
}

/// The serial port. One `write` a line, and no more complaints than a person would read.
struct Console {
    port: Option<File>,
    complaints: u32,
}

impl Console {
    fn open() -> Self {
        Self { port: OpenOptions::new().write(true).open("/dev/ttyS0").ok(), complaints: 0 }
    }

    fn say(&mut self, line: &str) {
        if let Some(port) = &mut self.port {
            let _ = port.write_all(format!("{line}\n").as_bytes()); // nobody to tell
        }
    }

    fn complain(&mut self, line: &str) {
        self.complaints += 1;
        if self.complaints <= COMPLAINTS_MAX {
            self.say(line);
        }
    }
}

fn prepare_machine() {
    for (kind, place) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        mount_at(kind, place);
    }
    for module in [
        "virtio_ring",
        "virtio",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "virtio_pci",
        "virtio_blk",
    ] {
        load_module(module);
    }
}

fn load_module(name: &str) {
    if let Ok(file) = File::open(format!("/modules/{name}.ko")) {
        // SAFETY: the descriptor is open for the call and the parameter string is NUL-terminated.
        unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
    }
}

fn mount_at(kind: &CStr, place: &CStr) {
    // SAFETY: all strings are NUL-terminated and `data` may be null.
    unsafe { mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

/// The virtio disks, once as many are there as the PCI bus promises (probing is not instant).
fn disk_names() -> Vec<String> {
    let promised = names_in("/sys/bus/pci/devices").iter().filter(|device| is_virtio_disk(device)).count();
    for _ in 0..200 {
        let found: Vec<String> =
            names_in("/sys/block").into_iter().filter(|name| name.starts_with("vd")).collect();
        if found.len() >= promised {
            return found;
        }
        sleep(Duration::from_millis(20));
    }
    Vec::new()
}

fn is_virtio_disk(device: &str) -> bool {
    let read = |what| fs::read_to_string(format!("/sys/bus/pci/devices/{device}/{what}")).unwrap_or_default();
    read("vendor").trim() == "0x1af4" && matches!(read("device").trim(), "0x1001" | "0x1042")
}

fn names_in(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Blocks until the kernel has real randomness, so that two boots never share an id.
fn random() -> u64 {
    let mut bytes = [0; 8];
    let _ = File::open("/dev/random").and_then(|mut file| file.read_exact(&mut bytes));
    u64::from_le_bytes(bytes)
}

fn zeroed_pages(count: usize) -> &'static mut [[u64; WORDS]] {
    let Ok(layout) = Layout::from_size_align(count * BLOCK, BLOCK) else {
        return &mut [];
    };
    // SAFETY: the layout is not empty; the memory is zeroed, aligned, never freed and has no other owner.
    unsafe {
        let start = alloc_zeroed(layout);
        if start.is_null() {
            handle_alloc_error(layout);
        }
        std::slice::from_raw_parts_mut(start.cast(), count)
    }
}

fn bytes(block: &[u64; WORDS]) -> &[u8] {
    // SAFETY: any u64 array is readable as bytes of the same total size.
    unsafe { std::slice::from_raw_parts(block.as_ptr().cast(), BLOCK) }
}

fn bytes_mut(block: &mut [u64; WORDS]) -> &mut [u8] {
    // SAFETY: any bytes of the same total size make a u64 array; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(block.as_mut_ptr().cast(), BLOCK) }
}

fn pattern(seed: u64, place: u64, generation: u64) -> u64 {
    mix(mix(seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15)) ^ generation)
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    value = (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

const BLOCK: usize = 4096;
const WORDS: usize = BLOCK / 8;
const SLOTS: u64 = 512;
const SLOTS_CHECKED_PER_TICK: usize = 64;
const MEMORY_CHECKED_PER_TICK: usize = 1024;
const COMPLAINTS_MAX: u32 = 20;
const FINIT_MODULE: c_long = 313;
const O_DIRECT: c_int = 0o40000;
const O_SYNC: c_int = 0o4010000;
