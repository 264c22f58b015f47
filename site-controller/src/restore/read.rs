//! An image's content as a stream of verified runs of pages.
//! Promises: packs are read in large sequential ranges; every frame is unpacked and hashed before a byte of it is handed
//! out; nothing is handed out past the image's end; at most `AHEAD` segments of at most 8 MiB of pages (and as much
//! packed) are in memory. Called by `disk`, and by whoever composes a memory stream.

use crate::{
    restore::{ImagePlan, Plan, RestoreError, plan::PlannedPack},
    store::{Objects, StoreError},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use lifeboat::{
    format::{frame, manifest::ImageKind},
    page::PAGE,
};
use std::{ops::Range, sync::Arc};

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
        let (plan, reader) = (self.plan.clone(), self.clone());
        let mut next = 0;
        let segments = std::iter::from_fn(move || {
            let segment = segment_from(&plan, &plan.images()[at], next)?;
            next = segment.uses.end;
            Some(segment)
        });
        // Tasks of their own, so that reading and unpacking go on while the caller writes what it was given.
        let read = move |segment| {
            let reading = tokio::spawn(reader.clone().read(at, segment));
            async move { reading.await.map_err(|error| StoreError::disk("restore", "reading", error))? }
        };
        Ok(stream::iter(segments).map(read).buffered(AHEAD))
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

    async fn read(self, image: usize, segment: Segment) -> Result<Vec<Run>, RestoreError> {
        let pack = &self.plan.packs[segment.pack as usize];
        let range = segment.bytes.clone();
        let bytes = self.objects.get_range(&pack.path, range).await.map_err(|error| match error {
            error @ (StoreError::Damaged { .. } | StoreError::Missing { .. }) => {
                self.damaged(image, segment.pack, segment.bytes.start, error.what())
            }
            other => other.into(),
        })?;
        let opened = tokio::task::spawn_blocking(move || self.open(image, &segment, &bytes)).await;
        opened.map_err(|error| StoreError::disk("restore", "unpacking", error))?
    }

    fn open(&self, image: usize, segment: &Segment, bytes: &Bytes) -> Result<Vec<Run>, RestoreError> {
        let planned = &self.plan.images()[image];
        let mut runs = Vec::new();
        let mut opened: Option<(u32, Bytes)> = None;
        for used in &planned.uses[segment.uses.clone()] {
            let frame = &self.plan.frames[used.frame as usize];
            let raw = match opened.take() {
                Some((no, raw)) if no == used.frame => raw,
                Some(_) | None => {
                    let from = (frame.body_offset - segment.bytes.start) as usize;
                    let body = &bytes[from..from + frame.head.body_len as usize];
                    let mut raw = Vec::new();
                    frame::open(&frame.head, body, &mut raw).map_err(|error| {
                        self.damaged(image, segment.pack, frame.body_offset, error.to_string())
                    })?;
                    raw.into()
                }
            };
            let from = used.raw_page as usize * PAGE;
            let left = planned.image.bytes.saturating_sub(used.first * PAGE as u64);
            let len = (u64::from(used.count) * PAGE as u64).min(left) as usize;
            runs.push(Run { first_page: used.first, bytes: raw.slice(from..from + len) });
            opened = Some((used.frame, raw));
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
fn segment_from(plan: &Plan, image: &ImagePlan, first: usize) -> Option<Segment> {
    let frame_of = |used: usize| image.uses.get(used).map(|used| &plan.frames[used.frame as usize]);
    let begin = frame_of(first)?;
    let (pack, start) = (begin.pack, begin.body_offset);
    let (mut end, mut raw, mut next) = (start, 0u64, first);
    let mut last = None;
    while let Some(frame) = frame_of(next) {
        if last != Some(image.uses[next].frame) {
            let frame_end = frame.body_offset + u64::from(frame.head.body_len);
            let fits = frame.pack == pack
                && frame.body_offset.saturating_sub(end) <= GAP_MAX
                && frame_end - start <= SEGMENT
                && raw + u64::from(frame.head.raw_len) <= SEGMENT;
            if !fits && next > first {
                break;
            }
            (end, last) = (frame_end, Some(image.uses[next].frame));
            raw += u64::from(frame.head.raw_len);
        }
        next += 1;
    }
    Some(Segment { pack, bytes: start..end, uses: first..next })
}

/// Bytes of pages, and bytes of a pack, in one segment at the most (a frame has 256 KiB at the most).
const SEGMENT: u64 = 8 << 20;
/// Unneeded bytes that are read along to save a request.
const GAP_MAX: u64 = 256 << 10;
/// Segments read, unpacked or waiting to be consumed at once.
const AHEAD: usize = 4;
