//! An image's content as a stream of verified runs of pages.
//! Promises: packs are read in large sequential ranges; every frame is unpacked and hashed before a byte of it is handed
//! out, and a page put together from several is compared with its check; nothing is handed out past the image's end; at
//! most `AHEAD` segments of at most 8 MiB of pages (and as much packed) are in memory. Called by `disk`, by whoever
//! composes a memory stream, and by whoever writes pages anew that stood in several frames ([`Reader::pages`]).

use crate::{
    restore::{
        Plan, RestoreError,
        layered::Parts,
        made::{Batch, Step, batch_from, reach_from},
        planned::{GAP_MAX, PlannedPack, SEGMENT, Use},
    },
    store::{Objects, StoreError},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use lifeboat::{
    format::{frame, manifest::ImageKind},
    page::{PAGE, PageRun},
};
use std::{cmp::Reverse, ops::Range, sync::Arc};

/// Pages of an image from `first_page` on. Not a multiple of a page only where the image ends within one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub first_page: u64,
    pub bytes: Bytes,
}

impl Run {
    pub fn offset(&self) -> u64 {
        self.first_page * PAGE as u64
    }
}

/// How far a restore is, in bytes of the image that are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Reads the images of one planned point.
#[derive(Clone, Debug)]
pub struct Reader {
    objects: Arc<dyn Objects>,
    plan: Arc<Plan>,
}

/// What is read at once.
enum Piece {
    Whole(Segment),
    /// Numbers of steps.
    Made(Range<usize>),
}

/// Frames that are read with one request.
struct Segment {
    pack: u32,
    bytes: Range<u64>,
    /// Indices into the image's uses.
    uses: Range<usize>,
}

impl Reader {
    pub fn new(objects: Arc<dyn Objects>, plan: Arc<Plan>) -> Self {
        Self { objects, plan }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The image's pages that are not zero by omission, each exactly once, several runs at a time. In the order of the
    /// packs, not of the pages.
    pub fn segments(
        &self,
        kind: ImageKind,
        name: &str,
    ) -> Result<impl Stream<Item = Result<Vec<Run>, RestoreError>> + Send + use<>, RestoreError> {
        let at = self.position(kind, name)?;
        Ok(self.read_parts(at, self.plan.images()[at].parts.clone()))
    }

    /// The same, of the pages of `wanted` (ascending, not overlapping) alone. A page of them that does not come is zero.
    pub fn pages(
        &self,
        kind: ImageKind,
        name: &str,
        wanted: &[PageRun],
    ) -> Result<impl Stream<Item = Result<Vec<Run>, RestoreError>> + Send + use<>, RestoreError> {
        let at = self.position(kind, name)?;
        Ok(self.read_parts(at, Arc::new(self.plan.images()[at].parts.only(wanted))))
    }

    fn read_parts(
        &self,
        at: usize,
        parts: Arc<Parts>,
    ) -> impl Stream<Item = Result<Vec<Run>, RestoreError>> + Send + use<> {
        let (plan, reader) = (self.plan.clone(), self.clone());
        let (mut next, mut made) = (0, 0);
        let pieces = std::iter::from_fn({
            let parts = parts.clone();
            move || {
                if let Some(segment) = segment_from(&plan, &parts.uses, next) {
                    next = segment.uses.end;
                    return Some(Piece::Whole(segment));
                }
                let batch = batch_from(&parts.steps, made)?;
                made = batch.end;
                Some(Piece::Made(batch))
            }
        });
        // Tasks of their own, so that reading and unpacking go on while the caller writes what it was given.
        let read = move |piece| {
            let (reader, parts) = (reader.clone(), parts.clone());
            let reading = tokio::spawn(async move {
                match piece {
                    Piece::Whole(segment) => reader.read(at, parts, segment).await,
                    Piece::Made(steps) => reader.make(at, parts.steps[steps].to_vec()).await,
                }
            });
            async move { reading.await.map_err(|error| StoreError::disk("restore", "reading", error))? }
        };
        stream::iter(pieces).map(read).buffered(AHEAD)
    }

    /// Calls `each` with every run, and `progress` after each few of them. `each` must not block for long.
    pub async fn for_each_run<E: From<RestoreError>>(
        &self,
        kind: ImageKind,
        name: &str,
        mut progress: impl FnMut(Progress) + Send,
        mut each: impl FnMut(u64, Bytes) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        let total_bytes = self.plan.images()[self.position(kind, name)?].live_bytes;
        let mut done_bytes = 0;
        progress(Progress { done_bytes, total_bytes });
        let mut segments = std::pin::pin!(self.segments(kind, name)?);
        while let Some(runs) = segments.try_next().await? {
            for run in runs {
                done_bytes += (run.bytes.len() as u64).next_multiple_of(PAGE as u64);
                each(run.first_page, run.bytes)?;
            }
            progress(Progress { done_bytes, total_bytes });
        }
        Ok(())
    }

    fn position(&self, kind: ImageKind, name: &str) -> Result<usize, RestoreError> {
        let mut images = self.plan.images().iter();
        let found = images.position(|plan| plan.image.kind == kind && plan.image.name == name);
        found.ok_or_else(|| RestoreError::NoImage(name.to_owned()))
    }

    async fn fetch(&self, image: usize, pack: u32, range: Range<u64>) -> Result<Bytes, RestoreError> {
        let start = range.start;
        let read = self.objects.get_range(&self.plan.packs[pack as usize].path, range).await;
        read.map_err(|error| match error {
            error @ (StoreError::Damaged { .. } | StoreError::Missing { .. }) => {
                self.damaged(image, pack, start, error.what())
            }
            other => other.into(),
        })
    }

    async fn read(self, image: usize, parts: Arc<Parts>, segment: Segment) -> Result<Vec<Run>, RestoreError> {
        let bytes = self.fetch(image, segment.pack, segment.bytes.clone()).await?;
        let opened =
            tokio::task::spawn_blocking(move || self.open(image, &parts.uses, &segment, &bytes)).await;
        opened.map_err(|error| StoreError::disk("restore", "unpacking", error))?
    }

    fn open(
        &self,
        image: usize,
        uses: &[Use],
        segment: &Segment,
        bytes: &Bytes,
    ) -> Result<Vec<Run>, RestoreError> {
        let mut runs = Vec::new();
        let mut opened: Option<(u32, Bytes)> = None;
        for used in &uses[segment.uses.clone()] {
            let raw = match opened.take() {
                Some((no, raw)) if no == used.frame => raw,
                Some(_) | None => self.open_frame(image, used.frame, segment.bytes.start, bytes)?.into(),
            };
            let from = used.raw_page as usize * PAGE;
            let len = self.len_within(image, used.first, u64::from(used.count));
            runs.push(Run { first_page: used.first, bytes: raw.slice(from..from + len) });
            opened = Some((used.frame, raw));
        }
        Ok(runs)
    }

    /// Unpacks and verifies frame `no`, which stands in `bytes`, read from byte `start` of its pack.
    fn open_frame(&self, image: usize, no: u32, start: u64, bytes: &Bytes) -> Result<Vec<u8>, RestoreError> {
        let planned = &self.plan.frames[no as usize];
        let from = (planned.body_offset - start) as usize;
        let body = &bytes[from..from + planned.head.body_len as usize];
        let mut raw = Vec::new();
        frame::open(&planned.head, body, &mut raw)
            .map_err(|error| self.damaged(image, planned.pack, planned.body_offset, error.to_string()))?;
        Ok(raw)
    }

    /// Bytes of `pages` pages from `first` on that are within the image.
    fn len_within(&self, image: usize, first: u64, pages: u64) -> usize {
        let left = self.plan.images()[image].image.bytes.saturating_sub(first * PAGE as u64);
        (pages * PAGE as u64).min(left) as usize
    }

    /// Puts together the pages of `steps`.
    async fn make(self, image: usize, mut steps: Vec<Step>) -> Result<Vec<Run>, RestoreError> {
        let mut batch = Batch::of(&steps);
        // Oldest frame first, so that what is newer comes over it.
        steps.sort_unstable_by_key(|step| (Reverse(step.frame), step.raw_page));
        let mut next = 0;
        while let Some(reach) = reach_from(&self.plan.frames, &steps, next) {
            next = reach.steps.end;
            let bytes = self.fetch(image, reach.pack, reach.bytes.clone()).await?;
            let (reader, taken) = (self.clone(), steps[reach.steps].to_vec());
            let taking = tokio::task::spawn_blocking(move || {
                for steps in taken.chunk_by(|a, b| a.frame == b.frame) {
                    let no = steps[0].frame;
                    let raw = reader.open_frame(image, no, reach.bytes.start, &bytes)?;
                    let planned = &reader.plan.frames[no as usize];
                    let damaged = |what| Err(reader.damaged(image, planned.pack, planned.body_offset, what));
                    let mut wrong = None;
                    let taken = batch.take(&planned.head, &raw, steps, |page| {
                        wrong.get_or_insert(page);
                    });
                    match (taken, wrong) {
                        (Ok(()), None) => {}
                        (Err(error), _) => return damaged(error.to_string()),
                        (Ok(()), Some(page)) => {
                            let what = "does not become what it was when the point was cut";
                            return damaged(format!("page {page} {what}"));
                        }
                    }
                }
                Ok::<_, RestoreError>(batch)
            });
            batch = taking.await.map_err(|error| StoreError::disk("restore", "unpacking", error))??;
        }
        let (pages, raw) = batch.finish();
        let (raw, mut runs, mut at) = (Bytes::from(raw), Vec::new(), 0);
        for together in pages.chunk_by(|a, b| a + 1 == *b) {
            let len = self.len_within(image, together[0], together.len() as u64);
            runs.push(Run { first_page: together[0], bytes: raw.slice(at..at + len) });
            at += together.len() * PAGE;
        }
        Ok(runs)
    }

    fn damaged(&self, image: usize, pack: u32, offset: u64, what: String) -> RestoreError {
        let image = self.plan.images()[image].image.name.clone();
        let PlannedPack { id: pack, point: written, .. } = self.plan.packs[pack as usize];
        RestoreError::Damaged { point: self.plan.point(), image, pack, written, offset, what }
    }
}

/// The segment that begins with use number `first`: as many frames as lie close together and fit.
fn segment_from(plan: &Plan, uses: &[Use], first: usize) -> Option<Segment> {
    let frame_of = |used: usize| uses.get(used).map(|used| &plan.frames[used.frame as usize]);
    let begin = frame_of(first)?;
    let (pack, start) = (begin.pack, begin.body_offset);
    let (mut end, mut raw, mut next) = (start, 0u64, first);
    let mut last = None;
    while let Some(frame) = frame_of(next) {
        if last != Some(uses[next].frame) {
            let frame_end = frame.body_offset + u64::from(frame.head.body_len);
            let fits = frame.pack == pack
                && frame.body_offset.saturating_sub(end) <= GAP_MAX
                && frame_end - start <= SEGMENT
                && raw + u64::from(frame.head.raw_len) <= SEGMENT;
            if !fits && next > first {
                break;
            }
            (end, last) = (frame_end, Some(uses[next].frame));
            raw += u64::from(frame.head.raw_len);
        }
        next += 1;
    }
    Some(Segment { pack, bytes: start..end, uses: first..next })
}

/// Segments read, unpacked or waiting to be consumed at once.
const AHEAD: usize = 4;
