//! What is done while the guest is stopped: all flags looked at, pages read and compared, flags cleared; on as many
//! cores as pay. Promises: flags are cleared only after each has been noted as owed, and only if all went well.

use super::{
    flags::PageFlags,
    sheet::{PART_PAGES, Part, Sheet},
};
use crate::capture::memory::{MemoryError, Staging, group::Gather, known::Known};
use lifeboat::{fault, page::PageGroup};
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Threads at the most.
const THREADS_MAX: usize = 8;
/// Pages below which a thread costs more than it brings.
const PAGES_PER_THREAD: usize = 64 << 10;

/// What was done, and how long that took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub changed: u64,
    pub flagged: u64,
    pub read: u64,
    pub threads: usize,
    /// Of the threads together.
    pub looking: Duration,
    pub comparing: Duration,
    pub clearing: Duration,
}

impl Done {
    fn add(&mut self, other: &Self) {
        self.changed += other.changed;
        self.flagged += other.flagged;
        self.read += other.read;
        self.looking += other.looking;
        self.comparing += other.comparing;
    }
}

type Queue<'q, 'a> = Mutex<&'q mut (dyn Iterator<Item = Part<'a>> + Send)>;

/// Compares whatever may have changed, stages what did, and clears the flags.
pub fn drain(
    known: &Known,
    flags: &dyn PageFlags,
    sheets: &mut [Sheet],
    seed: u64,
    staging: &mut Staging,
) -> Result<Done, MemoryError> {
    let staging = Mutex::new(staging);
    let done = on_all_cores(sheets, |queue| drain_parts(known, flags, queue, seed, &staging))?;
    fault::point("cut.pages-compared");
    cleared(flags, done)
}

/// Only notes what is flagged as owed and to be read once more, and clears the flags.
pub fn note_and_clear(flags: &dyn PageFlags, sheets: &mut [Sheet]) -> Result<Done, MemoryError> {
    let done = on_all_cores(sheets, |queue| {
        let (mut done, mut entries) = (Done::default(), Vec::new());
        let started = Instant::now();
        while let Some(mut part) = take(queue) {
            let seen = part.see(flags, true, &mut entries)?;
            done.flagged += seen.flagged_own;
            part.owe_and_read_again(&seen);
        }
        done.looking = started.elapsed();
        Ok(done)
    })?;
    cleared(flags, done)
}

fn cleared(flags: &dyn PageFlags, mut done: Done) -> Result<Done, MemoryError> {
    let started = Instant::now();
    flags.clear()?;
    done.clearing = started.elapsed();
    fault::point("cut.flags-cleared");
    Ok(done)
}

fn take<'a>(queue: &Queue<'_, 'a>) -> Option<Part<'a>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).next()
}

fn on_all_cores(
    sheets: &mut [Sheet],
    work: impl Fn(&Queue) -> Result<Done, MemoryError> + Sync,
) -> Result<Done, MemoryError> {
    let pages: usize = sheets.iter().map(|sheet| sheet.next.len()).sum();
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let threads = cores.min(pages / PAGES_PER_THREAD).max(1);
    let mut parts = sheets.iter_mut().flat_map(Sheet::parts);
    let queue: Queue = Mutex::new(&mut parts);
    let mut done = Done { threads, ..Done::default() };
    if threads == 1 {
        done.add(&work(&queue)?);
        return Ok(done);
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work(&queue))).collect();
        for worker in workers {
            done.add(&worker.join().map_err(|_| MemoryError::Order("a reading thread panicked"))??);
        }
        Ok(done)
    })
}

/// Works until the queue is empty. Groups are gathered over the parts of a block, so that they are full.
fn drain_parts(
    known: &Known,
    flags: &dyn PageFlags,
    queue: &Queue,
    seed: u64,
    staging: &Mutex<&mut Staging>,
) -> Result<Done, MemoryError> {
    let (mut done, mut entries, mut buffer) = (Done::default(), Vec::with_capacity(PART_PAGES), Vec::new());
    let mut next = take(queue);
    while let Some(block) = next.as_ref().map(Part::block) {
        let (mut failed, mut failed_too) = (None, None);
        let stage = |group: PageGroup, failed: &mut Option<MemoryError>| {
            let pushed = staging.lock().unwrap_or_else(PoisonError::into_inner).push(group);
            *failed = failed.take().or(pushed.err());
        };
        let (mut emit, mut emit_gone) =
            (|group| stage(group, &mut failed), |group| stage(group, &mut failed_too));
        let mut gather = Gather::new(block as u16, &mut emit);
        let mut gather_gone = Gather::new(block as u16, &mut emit_gone);
        while let Some(mut part) = next.take_if(|part| part.block() == block) {
            let started = Instant::now();
            let seen = part.see(flags, true, &mut entries)?;
            part.owe(&seen);
            done.changed += part.let_go(&seen, &mut gather_gone);
            let looked = Instant::now();
            done.changed += part.compare(known, &seen, seed, &mut buffer, &mut gather)?;
            done.flagged += seen.flagged_own;
            done.read += seen.look.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            done.looking += looked - started;
            done.comparing += looked.elapsed();
            next = take(queue);
        }
        gather_gone.finish();
        gather.finish();
        if let Some(error) = failed.or(failed_too) {
            return Err(error);
        }
    }
    Ok(done)
}
