//! The part inside the pause: all of memory read and compared, on as many cores as pay.
//! Promises: returns only when every page has been compared; on error the round is worthless and says so.

use super::CHUNK_PAGES;
use crate::capture::memory::{
    MemoryError, Staging,
    group::{Gather, PageDigest},
    known::Known,
};
use lifeboat::page::PAGE;
use std::sync::{Mutex, PoisonError};

/// Threads at the most. Memory bandwidth, not cores, is what ends.
const THREADS_MAX: usize = 8;
/// Pages below which a thread costs more than it brings.
const PAGES_PER_THREAD: u64 = 4096;
/// Chunks that a thread takes at once, so that groups are full and neighbours stay together.
const CHUNKS_AT_ONCE: usize = 8;

/// Neighbouring pages of one block: block, first page, digests.
type Piece<'a> = (usize, u64, &'a mut [PageDigest]);

/// Compares everything with `next`, stages what differs, and returns how many pages that were.
pub fn drain(
    known: &Known,
    next: &mut [Vec<PageDigest>],
    seed: u64,
    staging: &mut Staging,
) -> Result<u64, MemoryError> {
    let pages: u64 = next.iter().map(|table| table.len() as u64).sum();
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let threads = cores.min((pages / PAGES_PER_THREAD) as usize).max(1);
    let piece_pages = CHUNK_PAGES as usize * CHUNKS_AT_ONCE;
    let pieces: Vec<Piece> = next
        .iter_mut()
        .enumerate()
        .flat_map(|(block, table)| {
            let firsts = (0u64..).step_by(piece_pages);
            firsts.zip(table.chunks_mut(piece_pages)).map(move |(first, digests)| (block, first, digests))
        })
        .collect();
    let (work, staging) = (Mutex::new(pieces.into_iter()), Mutex::new(staging));
    let worker = || {
        let mut changed = 0;
        let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE];
        loop {
            let piece = work.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(piece) = piece else { return Ok(changed) };
            changed += compare_piece(known, piece, seed, &mut buffer, &staging)?;
        }
    };
    if threads == 1 {
        return worker();
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut changed = 0;
        for worker in workers {
            changed += worker.join().map_err(|_| MemoryError::Order("a reading thread panicked"))??;
        }
        Ok(changed)
    })
}

fn compare_piece(
    known: &Known,
    (block, first, digests): Piece,
    seed: u64,
    buffer: &mut [u8],
    staging: &Mutex<&mut Staging>,
) -> Result<u64, MemoryError> {
    let mut failed = None;
    let mut emit = |group| {
        let pushed = staging.lock().unwrap_or_else(PoisonError::into_inner).push(group);
        failed = failed.take().or(pushed.err());
    };
    let mut gather = Gather::new(block as u16, &mut emit);
    let mut changed = 0;
    for (first, digests) in
        (first..).step_by(CHUNK_PAGES as usize).zip(digests.chunks_mut(CHUNK_PAGES as usize))
    {
        let bytes = &mut buffer[..digests.len() * PAGE];
        known.read(block, first, bytes)?;
        changed += gather.compare(first, bytes, digests, seed);
    }
    gather.finish();
    failed.map_or(Ok(changed), Err)
}
