//! One block in one round: which of its pages must still be looked at, and looking at them.
//! Promises: a page that the kernel flagged, that is owed, or that lost its contents unflagged, is always among them;
//! flags that are about to be cleared are first noted as owed. Parts of a sheet can be worked on side by side.

use super::{
    flags::{Entry, PageFlags},
    pages::{PageSet, WORD, runs},
};
use crate::capture::memory::{
    MemoryError,
    group::{Gather, PageDigest, ZERO},
    known::Known,
    process_memory,
};
use lifeboat::page::PAGE;
use std::ops::Range;

/// Pages in a part: 8 MiB.
pub const PART_PAGES: usize = 2048;
/// Pages read at once.
const READ_PAGES: u64 = 512;

/// How a block is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// By the kernel's flags, from this address on.
    Flags { address: u64 },
    /// Not at all: it is read whole each time.
    Nothing,
    /// It has no address, and changes only when the head is read anew.
    Head,
}

pub struct Sheet {
    pub block: usize,
    pub watch: Watch,
    /// What the site will hold once the point has arrived.
    pub next: Vec<PageDigest>,
    /// Pages whose flags were cleared, or never told, since they were last compared in this round.
    pub todo: PageSet,
    /// Pages compared in this round since flags were last cleared; those that are flagged may have changed again.
    pub read: PageSet,
    /// Pages whose flags were cleared since the point that the site holds. Outlives the round.
    pub owed: PageSet,
}

/// Neighbouring pages of a sheet.
pub struct Part<'a> {
    block: usize,
    watch: Watch,
    first: u64,
    next: &'a mut [PageDigest],
    todo: &'a mut [u64],
    read: &'a mut [u64],
    owed: &'a mut [u64],
}

/// What the kernel said of a part.
pub struct Seen {
    /// Pages to read.
    pub look: Vec<u64>,
    /// Written since the flags were cleared.
    pub flagged: Vec<u64>,
    /// Flagged pages that are the process's own.
    pub flagged_own: u64,
    /// Nothing is there.
    gone: Vec<u64>,
}

impl Sheet {
    pub fn parts(&mut self) -> impl Iterator<Item = Part<'_>> {
        let (block, watch) = (self.block, self.watch);
        let words = PART_PAGES / WORD;
        let firsts = (0u64..).step_by(PART_PAGES);
        let sets = self.todo.words_mut().chunks_mut(words).zip(self.read.words_mut().chunks_mut(words));
        let sets = sets.zip(self.owed.words_mut().chunks_mut(words));
        let tables = self.next.chunks_mut(PART_PAGES).zip(sets);
        firsts.zip(tables).map(move |(first, (next, ((todo, read), owed)))| Part {
            block,
            watch,
            first,
            next,
            todo,
            read,
            owed,
        })
    }
}

impl Part<'_> {
    /// Asks the kernel. While the guest runs, what was read already is left for the pause, and so are pages that
    /// are gone: they may be back the next moment.
    pub fn see(
        &self,
        flags: &dyn PageFlags,
        stopped: bool,
        entries: &mut Vec<Entry>,
    ) -> Result<Seen, MemoryError> {
        let none = || vec![0; self.todo.len()];
        let mut seen = Seen { look: self.todo.to_vec(), flagged: none(), flagged_own: 0, gone: none() };
        let address = match self.watch {
            Watch::Head => return Ok(seen),
            Watch::Nothing => {
                if stopped {
                    seen.look = PageSet::all(self.next.len()).words().to_vec();
                }
                return Ok(seen);
            }
            Watch::Flags { address } => address + self.first * PAGE as u64,
        };
        entries.resize(self.next.len(), Entry(0));
        flags.read(address, entries)?;
        for (at, (entry, next)) in entries.iter().zip(&*self.next).enumerate() {
            let (word, bit) = (at / WORD, 1u64 << (at % WORD));
            if entry.is_gone() {
                seen.gone[word] |= bit;
                seen.look[word] &= !bit;
                continue;
            }
            let flagged = entry.is_written();
            if flagged {
                seen.flagged[word] |= bit;
                seen.flagged_own += u64::from(!entry.is_shared());
            }
            // Its own page went without a flag, and the kernel's zeros came: a page given back and then read.
            let suspect = entry.is_shared() && *next != ZERO;
            if (flagged || suspect) && (stopped || self.read[word] & bit == 0) {
                seen.look[word] |= bit;
            }
        }
        Ok(seen)
    }

    /// Reads and compares what `seen` told to. Returns how many pages differed.
    pub fn compare(
        &mut self,
        known: &Known,
        seen: &Seen,
        seed: u64,
        buffer: &mut Vec<u8>,
        gather: &mut Gather,
    ) -> Result<u64, MemoryError> {
        let mut changed = 0;
        let mut batch: Vec<Range<u64>> = Vec::new();
        let mut batched = 0;
        for run in runs(&seen.look, self.first, READ_PAGES) {
            let pages = run.end - run.start;
            if batched + pages > READ_PAGES {
                changed += self.compare_batch(known, &batch, seed, buffer, gather)?;
                batch.clear();
                batched = 0;
            }
            batched += pages;
            batch.push(run);
        }
        changed += self.compare_batch(known, &batch, seed, buffer, gather)?;
        Ok(changed)
    }

    fn compare_batch(
        &mut self,
        known: &Known,
        batch: &[Range<u64>],
        seed: u64,
        buffer: &mut Vec<u8>,
        gather: &mut Gather,
    ) -> Result<u64, MemoryError> {
        let pages: u64 = batch.iter().map(|run| run.end - run.start).sum();
        buffer.resize(pages as usize * PAGE, 0);
        match self.watch {
            Watch::Flags { address } => {
                process_memory::read_runs(known.target.process, address, batch, buffer)?;
            }
            Watch::Nothing | Watch::Head => {
                let mut into = &mut buffer[..];
                for run in batch {
                    let (part, rest) = into.split_at_mut((run.end - run.start) as usize * PAGE);
                    known.read(self.block, run.start, part)?;
                    into = rest;
                }
            }
        }
        let (mut changed, mut at) = (0, 0);
        for run in batch {
            let len = (run.end - run.start) as usize;
            let slots = (run.start - self.first) as usize..(run.end - self.first) as usize;
            let bytes = &buffer[at * PAGE..(at + len) * PAGE];
            changed += gather.compare(run.start, bytes, &mut self.next[slots.clone()], seed);
            for page in slots {
                self.todo[page / WORD] &= !(1 << (page % WORD));
                self.read[page / WORD] |= 1 << (page % WORD);
            }
            at += len;
        }
        Ok(changed)
    }

    /// Tells the site of pages that are gone: they hold zeros. Only of a stopped guest. Returns how many that changed.
    pub fn let_go(&mut self, seen: &Seen, gather: &mut Gather) -> u64 {
        let mut changed = 0;
        for page in runs(&seen.gone, self.first, u64::from(u32::MAX)).flatten() {
            let slot = (page - self.first) as usize;
            changed += gather.gone(page, &mut self.next[slot]);
            self.todo[slot / WORD] &= !(1 << (slot % WORD));
        }
        changed
    }

    /// The flags of this part are about to be cleared: what they say is owed from now on.
    pub fn owe(&mut self, seen: &Seen) {
        self.owed.iter_mut().zip(&seen.flagged).for_each(|(owed, flagged)| *owed |= flagged);
    }

    /// As `owe`, in the middle of a round: what was read is no longer in doubt, but for what is flagged.
    pub fn owe_and_read_again(&mut self, seen: &Seen) {
        self.owe(seen);
        self.todo.iter_mut().zip(&seen.flagged).for_each(|(todo, flagged)| *todo |= flagged);
        self.read.fill(0);
    }

    pub fn block(&self) -> usize {
        self.block
    }

    /// The address of a page that is flagged and the process's own.
    pub fn witness(&self, entries: &[Entry]) -> Option<u64> {
        let Watch::Flags { address } = self.watch else { return None };
        let own = |entry: &Entry| entry.is_written() && !entry.is_gone() && !entry.is_shared();
        let at = entries.iter().position(own)?;
        Some(address + (self.first + at as u64) * PAGE as u64)
    }
}
