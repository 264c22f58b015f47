//! Goal: what is owed, and that the kernel flags pages as is relied on. Method: this very process plays the guest; its
//! memory is read as QEMU's would be. A made-up kernel keeps the flags; one test holds it and the real kernel to the
//! same behaviour, and where the real one has flags, every test is run with it as well.

mod real_guest;

use super::{
    flags::{Entry, PageFlags, kernel_has_flags},
    *,
};
use crate::capture::memory::{
    head::{Contents, Head},
    layout::{Layout, Placed},
};
use lifeboat::{
    hypervisor::monitor::{Monitor, MonitorError},
    page::Content,
};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{
    ffi::c_void,
    num::NonZeroUsize,
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::{Arc, Mutex},
};

const PAGES: usize = 3000;
const PRESENT: u64 = 1 << 63;
const EXCLUSIVE: u64 = 1 << 56;
const WRITTEN: u64 = 1 << 55;

/// Answers `info ramblock`, the one question of a round whose layout is known.
struct Quiet;
impl Monitor for Quiet {
    fn execute_with_fds(&self, _: &str, _: Value, _: &[BorrowedFd<'_>]) -> Result<Value, MonitorError> {
        Ok(json!("blocks"))
    }
}

/// Flags of the guest's pages, kept by hand.
#[derive(Clone)]
struct MadeUp {
    base: u64,
    entries: Arc<Mutex<Vec<u64>>>,
}

impl PageFlags for MadeUp {
    fn read(&self, address: u64, into: &mut [Entry]) -> Result<(), MemoryError> {
        let entries = self.entries.lock().unwrap();
        let first = ((address - self.base) / PAGE as u64) as usize;
        into.iter_mut().zip(&entries[first..]).for_each(|(into, entry)| *into = Entry(*entry));
        Ok(())
    }
    fn clear(&self) -> Result<(), MemoryError> {
        self.entries.lock().unwrap().iter_mut().for_each(|entry| *entry &= !WRITTEN);
        Ok(())
    }
}

struct Guest {
    ram: NonNull<c_void>,
    made_up: Option<MadeUp>,
    target: Target,
}

impl Guest {
    fn new(real: bool) -> Self {
        let len = NonZeroUsize::new(PAGES * PAGE).unwrap();
        // SAFETY: a new mapping, which nothing else uses.
        let ram = unsafe {
            mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
                .unwrap()
        };
        // SAFETY: advice on our own mapping. A kernel without huge pages refuses, and has none.
        let _ = unsafe { madvise(ram, PAGES * PAGE, MmapAdvise::MADV_NOHUGEPAGE) };
        let entries = Arc::new(Mutex::new(vec![0; PAGES]));
        let made_up = (!real).then_some(MadeUp { base: ram.as_ptr() as u64, entries });
        let pid = std::process::id() as i32;
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let started = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let process = QemuProcess { pid, started };
        let target = Target { monitor: Arc::new(Quiet), process, may_have_reset: false };
        Self { ram, made_up, target }
    }

    fn ram(&self) -> &[u8] {
        // SAFETY: mapped as long as `self` lives, and written only through it.
        unsafe { std::slice::from_raw_parts(self.ram.as_ptr().cast(), PAGES * PAGE) }
    }

    fn flag(&self, page: usize, entry: impl Fn(u64) -> u64) {
        if let Some(made_up) = &self.made_up {
            let mut entries = made_up.entries.lock().unwrap();
            entries[page] = entry(entries[page]);
        }
    }

    fn write(&mut self, page: usize, byte: u8) {
        self.flag(page, |_| PRESENT | EXCLUSIVE | WRITTEN);
        // SAFETY: within the mapping, of which no other reference is held now.
        unsafe { self.ram.as_ptr().cast::<u8>().add(page * PAGE).write_bytes(byte, PAGE) }
    }

    /// As a balloon does.
    fn give_back(&mut self, page: usize) {
        self.flag(page, |_| 0);
        // SAFETY: a page of our own mapping, of which no reference is held now.
        unsafe {
            let page = self.ram.byte_add(page * PAGE);
            madvise(page, PAGE, MmapAdvise::MADV_DONTNEED).unwrap();
        }
    }

    fn peek(&self, page: usize) -> u8 {
        self.flag(page, |entry| if entry & PRESENT == 0 { PRESENT } else { entry });
        // SAFETY: within the mapping.
        unsafe { self.ram.as_ptr().cast::<u8>().add(page * PAGE).read_volatile() }
    }

    fn flags(&self) -> Box<dyn PageFlags> {
        match &self.made_up {
            Some(made_up) => Box::new(made_up.clone()),
            None => Box::new(KernelFlags::open(self.target.process).unwrap()),
        }
    }

    fn engine(&self, dir: &std::path::Path) -> SoftDirty {
        let blocks = vec![
            RamBlock { name: "pc.ram".into(), bytes: (PAGES * PAGE) as u64 },
            RamBlock { name: "/rom@tables".into(), bytes: 2 * PAGE as u64 },
        ];
        let contents = vec![Contents::Samples(Vec::new()), Contents::Whole([[7; PAGE], [0; PAGE]].concat())];
        let places = [Place::Host { address: self.ram.as_ptr() as u64 }, Place::Head];
        let placed = blocks.iter().cloned().zip(places).map(|(block, place)| Placed { block, place });
        let layout = Layout {
            blocks: placed.collect(),
            head: Head { config: b"\x07".to_vec(), blocks, contents },
            fingerprint: "blocks".into(),
        };
        let mut engine = SoftDirty::new(Staging::new(64 << 10, dir.into()));
        engine.known = Some(Known::of(self.target.clone(), layout));
        engine.tracked = Some(Tracked::of(self.target.process, self.flags()));
        engine
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: our own mapping, used no more.
        let _ = unsafe { munmap(self.ram, PAGES * PAGE) };
    }
}

/// The kernels that a test can be run with here.
fn kernels() -> Vec<bool> {
    if kernel_has_flags().unwrap() {
        vec![false, true]
    } else {
        eprintln!("SKIPPED with the real kernel: this one has no soft-dirty flags; run this where it has");
        vec![false]
    }
}

/// Plays groups into a copy of the site; returns how many pages came.
fn apply(site: &mut [Vec<u8>], groups: impl IntoIterator<Item = PageGroup>) -> u64 {
    let mut pages = 0;
    for group in groups {
        pages += group.pages();
        let numbers = group.runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count));
        for (at, page) in numbers.enumerate() {
            let place = page as usize * PAGE..(page as usize + 1) * PAGE;
            let image = &mut site[usize::from(group.image)];
            match &group.content {
                Content::Zero => image[place].fill(0),
                Content::Bytes(bytes) => image[place].copy_from_slice(&bytes[at * PAGE..(at + 1) * PAGE]),
            }
        }
    }
    pages
}

fn before(engine: &mut SoftDirty) -> Vec<PageGroup> {
    std::iter::from_fn(|| engine.before().unwrap()).collect()
}

fn after(engine: &mut SoftDirty) -> Vec<PageGroup> {
    std::iter::from_fn(|| engine.after().unwrap()).collect()
}

fn point(n: u8) -> PointId {
    PointId::from_bytes([n; 16])
}

fn empty_site() -> Vec<Vec<u8>> {
    vec![vec![0; PAGES * PAGE], vec![0; 2 * PAGE]]
}

#[test]
fn the_kernel_flags_pages_as_these_tests_take_it_to() {
    for real in kernels() {
        let mut guest = Guest::new(real);
        let flags = guest.flags();
        let base = guest.ram.as_ptr() as u64;
        let entry = |page: usize| {
            let mut entry = [Entry(0)];
            flags.read(base + (page * PAGE) as u64, &mut entry).unwrap();
            entry[0]
        };
        assert!(entry(5).is_gone(), "never touched");
        guest.write(5, 1);
        assert!(entry(5).is_written() && !entry(5).is_gone() && !entry(5).is_shared());
        flags.clear().unwrap();
        assert!(!entry(5).is_written() && !entry(5).is_gone() && !entry(5).is_shared());
        assert_eq!(guest.peek(5), 1);
        assert!(!entry(5).is_written(), "reading is not writing");
        guest.write(5, 2);
        assert!(entry(5).is_written() && entry(6).is_gone());
        flags.clear().unwrap();
        guest.give_back(5);
        assert!(entry(5).is_gone());
        assert_eq!(guest.peek(5), 0);
        assert!(entry(5).is_shared() && !entry(5).is_written(), "the kernel's zeros come without a flag");
        guest.write(5, 3);
        assert!(entry(5).is_written() && !entry(5).is_shared());
    }
}

#[test]
fn later_points_carry_what_was_written_and_lost_points_are_owed_again() {
    for real in kernels() {
        let dir = tempfile::tempdir().unwrap();
        let mut guest = Guest::new(real);
        let mut engine = guest.engine(dir.path());
        let target = guest.target.clone();
        let mut site = empty_site();

        // First point: read while it ran, and what was written since; pages never touched are left out.
        (0..600).for_each(|page| guest.write(page * 3, 9));
        guest.peek(2999);
        assert!(engine.begin(&target, None).unwrap().iter().all(|image| image.full));
        assert!(matches!(engine.drain(), Err(MemoryError::Order(_))));
        engine.early_pause().unwrap();
        apply(&mut site, before(&mut engine));
        guest.write(0, 0);
        guest.write(1, 5);
        guest.give_back(3);
        engine.drain().unwrap();
        apply(&mut site, after(&mut engine));
        assert!(site[0] == guest.ram() && site[1][..PAGE] == [7; PAGE]);
        engine.sent(point(1));
        engine.settle(point(1));

        // A lost point, its flags cleared already: owed again, together with what was written since.
        (0..100).for_each(|page| guest.write(page, 77));
        guest.give_back(6);
        guest.peek(6);
        assert!(engine.begin(&target, Some(point(1))).unwrap().iter().all(|image| !image.full));
        assert_eq!(before(&mut engine), []);
        engine.drain().unwrap();
        assert_eq!(engine.changed_bytes(), 100 * PAGE as u64);
        engine.put_back();
        guest.write(2999, 1);
        engine.begin(&target, Some(point(1))).unwrap();
        assert_eq!(before(&mut engine), []);
        engine.drain().unwrap();
        assert_eq!(apply(&mut site, after(&mut engine)), 101);
        assert!(site[0] == guest.ram());
        engine.sent(point(3));
        engine.settle(point(3));

        // Nothing was written: nothing is sent. The same was written: it is read, and not sent. Another basis: all is.
        guest.write(50, 77);
        engine.begin(&target, Some(point(3))).unwrap();
        assert_eq!(before(&mut engine), []);
        engine.drain().unwrap();
        assert_eq!(after(&mut engine), []);
        assert!(engine.begin(&target, Some(point(1))).unwrap().iter().all(|image| image.full));
    }
}

#[test]
fn flags_that_somebody_else_cleared_cost_a_point_and_no_page() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(false);
    let mut engine = guest.engine(dir.path());
    let target = guest.target.clone();
    let mut site = empty_site();
    engine.begin(&target, None).unwrap();
    apply(&mut site, before(&mut engine));
    engine.drain().unwrap();
    guest.write(7, 1);
    apply(&mut site, after(&mut engine));
    engine.sent(point(1));
    engine.settle(point(1));
    guest.write(8, 1);
    guest.flags().clear().unwrap();
    engine.begin(&target, Some(point(1))).unwrap();
    assert!(matches!(engine.before(), Err(MemoryError::Changed { .. })));
    engine.put_back();
    engine.begin(&target, Some(point(1))).unwrap();
    apply(&mut site, before(&mut engine));
    engine.drain().unwrap();
    apply(&mut site, after(&mut engine));
    assert!(site[0] == guest.ram());
}

#[derive(Clone, Debug)]
enum Deed {
    Write(usize, usize, u8),
    GiveBack(usize, usize),
    Peek(usize, usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    let run = || (0..PAGES, prop_oneof![4 => 1usize..20, 1 => 1..PAGES]);
    prop_oneof![
        6 => (run(), 0u8..4).prop_map(|((first, count), byte)| Deed::Write(first, count, byte)),
        2 => run().prop_map(|(first, count)| Deed::GiveBack(first, count)),
        2 => run().prop_map(|(first, count)| Deed::Peek(first, count)),
    ]
}

#[derive(Clone, Debug)]
struct Attempt {
    /// Before the look, between steps of reading, before the cut, and while what was staged is handed over.
    deeds: [Vec<Deed>; 4],
    early_pauses: Vec<bool>,
    /// Whether it gets as far as the pause, and what then becomes of the point.
    drained: bool,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is lost, alone.
    PutBack,
    /// It is under way when the next one begins.
    Sent,
    /// It is durable before the next one begins, and so is all that was under way.
    Durable,
    /// It is lost after it was sent, with all that was under way but for the oldest so many.
    Lost(usize),
}

fn attempt() -> impl Strategy<Value = Attempt> {
    let deeds = || prop::collection::vec(deed(), 0..3);
    let deeds = [deeds(), deeds(), deeds(), deeds()];
    let lost = (0usize..3).prop_map(Fate::Lost);
    let fate =
        prop_oneof![1 => Just(Fate::PutBack), 3 => Just(Fate::Sent), 1 => Just(Fate::Durable), 1 => lost];
    (deeds, prop::collection::vec(prop::bool::weighted(0.3), 3), prop::bool::weighted(0.8), fate)
        .prop_map(|(deeds, early_pauses, drained, fate)| Attempt { deeds, early_pauses, drained, fate })
}

fn act(guest: &mut Guest, deeds: &[Deed]) {
    for deed in deeds {
        let (Deed::Write(first, count, _) | Deed::GiveBack(first, count) | Deed::Peek(first, count)) = deed;
        for page in *first..(first + count).min(PAGES) {
            match deed {
                Deed::Write(_, _, byte) => guest.write(page, *byte),
                Deed::GiveBack(..) => guest.give_back(page),
                Deed::Peek(..) => drop(guest.peek(page)),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    /// Goal: whatever the guest does and whatever becomes of points, each is the guest's memory of its instant, made over
    /// what the site holds or will hold. Method: some are put back, some under way while the next is cut, and of these
    /// some are lost with all that came after.
    #[test]
    fn every_point_is_the_memory_of_its_instant(attempts in prop::collection::vec(attempt(), 1..9)) {
        for real in kernels() {
            let dir = tempfile::tempdir().unwrap();
            let mut guest = Guest::new(real);
            let mut engine = guest.engine(dir.path());
            let target = guest.target.clone();
            // Points and what they hold: the durable one, then those under way.
            let mut held = vec![(None, empty_site())];
            for (number, attempt) in attempts.iter().enumerate() {
                act(&mut guest, &attempt.deeds[0]);
                let (basis, mut arriving) = held.last().unwrap().clone();
                let images = engine.begin(&target, basis).unwrap();
                for image in images.iter().zip(&mut arriving).filter(|(image, _)| image.full) {
                    image.1.fill(0);
                }
                for early in &attempt.early_pauses {
                    if *early {
                        engine.early_pause().unwrap();
                    }
                    apply(&mut arriving, engine.before().unwrap());
                    act(&mut guest, &attempt.deeds[1]);
                }
                if attempt.drained {
                    apply(&mut arriving, before(&mut engine));
                    act(&mut guest, &attempt.deeds[2]);
                    engine.drain().unwrap();
                    let instant = guest.ram().to_vec();
                    act(&mut guest, &attempt.deeds[3]);
                    apply(&mut arriving, after(&mut engine));
                    prop_assert!(arriving[0] == instant, "point {number} is not its instant");
                }
                if attempt.drained && attempt.fate != Fate::PutBack {
                    let this = point(number as u8 + 1);
                    engine.sent(this);
                    held.push((Some(this), arriving));
                    match attempt.fate {
                        Fate::Durable => {
                            engine.settle(this);
                            held.drain(..held.len() - 1);
                        }
                        Fate::Lost(left) => held.truncate(left + 1),
                        Fate::Sent | Fate::PutBack => {}
                    }
                    if held.len() > 3 {
                        // No more than so many are under way: the oldest is durable.
                        engine.settle(held[1].0.unwrap());
                        held.remove(0);
                    }
                } else {
                    engine.put_back();
                }
            }
        }
    }
}
