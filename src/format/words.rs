//! What a frame of words says: per page, which of its 512 words changed, what they are now, and a check of the page
//! that results. Promises: [`WordView::of`] accepts only lists that are whole, so that applying one can't fail or reach
//! beyond a page; a list has the length that its bitmaps tell, at most [`RAW_MAX`] bytes. Pure.
//!
//! Layout (little-endian) for n pages: `checks n × u64 │ bitmaps n × 64 bytes │ changed words, u64 each, page by page`.
//! Bit b of byte i of a bitmap stands for the word at byte 8·(8·i + b) of the page. Words are given as they are now, not
//! as a difference: applying twice does no harm, and two lists over each other are one without knowing what is below.

use crate::{
    chunk::digest::page_check,
    format::frame::bounds::{FrameError, MADE_PAGES_MAX, RAW_MAX},
    page::{PAGE, PageRun},
};
use bytes::Bytes;
use std::ops::Range;

/// Bytes in a word.
pub const WORD: usize = 8;
/// Words in a page.
pub const WORDS: usize = PAGE / WORD;
const BITMAP: usize = WORDS / 8;
const CHECK: usize = 8;
/// Bytes that a page takes besides its words.
pub const PER_PAGE: usize = CHECK + BITMAP;

/// Changed words of some pages of one image, ready to be sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WordList {
    pub image: u16,
    pub runs: Vec<PageRun>,
    pub raw: Bytes,
}

impl WordList {
    pub fn pages(&self) -> usize {
        self.runs.iter().map(|run| run.count as usize).sum()
    }
}

/// The words of one page that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageWords {
    check: u64,
    bitmap: [u8; BITMAP],
    words: Vec<u8>,
}

impl PageWords {
    /// What turns `old` into `new`, two whole pages; `None` if more than `most` words differ.
    pub fn between(old: &[u8], new: &[u8], most: usize) -> Option<Self> {
        let mut bitmap = [0; BITMAP];
        let (mut words, mut count) = (Vec::new(), 0);
        for (byte, (old, new)) in
            bitmap.iter_mut().zip(old.chunks_exact(8 * WORD).zip(new.chunks_exact(8 * WORD)))
        {
            // Most stretches are equal, and a compare of 64 bytes is one or two instructions.
            if old == new {
                continue;
            }
            for (bit, (old, new)) in old.chunks_exact(WORD).zip(new.chunks_exact(WORD)).enumerate() {
                if old != new {
                    *byte |= 1 << bit;
                    count += 1;
                    words.extend_from_slice(new);
                }
            }
            if count > most {
                return None;
            }
        }
        Some(Self { check: page_check(new), bitmap, words })
    }

    /// Of the page as it is now.
    pub fn check(&self) -> u64 {
        self.check
    }

    /// Words that changed.
    pub fn count(&self) -> usize {
        self.words.len() / WORD
    }

    /// Bytes that it takes in a list.
    pub fn len(&self) -> usize {
        PER_PAGE + self.words.len()
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

/// Gathers pages into one list. They may come in any order, each once.
#[derive(Debug, Default)]
pub struct WordsBuilder {
    pages: Vec<(u64, PageWords)>,
    bytes: usize,
}

impl WordsBuilder {
    /// Whether a page of `len` bytes still fits.
    pub fn fits(&self, len: usize) -> bool {
        self.pages.len() < MADE_PAGES_MAX && self.bytes + len <= RAW_MAX
    }

    /// Adds a page; check [`Self::fits`] first.
    pub fn push(&mut self, page: u64, words: PageWords) {
        self.bytes += words.len();
        self.pages.push((page, words));
    }

    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Bytes of the list so far.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The list of all pages, in their order; leaves none.
    pub fn finish(&mut self, image: u16) -> WordList {
        let mut pages = std::mem::take(&mut self.pages);
        pages.sort_unstable_by_key(|(page, _)| *page);
        let mut raw = Vec::with_capacity(self.bytes);
        self.bytes = 0;
        let mut runs = Vec::new();
        for (page, words) in &pages {
            PageRun::push_page(&mut runs, *page);
            raw.extend_from_slice(&words.check.to_le_bytes());
        }
        pages.iter().for_each(|(_, words)| raw.extend_from_slice(&words.bitmap));
        pages.iter().for_each(|(_, words)| raw.extend_from_slice(&words.words));
        WordList { image, runs, raw: raw.into() }
    }
}

/// A list that was found whole.
#[derive(Debug)]
pub struct WordView<'a> {
    raw: &'a [u8],
    /// Per page, where its words stand.
    words: Vec<Range<usize>>,
}

impl<'a> WordView<'a> {
    pub fn of(pages: usize, raw: &'a [u8]) -> Result<Self, FrameError> {
        if raw.len() > RAW_MAX || !may_be_as_long(pages as u64, raw.len() as u64) {
            return Err(MALFORMED);
        }
        let mut at = pages * PER_PAGE;
        let mut words = Vec::with_capacity(pages);
        for bitmap in raw[pages * CHECK..pages * PER_PAGE].chunks_exact(BITMAP) {
            let changed: u32 = bitmap.iter().map(|byte| byte.count_ones()).sum();
            let end = at + changed as usize * WORD;
            words.push(at..end);
            at = end;
        }
        if at == raw.len() { Ok(Self { raw, words }) } else { Err(MALFORMED) }
    }

    /// The check of what page number `at` of the list is to become.
    pub fn check(&self, at: usize) -> u64 {
        let mut check = [0; CHECK];
        check.copy_from_slice(&self.raw[at * CHECK..(at + 1) * CHECK]);
        u64::from_le_bytes(check)
    }

    /// Puts the changed words of page number `at` of the list into `page`.
    pub fn apply(&self, at: usize, page: &mut [u8]) {
        let bitmaps = self.words.len() * CHECK;
        let bitmap = &self.raw[bitmaps + at * BITMAP..bitmaps + (at + 1) * BITMAP];
        let mut words = self.raw[self.words[at].clone()].chunks_exact(WORD);
        for (byte, block) in bitmap.iter().zip(page.chunks_exact_mut(8 * WORD)) {
            let mut left = *byte;
            while left != 0 {
                let bit = left.trailing_zeros() as usize;
                left &= left - 1;
                if let Some(word) = words.next() {
                    block[bit * WORD..(bit + 1) * WORD].copy_from_slice(word);
                }
            }
        }
    }
}

/// Whether `raw` is a whole list for `pages` pages.
pub(super) fn check(pages: usize, raw: &[u8]) -> Result<(), FrameError> {
    WordView::of(pages, raw).map(drop)
}

pub(super) fn may_be_as_long(pages: u64, len: u64) -> bool {
    let least = pages.saturating_mul(PER_PAGE as u64);
    let most = least.saturating_add(pages.saturating_mul(PAGE as u64)).min(RAW_MAX as u64);
    pages > 0 && (least..=most).contains(&len) && (len - least).is_multiple_of(WORD as u64)
}

const MALFORMED: FrameError = FrameError::Malformed("its list of changed words is not whole");
