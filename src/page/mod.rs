//! Pages, runs of pages, and groups of changed pages: the unit in which memory and disks alike are captured and stored.
//! Promises: pure values; a run never wraps and never exceeds its bounds once checked. Used by capture, frames, restore.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Bytes in a page. Guest memory and disks are both cut into these.
pub const PAGE: usize = 4096;
/// Pages in one group at the most: 256 KiB, large enough for blake3 and zstd to run at their best.
pub const GROUP_PAGES: usize = 64;

/// Number of pages that hold `bytes` bytes.
pub const fn pages_for(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE as u64)
}

/// `count` pages from page number `first` of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRun {
    pub first: u64,
    pub count: u32,
}

impl PageRun {
    pub const fn new(first: u64, count: u32) -> Self {
        Self { first, count }
    }
    /// One past the last page; `None` if the run is empty or would wrap.
    pub fn end(&self) -> Option<u64> {
        if self.count == 0 { None } else { self.first.checked_add(u64::from(self.count)) }
    }
    pub fn bytes(&self) -> u64 {
        u64::from(self.count) * PAGE as u64
    }
    /// Appends `page` to `runs`, extending the last run where it is adjacent.
    pub fn push_page(runs: &mut Vec<Self>, page: u64) {
        match runs.last_mut() {
            Some(last) if last.first + u64::from(last.count) == page && last.count < u32::MAX => {
                last.count += 1
            }
            _ => runs.push(Self::new(page, 1)),
        }
    }
}

/// Changed pages of one image, in page order, on their way to the site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageGroup {
    /// Number of the image within its point.
    pub image: u16,
    pub runs: Vec<PageRun>,
    pub content: Content,
}

/// What the pages of a group hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The runs' bytes one after the other: `runs` × 4096 bytes, at most [`GROUP_PAGES`] pages.
    Bytes(Bytes),
    /// Every page of the runs is zero.
    Zero,
}

impl PageGroup {
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count)).sum()
    }
}

/// Whether a page holds only zeros.
pub fn is_zero(page: &[u8]) -> bool {
    // The compiler turns this into wide compares; a chunk at a time, so that a non-zero page is told early.
    page.chunks(128).all(|chunk| chunk.iter().fold(0u8, |acc, byte| acc | byte) == 0)
}
