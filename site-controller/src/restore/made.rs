//! Pages that are put together from several frames: a base, changed words over it, references.
//! Promises: whatever a frame makes of a page is compared with that frame's check (I-6); at most [`BATCH_PAGES`] of them
//! and one segment of a pack are in memory at once. Called by `plan`, `read` and `chains`.

use super::planned::{GAP_MAX, PlannedFrame, SEGMENT, Use};
use lifeboat::{
    chunk::digest::page_check,
    format::{
        frame::{Codec, FrameError, FrameHead},
        refs::RefView,
        words::WordView,
    },
    page::PAGE,
};
use std::ops::Range;

/// Page `page` of an image takes something from page number `raw_page` of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub page: u64,
    pub frame: u32,
    pub raw_page: u32,
}

/// Pages put together at once: 8 MiB.
pub(super) const BATCH_PAGES: usize = 2048;
/// Steps of one batch, unless a single page takes more.
pub(super) const BATCH_STEPS: usize = 64 << 10;

/// Takes `made` (ascending) out of `whole`; what is left goes to `uses`. Returns the pages taken out.
pub(super) fn without<'a>(
    whole: Use,
    made: &'a [u64],
    uses: &mut Vec<Use>,
) -> impl Iterator<Item = u64> + use<'a> {
    let end = whole.first + u64::from(whole.count);
    let taken =
        &made[made.partition_point(|page| *page < whole.first)..made.partition_point(|page| *page < end)];
    let mut at = whole.first;
    for page in taken.iter().copied().chain([end]) {
        if at < page {
            let raw_page = whole.raw_page + (at - whole.first) as u32;
            uses.push(Use { frame: whole.frame, raw_page, first: at, count: (page - at) as u32 });
        }
        at = page + 1;
    }
    taken.iter().copied()
}

/// The steps, from number `first` on, of the pages that are put together at once.
pub(super) fn batch_from(steps: &[Step], first: usize) -> Option<Range<usize>> {
    steps.get(first)?;
    let (mut end, mut pages) = (first, 0);
    for page in steps[first..].chunk_by(|a, b| a.page == b.page) {
        if pages == BATCH_PAGES || (pages > 0 && end - first + page.len() > BATCH_STEPS) {
            break;
        }
        end += page.len();
        pages += 1;
    }
    Some(first..end)
}

/// Pages being put together.
pub(super) struct Batch {
    /// Ascending.
    pages: Vec<u64>,
    raw: Vec<u8>,
}

impl Batch {
    pub fn of(steps: &[Step]) -> Self {
        let mut pages: Vec<u64> = steps.iter().map(|step| step.page).collect();
        pages.dedup();
        Self { raw: vec![0; pages.len() * PAGE], pages }
    }

    /// Takes what `steps` want of an opened frame, and compares what comes out with the frame's checks; `wrong` is told
    /// pages that are something else. Frames must come oldest first.
    pub fn take(
        &mut self,
        head: &FrameHead,
        raw: &[u8],
        steps: &[Step],
        mut wrong: impl FnMut(u64),
    ) -> Result<(), FrameError> {
        let pages = head.pages() as usize;
        let (words, refs) = match head.codec {
            Codec::Zero | Codec::Plain | Codec::Zstd => (None, None),
            Codec::Words => (Some(WordView::of(pages, raw)?), None),
            Codec::Refs => (None, Some(RefView::of(pages, raw)?)),
        };
        for step in steps {
            let Ok(slot) = self.pages.binary_search(&step.page) else { continue };
            let slot = &mut self.raw[slot * PAGE..(slot + 1) * PAGE];
            let at = step.raw_page as usize;
            let check = match (&words, &refs) {
                (Some(words), _) => {
                    words.apply(at, slot);
                    Some(words.check(at))
                }
                (None, Some(refs)) => Some(refs.get(at).check),
                (None, None) => {
                    // A frame of zeros unpacks to nothing.
                    match raw.get(at * PAGE..(at + 1) * PAGE) {
                        Some(page) => slot.copy_from_slice(page),
                        None => slot.fill(0),
                    }
                    None
                }
            };
            if check.is_some_and(|check| page_check(slot) != check) {
                wrong(step.page);
            }
        }
        Ok(())
    }

    pub fn finish(self) -> (Vec<u64>, Vec<u8>) {
        (self.pages, self.raw)
    }
}

/// Frames that one read brings: numbers of steps (sorted by frame, oldest first), and bytes of their pack.
pub(super) struct Reach {
    pub pack: u32,
    pub bytes: Range<u64>,
    pub steps: Range<usize>,
}

/// The frames from step `first` on that lie close together in one pack.
pub(super) fn reach_from(frames: &[PlannedFrame], steps: &[Step], first: usize) -> Option<Reach> {
    let place = |step: &Step| {
        let frame = &frames[step.frame as usize];
        (frame.pack, frame.body_offset, frame.body_offset + u64::from(frame.head.body_len))
    };
    let (pack, mut start, mut end) = place(steps.get(first)?);
    let mut next = first;
    while let Some((other, from, to)) = steps.get(next).map(place) {
        let near = from <= end.saturating_add(GAP_MAX) && start <= to.saturating_add(GAP_MAX);
        let (low, high) = (start.min(from), end.max(to));
        if other != pack || !near || high - low > SEGMENT {
            break;
        }
        (start, end, next) = (low, high, next + 1);
    }
    Some(Reach { pack, bytes: start..end, steps: first..next.max(first + 1) })
}
