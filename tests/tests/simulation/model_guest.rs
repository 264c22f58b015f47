//! A guest that exists only as numbers: memory and disk pages, each holding one value, and QEMU's marks over them.
//! Stands in for `capture::guest` and is held to the same contract (`agent/src/capture/source.rs`): marks live in
//! "QEMU", so they survive the agent; what the site holds of memory lives in the agent, so it does not.

use async_trait::async_trait;
use lifeboat::{
    format::manifest::{Consistency, Image, ImageKind, PointMeta, PointStats},
    id::PointId,
    page::{Content, PAGE, PageGroup, PageRun},
    units::UnixMs,
};
use lifeboat_agent::capture::{
    meeting::Meeting,
    memory::choose::MemoryStatus,
    source::{CaptureError, Cut, Source},
};
use rand::{Rng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex},
};

pub const MEMORY_PAGES: u64 = 48;
pub const DISK_PAGES: u64 = 64;
const MEMORY: u16 = 0;
const DISK: u16 = 1;

/// Values of all pages of a guest at one instant; zero is a zero page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instant {
    pub memory: Vec<u64>,
    pub disk: Vec<u64>,
}

/// A page as its value fills it. Values that differ in their last byte alone make pages that differ in few words.
pub fn page_of(value: u64) -> Vec<u8> {
    if value == 0 {
        return vec![0; PAGE];
    }
    let mut page = (value >> 8 | 1).to_le_bytes().repeat(PAGE / 8);
    for word in [0, 1 + (value % 256) as usize] {
        page[word * 8..(word + 1) * 8].copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// What "QEMU" knows: it outlives every agent.
#[derive(Debug)]
struct Machine {
    now: Instant,
    /// Disk pages written since the cut of a point, up to the next one's, oldest first. The last one records.
    marks: Vec<(PointId, BTreeSet<u64>)>,
    /// How often it was restarted.
    restarts: u64,
    /// What each cut point held: the oracle.
    truth: BTreeMap<PointId, Instant>,
    clock: u64,
    /// Points that the agent was told are durable, in that order.
    settled: Vec<PointId>,
    /// Points that were cut while another one was under way.
    overlapped: u64,
}

#[derive(Clone, Debug)]
pub struct ModelGuest(Arc<Mutex<Machine>>);

impl ModelGuest {
    pub fn new() -> Self {
        let now = Instant { memory: vec![0; MEMORY_PAGES as usize], disk: vec![0; DISK_PAGES as usize] };
        Self(Arc::new(Mutex::new(Machine {
            now,
            marks: Vec::new(),
            restarts: 0,
            truth: BTreeMap::new(),
            clock: 0,
            settled: Vec::new(),
            overlapped: 0,
        })))
    }

    /// The guest works: writes some pages, now and then zeroes one.
    pub fn work(&self, rng: &mut StdRng, writes: u32) {
        self.with(|machine| {
            for _ in 0..writes {
                let in_memory: bool = rng.random();
                let page = rng.random_range(0..if in_memory { MEMORY_PAGES } else { DISK_PAGES });
                let pages = if in_memory { &machine.now.memory } else { &machine.now.disk };
                let value = match rng.random_range(0..8) {
                    0 => 0,
                    1..5 => pages[page as usize] & !0xff | rng.random_range(1..256),
                    // What a page cache does: the disk gets what a page of memory holds.
                    5 if !in_memory => machine.now.memory[rng.random_range(0..MEMORY_PAGES) as usize],
                    _ => rng.random(),
                };
                if in_memory {
                    machine.now.memory[page as usize] = value;
                } else {
                    machine.now.disk[page as usize] = value;
                    if let Some((_, recording)) = machine.marks.last_mut() {
                        recording.insert(page);
                    }
                }
            }
        });
    }

    pub fn truth(&self, point: PointId) -> Option<Instant> {
        self.with(|machine| machine.truth.get(&point).cloned())
    }

    pub fn now(&self) -> Instant {
        self.with(|machine| machine.now.clone())
    }

    pub fn settled(&self) -> Vec<PointId> {
        self.with(|machine| machine.settled.clone())
    }

    pub fn overlapped(&self) -> u64 {
        self.with(|machine| machine.overlapped)
    }

    /// QEMU is restarted: its marks are gone.
    pub fn lose_marks(&self) {
        self.with(|machine| {
            machine.marks.clear();
            machine.restarts += 1;
        });
    }

    /// An agent process's view of this guest.
    pub fn source(&self) -> ModelSource {
        ModelSource { guest: self.clone(), held: HeldMemory::default() }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Machine) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }
}

/// Memory as points hold it that were sent, oldest first; lives in the agent's process.
type HeldMemory = Arc<Mutex<Vec<(PointId, Vec<u64>)>>>;

pub struct ModelSource {
    guest: ModelGuest,
    held: HeldMemory,
}

#[async_trait]
impl Source for ModelSource {
    async fn leave(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }

    // Its worlds know no planned failover.
    async fn runs(&mut self) -> Result<bool, CaptureError> {
        Ok(true)
    }

    async fn stand(&mut self, _: &Path) -> Result<(), CaptureError> {
        Ok(())
    }

    async fn keep_standing(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }

    async fn go_on(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }

    async fn shut_off(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }

    async fn begin(&mut self, point: PointId, over: &[PointId]) -> Result<Box<dyn Cut>, CaptureError> {
        let (owed, restarts) = self.guest.with(|machine| {
            machine.overlapped += u64::from(over.len() > 1);
            (machine.recover(over), machine.restarts)
        });
        let held = {
            let mut sent = self.held.lock().unwrap();
            let basis = sent.iter().position(|(of, _)| Some(of) == over.last());
            sent.truncate(basis.map_or(0, |at| at + 1));
            sent.last().map(|(_, pages)| pages.clone())
        };
        Ok(Box::new(ModelCut {
            guest: self.guest.clone(),
            held: self.held.clone(),
            point,
            site_memory: held,
            disk_full: owed,
            restarts,
            seed: 0,
            queue: Vec::new(),
            marked: false,
            memory: Vec::new(),
            changed: (0, 0),
        }))
    }

    async fn settle(&mut self, point: PointId) -> Result<(), CaptureError> {
        self.guest.with(|machine| {
            if let Some(at) = machine.marks.iter().position(|(of, _)| *of == point) {
                machine.marks.drain(..at);
            }
            machine.settled.push(point);
        });
        let mut sent = self.held.lock().unwrap();
        if let Some(at) = sent.iter().position(|(of, _)| *of == point) {
            sent.drain(..at);
        }
        Ok(())
    }

    fn memory(&self) -> MemoryStatus {
        MemoryStatus { engine: Some("model".into()), ..MemoryStatus::default() }
    }
}

impl Machine {
    /// Reconciles marks with what the site holds, and what is under way; `true` if the disk must go in full.
    fn recover(&mut self, over: &[PointId]) -> bool {
        let known = over.last().and_then(|basis| self.marks.iter().position(|(of, _)| of == basis));
        let Some(at) = known else {
            self.marks.clear();
            return true;
        };
        let basis = self.marks[at].0;
        let owed = self.marks.split_off(at).into_iter().flat_map(|(_, pages)| pages).collect();
        self.marks.retain(|(of, _)| over.contains(of));
        self.marks.push((basis, owed));
        false
    }
}

struct ModelCut {
    guest: ModelGuest,
    held: HeldMemory,
    point: PointId,
    site_memory: Option<Vec<u64>>,
    disk_full: bool,
    /// The QEMU that it was begun in.
    restarts: u64,
    /// How far the seeding round has come, in pages.
    seed: u64,
    queue: Vec<PageGroup>,
    marked: bool,
    memory: Vec<u64>,
    changed: (u64, u64),
}

/// What was written up to the cut of `point` since the one before.
fn owed_since(marks: &[(PointId, BTreeSet<u64>)], point: PointId) -> BTreeSet<u64> {
    let at = marks.iter().position(|(of, _)| *of == point).unwrap();
    marks[at - 1].1.clone()
}

fn image(no: u16, kind: ImageKind, name: &str, pages: u64, full: bool) -> Image {
    Image { no, kind, name: name.into(), bytes: pages * PAGE as u64, full }
}

fn group(image: u16, page: u64, value: u64) -> PageGroup {
    let content = if value == 0 { Content::Zero } else { Content::Bytes(page_of(value).into()) };
    PageGroup { image, runs: vec![PageRun::new(page, 1)], content }
}

#[async_trait]
impl Cut for ModelCut {
    fn images(&self) -> Vec<Image> {
        vec![
            image(MEMORY, ImageKind::Ram, "pc.ram", MEMORY_PAGES, self.site_memory.is_none()),
            image(DISK, ImageKind::Disk, "vda", DISK_PAGES, self.disk_full),
        ]
    }

    async fn before(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        // Only a first copy has a round before the cut; its pages may be stale by the barrier.
        if self.site_memory.is_some() || self.seed == MEMORY_PAGES {
            return Ok(None);
        }
        let page = self.seed;
        self.seed += 1;
        let value = self.guest.with(|machine| machine.now.memory[page as usize]);
        self.memory.push(value);
        Ok(Some(group(MEMORY, page, value)))
    }

    async fn barrier(&mut self, _: Option<Arc<Meeting>>) -> Result<PointMeta, CaptureError> {
        if self.guest.with(|machine| machine.restarts) != self.restarts {
            return Err(CaptureError::Failed("its QEMU process ended".into()));
        }
        let site = self.site_memory.clone().unwrap_or_else(|| std::mem::take(&mut self.memory));
        let (now, at) = self.guest.with(|machine| {
            machine.marks.push((self.point, BTreeSet::new()));
            machine.truth.insert(self.point, machine.now.clone());
            machine.clock += 1;
            (machine.now.clone(), machine.clock)
        });
        self.marked = true;
        let owed: BTreeSet<u64> = if self.disk_full {
            (0..DISK_PAGES).filter(|page| now.disk[*page as usize] != 0).collect()
        } else {
            self.guest.with(|machine| owed_since(&machine.marks, self.point))
        };
        for (page, value) in (0..MEMORY_PAGES).zip(&now.memory) {
            if site[page as usize] != *value {
                self.changed.0 += PAGE as u64;
                self.queue.push(group(MEMORY, page, *value));
            }
        }
        for page in owed {
            self.changed.1 += PAGE as u64;
            self.queue.push(group(DISK, page, now.disk[page as usize]));
        }
        self.memory = now.memory;
        Ok(PointMeta {
            cut_at: UnixMs(at),
            images: self.images(),
            consistency: Consistency::Memory,
            cut: None,
            was_running: true,
            stats: PointStats::default(),
        })
    }

    async fn after(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        Ok(self.queue.pop())
    }

    fn changed(&self) -> (u64, u64) {
        self.changed
    }

    async fn sent(self: Box<Self>) -> Result<(), CaptureError> {
        self.held.lock().unwrap().push((self.point, self.memory));
        Ok(())
    }

    async fn put_back(self: Box<Self>) -> Result<(), CaptureError> {
        self.guest.with(|machine| {
            if !self.marked {
                return;
            }
            let new = machine.marks.pop().map(|(_, pages)| pages).unwrap_or_default();
            if let Some((_, old)) = machine.marks.last_mut() {
                old.extend(new);
            }
        });
        Ok(())
    }
}
