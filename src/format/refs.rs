//! What a frame of references says: per page, in which RAM image of the same point its content stands, and on which page
//! of it, with a check of the content. Promises: [`RefView::of`] accepts only lists of the right length. Where the
//! references point is for whoever knows the point's images to judge. Pure.
//!
//! Layout (little-endian) for n pages: `checks n × u64 │ source pages n × u64 │ source images n × u16`.

use crate::{
    format::frame::bounds::{FrameError, MADE_PAGES_MAX},
    page::PageRun,
};
use bytes::Bytes;

/// Bytes that a page takes.
pub const PER_PAGE: usize = 8 + 8 + 2;

/// Where a page's content stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRef {
    /// Of the content.
    pub check: u64,
    /// Number of a RAM image within the same point.
    pub image: u16,
    pub page: u64,
}

/// References of some pages of one image, ready to be sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefList {
    pub image: u16,
    pub runs: Vec<PageRun>,
    pub raw: Bytes,
}

impl RefList {
    /// A list of `refs`, by page, which may come in any order, each page once; at most [`MADE_PAGES_MAX`].
    pub fn of(image: u16, mut refs: Vec<(u64, PageRef)>) -> Self {
        refs.sort_unstable_by_key(|(page, _)| *page);
        let mut raw = Vec::with_capacity(refs.len() * PER_PAGE);
        let mut runs = Vec::new();
        for (page, to) in &refs {
            PageRun::push_page(&mut runs, *page);
            raw.extend_from_slice(&to.check.to_le_bytes());
        }
        refs.iter().for_each(|(_, to)| raw.extend_from_slice(&to.page.to_le_bytes()));
        refs.iter().for_each(|(_, to)| raw.extend_from_slice(&to.image.to_le_bytes()));
        Self { image, runs, raw: raw.into() }
    }

    pub fn pages(&self) -> usize {
        self.runs.iter().map(|run| run.count as usize).sum()
    }
}

/// A list that was found whole.
#[derive(Clone, Copy, Debug)]
pub struct RefView<'a> {
    raw: &'a [u8],
    pages: usize,
}

impl<'a> RefView<'a> {
    pub fn of(pages: usize, raw: &'a [u8]) -> Result<Self, FrameError> {
        let whole = pages <= MADE_PAGES_MAX && is_as_long(pages as u64, raw.len() as u64);
        if whole { Ok(Self { raw, pages }) } else { Err(MALFORMED) }
    }

    /// Where page number `at` of the list stands.
    pub fn get(&self, at: usize) -> PageRef {
        let u64_at = |from: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.raw[from..from + 8]);
            u64::from_le_bytes(bytes)
        };
        let image = self.pages * 16 + at * 2;
        PageRef {
            check: u64_at(at * 8),
            page: u64_at(self.pages * 8 + at * 8),
            image: u16::from_le_bytes([self.raw[image], self.raw[image + 1]]),
        }
    }

    pub fn iter(self) -> impl Iterator<Item = PageRef> {
        (0..self.pages).map(move |at| self.get(at))
    }
}

/// Whether `raw` is a whole list for `pages` pages.
pub(super) fn check(pages: usize, raw: &[u8]) -> Result<(), FrameError> {
    RefView::of(pages, raw).map(drop)
}

pub(super) fn is_as_long(pages: u64, len: u64) -> bool {
    pages > 0 && pages.checked_mul(PER_PAGE as u64) == Some(len)
}

const MALFORMED: FrameError = FrameError::Malformed("its list of references is not whole");
