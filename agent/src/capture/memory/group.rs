//! Finding changed pages by their digests, and gathering them into groups for the pipeline.
//! Promises: groups hold at most [`GROUP_PAGES`] pages of one image in page order; zero pages travel without bytes.

use bytes::BytesMut;
use lifeboat::{
    format::frame::RUNS_MAX,
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, is_zero},
};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// What a page is known to hold. Seeded per process, so that a guest can't prepare two pages that look the same.
pub type PageDigest = u128;
/// Digest of a page of zeros, which is also what a full image holds where nothing was sent.
pub const ZERO: PageDigest = 0;

pub fn digest(page: &[u8], seed: u64) -> PageDigest {
    if is_zero(page) { ZERO } else { xxh3_128_with_seed(page, seed).max(1) }
}

/// Gathers the changed pages of one image.
pub struct Gather<'a> {
    image: u16,
    runs: Vec<PageRun>,
    bytes: BytesMut,
    zero_runs: Vec<PageRun>,
    emit: &'a mut dyn FnMut(PageGroup),
}

impl<'a> Gather<'a> {
    pub fn new(image: u16, emit: &'a mut dyn FnMut(PageGroup)) -> Self {
        Self { image, runs: Vec::new(), bytes: BytesMut::new(), zero_runs: Vec::new(), emit }
    }

    /// Takes those of `pages` (from page `first` on) whose digests differ from `known`, and notes their new digests.
    /// Returns how many differed.
    pub fn compare(&mut self, first: u64, pages: &[u8], known: &mut [PageDigest], seed: u64) -> u64 {
        let mut changed = 0;
        for (page, (bytes, known)) in (first..).zip(pages.chunks_exact(PAGE).zip(known)) {
            let now = digest(bytes, seed);
            if now != *known {
                *known = now;
                changed += 1;
                if now == ZERO { self.zero(page) } else { self.page(page, bytes) }
            }
        }
        changed
    }

    /// Takes a page of which is known, without reading it, that it holds zeros. Returns how many pages that changed.
    pub fn gone(&mut self, page: u64, known: &mut PageDigest) -> u64 {
        let changed = *known != ZERO;
        if changed {
            *known = ZERO;
            self.zero(page);
        }
        u64::from(changed)
    }

    /// Takes one page that is known to differ; `None` is a page of zeros. Pages come in order.
    pub fn put(&mut self, page: u64, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.page(page, bytes),
            None => self.zero(page),
        }
    }

    fn page(&mut self, page: u64, bytes: &[u8]) {
        PageRun::push_page(&mut self.runs, page);
        if self.bytes.is_empty() {
            self.bytes.reserve(GROUP_PAGES * PAGE);
        }
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= GROUP_PAGES * PAGE {
            self.flush_pages();
        }
    }

    fn zero(&mut self, page: u64) {
        PageRun::push_page(&mut self.zero_runs, page);
        if self.zero_runs.len() >= RUNS_MAX {
            self.flush_zeros();
        }
    }

    fn flush_pages(&mut self) {
        if !self.runs.is_empty() {
            let content = Content::Bytes(self.bytes.split().freeze());
            let runs = std::mem::take(&mut self.runs);
            (self.emit)(PageGroup { image: self.image, runs, content });
        }
    }

    fn flush_zeros(&mut self) {
        if !self.zero_runs.is_empty() {
            let runs = std::mem::take(&mut self.zero_runs);
            (self.emit)(PageGroup { image: self.image, runs, content: Content::Zero });
        }
    }

    pub fn finish(mut self) {
        self.flush_pages();
        self.flush_zeros();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn apply(image: &mut [u8], groups: &[PageGroup]) {
        for group in groups {
            let mut at = 0;
            for page in group.runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count)) {
                let place = page as usize * PAGE..(page as usize + 1) * PAGE;
                match &group.content {
                    Content::Zero => image[place].fill(0),
                    Content::Bytes(bytes) => {
                        image[place].copy_from_slice(&bytes[at..at + PAGE]);
                        at += PAGE;
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn groups_turn_what_was_held_into_what_is(
            held in prop::collection::vec(0u8..3, 200), now in prop::collection::vec(0u8..3, 200), seed: u64,
        ) {
            let spread = |pages: &[u8]| pages.iter().flat_map(|byte| [*byte; PAGE]).collect::<Vec<u8>>();
            let (mut held, now) = (spread(&held), spread(&now));
            let mut known: Vec<_> = held.chunks(PAGE).map(|page| digest(page, seed)).collect();
            let mut groups = Vec::new();
            let mut emit = |group| groups.push(group);
            let mut gather = Gather::new(3, &mut emit);
            let changed = gather.compare(0, &now, &mut known, seed);
            gather.finish();
            prop_assert!(groups.iter().all(|group| group.image == 3));
            prop_assert!(groups.iter().all(|group| group.content == Content::Zero || group.pages() <= GROUP_PAGES as u64));
            prop_assert_eq!(groups.iter().map(PageGroup::pages).sum::<u64>(), changed);
            apply(&mut held, &groups);
            prop_assert!(held == now);
        }
    }
}
