//! From byte ranges, as a server tells them, to whole pages. Pure.
//! Promises: every page of the range is told exactly once and in order; a page of which any part is wanted is told.
//! Called by `view`.

use lifeboat::page::PAGE;
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Must be read.
    Data,
    /// Wanted, and known to be zero.
    Zero,
    /// Not wanted.
    Skip,
}

/// `count` pages from `first` that are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub first: u64,
    pub count: u64,
    /// They need not be read.
    pub zero: bool,
}

/// Cuts consecutive byte ranges into segments of pages.
#[derive(Debug)]
pub(super) struct Pager {
    at: u64,
    end: u64,
    /// What the part before `at` of the page that holds `at` is, where `at` is within a page.
    partial: Option<Kind>,
}

impl Pager {
    /// For the bytes from `start`, which begins a page, to `end`, which ends one or the disk.
    pub fn new(start: u64, end: u64) -> Self {
        Self { at: start, end, partial: None }
    }

    /// The byte at which the next range begins.
    pub fn at(&self) -> u64 {
        self.at
    }

    pub fn is_done(&self) -> bool {
        self.at >= self.end
    }

    pub fn take(&mut self, bytes: u64, kind: Kind, out: &mut VecDeque<Segment>) {
        const PAGE_BYTES: u64 = PAGE as u64;
        let end = self.at.saturating_add(bytes).min(self.end);
        if let Some(before) = self.partial {
            let page = self.at / PAGE_BYTES;
            let page_end = ((page + 1) * PAGE_BYTES).min(self.end);
            let kind = if before == kind { kind } else { Kind::Data };
            if end < page_end {
                self.partial = Some(kind);
                self.at = end;
                return;
            }
            push(out, kind, page, 1);
            self.partial = None;
            self.at = page_end;
        }
        let first = self.at.div_ceil(PAGE_BYTES);
        let last = if end == self.end { end.div_ceil(PAGE_BYTES) } else { end / PAGE_BYTES };
        push(out, kind, first, last.saturating_sub(first));
        if end < self.end && !end.is_multiple_of(PAGE_BYTES) {
            self.partial = Some(kind);
        }
        self.at = end.max(self.at);
    }
}

fn push(out: &mut VecDeque<Segment>, kind: Kind, first: u64, count: u64) {
    if count == 0 || kind == Kind::Skip {
        return;
    }
    let zero = kind == Kind::Zero;
    match out.back_mut() {
        Some(last) if last.first + last.count == first && last.zero == zero => last.count += count,
        _ => out.push_back(Segment { first, count, zero }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Goal: no page of any disk is lost or told twice. Method: compare with a judgement byte by byte (in sectors).
        #[test]
        fn every_page_is_told_once_as_what_all_its_bytes_are(
            ranges in prop::collection::vec((1u64..40, 0usize..3), 1..40),
        ) {
            let kinds = [Kind::Data, Kind::Zero, Kind::Skip];
            let sectors: Vec<Kind> =
                ranges.iter().flat_map(|(n, kind)| std::iter::repeat_n(kinds[*kind], *n as usize)).collect();
            let mut pager = Pager::new(0, sectors.len() as u64 * 512);
            let mut out = VecDeque::new();
            for (n, kind) in &ranges {
                prop_assert!(!pager.is_done());
                pager.take(n * 512, kinds[*kind], &mut out);
            }
            prop_assert!(pager.is_done());
            let mut told = vec![Kind::Skip; sectors.len().div_ceil(8)];
            for segment in &out {
                for page in segment.first..segment.first + segment.count {
                    prop_assert_eq!(told[page as usize], Kind::Skip);
                    told[page as usize] = if segment.zero { Kind::Zero } else { Kind::Data };
                }
            }
            for (page, sectors) in sectors.chunks(8).enumerate() {
                let same = sectors.iter().all(|kind| *kind == sectors[0]);
                prop_assert_eq!(told[page], if same { sectors[0] } else { Kind::Data });
            }
        }
    }
}
