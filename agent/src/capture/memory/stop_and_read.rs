//! The engine that works everywhere: stop, read all of RAM, compare each page with the digest of what the site holds.
//! Promises: 16 bytes of digest per page, twice while a round is open; a guest's first memory goes out while it
//! runs, so that the pause stages only what changed since. Pause: RAM ÷ 5-10 GB/s. Called through [`MemoryEngine`].

mod drain;
#[cfg(test)]
mod tests;

use super::{
    Fitness, Held, MemoryEngine, MemoryError, RamImage, Staging, Target,
    group::{Gather, PageDigest, ZERO},
    known::Known,
    process_memory,
};
use lifeboat::{
    id::PointId,
    page::{PAGE, PageGroup},
    qemu::stream::RamBlock,
};
use std::collections::VecDeque;

/// Pages read at once: 4 MiB, large enough for full speed and small enough for a cache.
const CHUNK_PAGES: u64 = 1024;

/// See the module.
pub struct StopAndRead {
    /// What the site holds.
    held: Held,
    known: Option<Known>,
    staging: Staging,
    round: Option<Round>,
}

/// One cut being made.
struct Round {
    /// Per block, what the site will hold once the point has arrived.
    next: Vec<Vec<PageDigest>>,
    /// Places still to be read while the guest runs: block, first page.
    seed_from: VecDeque<(usize, u64)>,
    ready: VecDeque<PageGroup>,
    changed_pages: u64,
    drained: bool,
}

/// One round's tables and staging, in somebody else's hands; see [`StopAndRead::lend`].
pub(super) struct Lent {
    pub blocks: Vec<RamBlock>,
    /// Per block, what the site will hold once the point has arrived.
    pub next: Vec<Vec<PageDigest>>,
    pub seed: u64,
    pub staging: Staging,
}

impl StopAndRead {
    pub fn new(staging: Staging) -> Self {
        Self { held: Held::new(), known: None, staging, round: None }
    }

    /// Whether this engine can be used on a guest whose XML showed no obstacle.
    pub fn probe(target: &Target) -> Fitness {
        let mut byte = [0u8; 1];
        let ranges = process_memory::mapped_ranges(target.process);
        let readable = ranges.and_then(|ranges| match ranges.first() {
            Some((start, _)) => process_memory::read(target.process, *start, &mut byte),
            None => Err(MemoryError::Layout { what: "its process shows no memory".into() }),
        });
        match readable {
            Ok(()) => Fitness {
                usable: true,
                why: "works with every QEMU from 7.2 on; the pause grows with the guest's memory".into(),
            },
            Err(error) => Fitness {
                usable: false,
                why: format!("QEMU's memory can't be read ({error}); the agent needs CAP_SYS_PTRACE"),
            },
        }
    }

    fn look(&mut self, target: &Target) -> Result<&mut Known, MemoryError> {
        let known = Known::look(self.known.take(), target)?;
        Ok(self.known.insert(known))
    }

    /// Ends what is done while the guest runs: from here on the layout must not change.
    fn close(&mut self) -> Result<(), MemoryError> {
        let known = self.known.as_ref().ok_or(MemoryError::Order("no guest was looked at"))?;
        let round = self.round.as_mut().ok_or(MemoryError::Order("no round is open"))?;
        if round.drained || !round.ready.is_empty() || !round.seed_from.is_empty() {
            return Err(MemoryError::Order("drained before the running guest's pages were taken, or twice"));
        }
        known.check_layout()?;
        round.drained = true;
        Ok(())
    }

    /// Bytes of all memory blocks together, once a guest was looked at.
    pub(super) fn memory_bytes(&self) -> u64 {
        let blocks = self.known.iter().flat_map(|known| &known.layout.blocks);
        blocks.map(|placed| placed.block.bytes).sum()
    }

    /// Lends out what is needed to find changed pages in another way than by reading QEMU's process.
    pub(super) fn lend(&mut self) -> Result<Lent, MemoryError> {
        self.close()?;
        let known = self.known.as_ref().ok_or(MemoryError::Order("no guest was looked at"))?;
        let blocks = known.layout.blocks.iter().map(|placed| placed.block.clone()).collect();
        let round = self.round.as_mut().ok_or(MemoryError::Order("no round is open"))?;
        let next = std::mem::take(&mut round.next);
        Ok(Lent { blocks, next, seed: self.held.seed(), staging: self.staging.another() })
    }

    /// Takes it back, complete.
    pub(super) fn give_back(&mut self, lent: Lent, changed_pages: u64) -> Result<(), MemoryError> {
        let round = self.round()?;
        round.next = lent.next;
        round.changed_pages += changed_pages;
        self.staging = lent.staging;
        Ok(())
    }

    fn round(&mut self) -> Result<&mut Round, MemoryError> {
        self.round.as_mut().ok_or(MemoryError::Order("no round is open"))
    }

    /// Reads the next chunk of a first sync.
    fn seed_chunk(&mut self, block: usize, first: u64) -> Result<(), MemoryError> {
        let known = self.known.as_ref().ok_or(MemoryError::Order("no guest was looked at"))?;
        let round = self.round.as_mut().ok_or(MemoryError::Order("no round is open"))?;
        let table = &mut round.next[block];
        let end = (first + CHUNK_PAGES).min(table.len() as u64);
        let mut bytes = vec![0; (end - first) as usize * PAGE];
        known.read(block, first, &mut bytes)?;
        let mut emit = |group| round.ready.push_back(group);
        let mut gather = Gather::new(block as u16, &mut emit);
        let slots = &mut table[first as usize..end as usize];
        let changed = gather.compare(first, &bytes, slots, self.held.seed());
        gather.finish();
        round.changed_pages += changed;
        if end < table.len() as u64 {
            round.seed_from.push_front((block, end));
        }
        Ok(())
    }
}

impl MemoryEngine for StopAndRead {
    fn name(&self) -> &'static str {
        "stop-and-read"
    }

    fn begin(&mut self, target: &Target, basis: Option<PointId>) -> Result<Vec<RamImage>, MemoryError> {
        self.put_back();
        self.held.keep_only(basis);
        let known = self.look(target)?;
        let blocks: Vec<_> = known.layout.blocks.iter().map(|placed| placed.block.clone()).collect();
        let (mut images, mut next, mut seed_from) = (Vec::new(), Vec::new(), VecDeque::new());
        for (at, block) in blocks.into_iter().enumerate() {
            let pages = block.pages() as usize;
            let held = self.held.table(&block);
            let full = held.is_none();
            // In a full image a page that is not sent is zero.
            next.push(held.cloned().unwrap_or_else(|| vec![ZERO; pages]));
            if full && pages > 0 {
                seed_from.push_back((at, 0));
            }
            images.push(RamImage { block, full });
        }
        let ready = VecDeque::new();
        self.round = Some(Round { next, seed_from, ready, changed_pages: 0, drained: false });
        Ok(images)
    }

    fn before(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        loop {
            let round = self.round()?;
            if let Some(group) = round.ready.pop_front() {
                return Ok(Some(group));
            }
            let Some((block, first)) = round.seed_from.pop_front() else { return Ok(None) };
            self.seed_chunk(block, first)?;
        }
    }

    fn drain(&mut self) -> Result<(), MemoryError> {
        self.close()?;
        let known = self.known.as_ref().ok_or(MemoryError::Order("no guest was looked at"))?;
        let round = self.round.as_mut().ok_or(MemoryError::Order("no round is open"))?;
        round.changed_pages += drain::drain(known, &mut round.next, self.held.seed(), &mut self.staging)?;
        known.check_alive()
    }

    fn after(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        if !self.round()?.drained {
            return Err(MemoryError::Order("asked for staged pages before they were drained"));
        }
        self.staging.pop()
    }

    fn machine_config(&self) -> Vec<u8> {
        self.known.as_ref().map(|known| known.layout.head.config.clone()).unwrap_or_default()
    }

    fn changed_bytes(&self) -> u64 {
        self.round.as_ref().map_or(0, |round| round.changed_pages * PAGE as u64)
    }

    fn sent(&mut self, point: PointId) {
        let (Some(round), Some(known)) = (self.round.take(), self.known.as_ref()) else { return };
        if round.drained {
            let names = known.layout.blocks.iter().map(|placed| placed.block.name.clone());
            self.held.replace(point, names.zip(round.next));
        }
        self.staging.clear();
    }

    fn settle(&mut self, point: PointId) {
        self.held.durable(point);
    }

    fn put_back(&mut self) {
        self.round = None;
        self.staging.clear();
    }

    fn hand_over(&mut self) -> Held {
        self.put_back();
        std::mem::take(&mut self.held)
    }

    fn take_over(&mut self, held: Held) {
        self.put_back();
        self.held = held;
    }
}
