//! One image of a point, as its layers are laid under each other: which frame of which layer each page comes from.
//! Promises: what shows once is never hidden later; changed words lie over whatever is found below them; memory grows with
//! frames, runs, and pages that are put together. Called by `plan`.

use super::{
    made::{Step, without},
    planned::{PlannedFrame, Use},
    sources::Sources,
};
use lifeboat::{
    extent::overlay::{Overlay, Piece},
    format::{
        frame::{Codec, FrameHead},
        manifest::{Image, Manifest},
        refs::PageRef,
    },
    page::{PageRun, pages_for},
};
use std::{cmp::Reverse, collections::BTreeMap};

#[derive(Debug)]
pub(super) struct LayeredImage {
    pub pages: Overlay<Source>,
    /// Changed words over what is, or will be, in `pages`.
    words: Vec<Use>,
    /// Pages from here on are zero whatever older points hold: the image was shorter once.
    pub limit: u64,
    /// Older layers add nothing to it.
    pub complete: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Zero,
    Frame {
        frame: u32,
        raw_page: u32,
    },
    /// References: `chain` is the number under which [`Sources`] gathers what the page is made of.
    Refs {
        chain: u32,
    },
}

impl Piece for Source {
    fn skip(&self, units: u64) -> Self {
        match *self {
            Self::Zero => Self::Zero,
            // Within one frame, whose pages are few; only runs of zero pages are long.
            Self::Frame { frame, raw_page } => Self::Frame { frame, raw_page: raw_page + units as u32 },
            Self::Refs { chain } => Self::Refs { chain: chain + units as u32 },
        }
    }
    fn continues(&self, units: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Frame { frame, raw_page }, Self::Frame { frame: other, raw_page: at }) => {
                frame == other && u64::from(*raw_page) + units == u64::from(*at)
            }
            (Self::Refs { chain }, Self::Refs { chain: at }) => u64::from(*chain) + units == u64::from(*at),
            (Self::Zero | Self::Frame { .. } | Self::Refs { .. }, _) => false,
        }
    }
}

/// What an image, or some pages of one, is read from.
#[derive(Clone, Debug, Default)]
pub(super) struct Parts {
    /// Pages that stand whole in one frame, in the order in which packs are best read.
    pub uses: Vec<Use>,
    /// Pages that are put together from several frames: by page, and for each page the oldest frame first.
    pub steps: Vec<Step>,
}

impl LayeredImage {
    pub fn new(image: &Image) -> Self {
        let (pages, words) = (Overlay::default(), Vec::new());
        Self { pages, words, limit: pages_for(image.bytes), complete: false }
    }

    /// Whether any page of a frame of the next older layer would show, in which the image is `here`.
    pub fn would_show(&self, here: &Image, head: &FrameHead) -> bool {
        let limit = self.limit.min(pages_for(here.bytes));
        let gaps = |run: &PageRun| self.pages.gaps(run.first, run.end().unwrap_or(run.first).min(limit));
        !self.complete && head.runs.iter().any(|run| gaps(run).next().is_some())
    }

    /// Ranges of pages that are zero by what the layers say.
    pub fn zeroes(&mut self, image: &Image) -> Vec<(u64, u64)> {
        // What the image lost by shrinking does not come back from below.
        let pages = pages_for(image.bytes);
        if self.limit < pages {
            self.pages.lay_under(self.limit, pages, &Source::Zero);
        }
        let made = self.made();
        let mut zero = Vec::new();
        for (first, end, _) in self.pages.iter().filter(|(.., source)| **source == Source::Zero) {
            let mut at = first;
            // Words over zeros are not zero.
            let from = made.partition_point(|page| *page < first);
            for page in made[from..].iter().copied().take_while(|page| *page < end).chain([end]) {
                if at < page {
                    zero.push((at, page));
                }
                at = page + 1;
            }
        }
        zero
    }

    /// Pages with words, ascending.
    fn made(&self) -> Vec<u64> {
        let pages = self.words.iter().flat_map(|used| used.first..used.first + u64::from(used.count));
        let mut pages: Vec<u64> = pages.collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// From here on older layers only complete words that have found no base yet.
    pub fn freeze(&mut self, image: &Image, sources: &mut Sources) -> Result<(), String> {
        if std::mem::replace(&mut self.complete, true) {
            return Ok(());
        }
        let open = self.words.iter().flat_map(|used| {
            let end = (used.first + u64::from(used.count)).min(self.limit);
            self.pages.gaps(used.first, end).flat_map(|(from, to)| from..to)
        });
        let mut open: Vec<u64> = open.collect();
        open.sort_unstable();
        open.dedup();
        for page in open {
            let chain = sources.want(image, page)?;
            self.pages.lay_under(page, page + 1, &Source::Refs { chain });
        }
        Ok(())
    }

    /// Lays one frame under those before it; returns whether any of it shows.
    pub fn lay(
        &mut self,
        manifest: &Manifest,
        sources: &mut Sources,
        frame: u32,
        head: &FrameHead,
        refs: Option<&[PageRef]>,
    ) -> Result<bool, String> {
        let (mut raw_page, mut shows) = (0u32, false);
        for run in &head.runs {
            let end = run.end().unwrap_or(run.first).min(self.limit);
            if run.first < end {
                shows |= match head.codec {
                    Codec::Zero => self.pages.lay_under(run.first, end, &Source::Zero),
                    Codec::Plain | Codec::Zstd => {
                        self.pages.lay_under(run.first, end, &Source::Frame { frame, raw_page })
                    }
                    Codec::Words => {
                        let gaps = self.pages.gaps(run.first, end);
                        let before = self.words.len();
                        self.words.extend(gaps.map(|(from, to)| Use {
                            frame,
                            raw_page: raw_page + (from - run.first) as u32,
                            first: from,
                            count: (to - from) as u32,
                        }));
                        self.words.len() > before
                    }
                    Codec::Refs => self.lay_refs(manifest, sources, frame, run.first, end, raw_page, refs)?,
                };
            }
            raw_page = raw_page.wrapping_add(run.count);
        }
        Ok(shows)
    }

    #[allow(clippy::too_many_arguments)] // one place calls it
    fn lay_refs(
        &mut self,
        manifest: &Manifest,
        sources: &mut Sources,
        frame: u32,
        first: u64,
        end: u64,
        raw_page: u32,
        refs: Option<&[PageRef]>,
    ) -> Result<bool, String> {
        let gaps: Vec<(u64, u64)> = self.pages.gaps(first, end).collect();
        for (from, to) in &gaps {
            let raw_page = raw_page + (from - first) as u32;
            let there = refs.and_then(|refs| refs.get(raw_page as usize..)?.get(..(to - from) as usize));
            let there =
                there.ok_or_else(|| format!("references of point {} are not at hand", manifest.seq))?;
            let chain = sources.follow(manifest, frame, raw_page, there)?;
            self.pages.lay_under(*from, *to, &Source::Refs { chain });
        }
        Ok(!gaps.is_empty())
    }

    pub fn finish(self, frames: &[PlannedFrame], chains: &BTreeMap<u32, Vec<(u32, u32)>>) -> Parts {
        let mut steps: Vec<Step> = Vec::new();
        let words = self.words.iter().flat_map(|used| (0..used.count).map(move |at| (used, at)));
        steps.extend(words.map(|(used, at)| Step {
            page: used.first + u64::from(at),
            frame: used.frame,
            raw_page: used.raw_page + at,
        }));
        let made = self.made();
        let mut uses = Vec::new();
        for (first, end, source) in self.pages.iter() {
            match *source {
                Source::Zero => {}
                Source::Frame { frame, raw_page } => {
                    // One frame's pages: at most 64.
                    let whole = Use { frame, raw_page, first, count: (end - first) as u32 };
                    let bases = without(whole, &made, &mut uses);
                    steps.extend(bases.map(|page| Step {
                        page,
                        frame,
                        raw_page: raw_page + (page - first) as u32,
                    }));
                }
                Source::Refs { chain } => {
                    for (page, chain) in (first..end).zip(chain..) {
                        let chain = chains.get(&chain).map(Vec::as_slice).unwrap_or_default();
                        steps.extend(chain.iter().map(|(frame, raw_page)| Step {
                            page,
                            frame: *frame,
                            raw_page: *raw_page,
                        }));
                    }
                }
            }
        }
        uses.sort_unstable_by_key(|used| {
            let frame = &frames[used.frame as usize];
            (frame.pack, frame.body_offset, used.raw_page)
        });
        steps.sort_unstable_by_key(|step| (step.page, Reverse(step.frame)));
        Parts { uses, steps }
    }
}

impl Parts {
    /// Pages that are not zero by omission.
    pub fn pages(&self) -> u64 {
        let whole: u64 = self.uses.iter().map(|used| u64::from(used.count)).sum();
        let made = self.steps.chunk_by(|a, b| a.page == b.page).count();
        whole + made as u64
    }

    /// What the pages of `wanted` (ascending, not overlapping) take of it.
    pub fn only(&self, wanted: &[PageRun]) -> Self {
        let ends = |run: &PageRun| run.end().unwrap_or(run.first);
        let mut uses = Vec::new();
        for used in &self.uses {
            let end = used.first + u64::from(used.count);
            let from = wanted.partition_point(|run| ends(run) <= used.first);
            for run in wanted[from..].iter().take_while(|run| run.first < end) {
                let (first, end) = (run.first.max(used.first), ends(run).min(end));
                let raw_page = used.raw_page + (first - used.first) as u32;
                uses.push(Use { frame: used.frame, raw_page, first, count: (end - first) as u32 });
            }
        }
        let holds = |page: u64| {
            wanted.get(wanted.partition_point(|run| ends(run) <= page)).is_some_and(|run| run.first <= page)
        };
        let steps = self.steps.iter().filter(|step| holds(step.page)).copied().collect();
        Self { uses, steps }
    }
}
