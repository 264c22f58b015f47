//! Layers laid together: what a run of a point's layers says, as frames that need nothing else to be read.
//! Promises: of each page the newest layer counts, put together where it must be; every frame is verified when it is
//! read and sealed anew; a few segments of pages are in memory. The result restores to the same bytes as the run did.
//! Called by retention.

use crate::{
    restore::{Reader, RestoreError, Run, plan::Layers},
    store::{Folds, Objects, PointRef, StoreError, read_layer},
};
use lifeboat::{
    format::{
        frame::{Frame, RUNS_MAX},
        manifest::Image,
    },
    id::VmId,
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, is_zero},
    units::Seq,
};
use std::sync::Arc;

/// A run of layers, planned.
#[derive(Debug)]
pub struct Merge {
    pub reader: Reader,
    pub images: Vec<MergedImage>,
}

/// One image of the result.
#[derive(Clone, Debug)]
pub struct MergedImage {
    pub image: Image,
    /// A page that no frame of the result holds is zero; otherwise it is as below.
    pub complete: bool,
    /// Ranges of pages that the layers say are zero.
    zero: Vec<(u64, u64)>,
}

/// Numbers the frames of a result.
#[derive(Debug, Default)]
pub struct Sealing(u32);

impl Merge {
    /// Plans the layers of the points in `run`, newest first, as one layer of the first of them.
    pub async fn load(
        objects: Arc<dyn Objects>,
        vm: VmId,
        run: &[Seq],
        folds: &Folds,
    ) -> Result<Self, RestoreError> {
        let mut laid: Option<(Layers, PointRef)> = None;
        let mut below = None;
        for seq in run {
            let layer = read_layer(objects.as_ref(), vm, *seq, folds.get(seq).copied()).await?;
            let at = PointRef { seq: *seq, point: layer.manifest.point };
            let (layers, wanted) = laid.get_or_insert_with(|| (Layers::new(&layer.manifest), at));
            layers.add_layer(objects.as_ref(), &layer, *wanted).await?;
            below = layer.base;
        }
        let (mut layers, wanted) = laid.ok_or_else(|| RestoreError::NoImage("no layers".into()))?;
        let zeroes = layers.zeroes();
        // Words whose base lies below, and references to RAM as it was below: completed from there, so that the result
        // speaks of the run's pages alone, and needs nothing else for them.
        let broken = |what: String| RestoreError::Broken { point: wanted, what };
        layers.freeze().map_err(broken)?;
        while !layers.is_complete() {
            let base = below.ok_or_else(|| broken("its history has no beginning".into()))?;
            let layer = read_layer(objects.as_ref(), vm, base.seq, folds.get(&base.seq).copied()).await?;
            if layer.digest != base.manifest || layer.manifest.point != base.point {
                return Err(broken(format!("point {} is not the one it was built on", base.seq)));
            }
            layers.add_layer(objects.as_ref(), &layer, wanted).await?;
            below = layer.base;
        }
        let reader = Reader::new(objects, Arc::new(layers.finish()));
        let planned = reader.plan().images().iter().map(|planned| planned.image.clone());
        let images =
            planned.zip(zeroes).map(|(image, (complete, zero))| MergedImage { image, complete, zero });
        Ok(Self { images: images.collect(), reader })
    }

    /// Numbers of the images that are complete in the result, ascending.
    pub fn full(&self) -> Vec<u16> {
        let complete = self.images.iter().filter(|image| image.complete);
        let mut full: Vec<u16> = complete.map(|image| image.image.no).collect();
        full.sort_unstable();
        full
    }
}

impl MergedImage {
    /// The frames of what is zero by what the layers say.
    pub fn zero_frames(&self, sealing: &mut Sealing) -> Result<Vec<Frame>, RestoreError> {
        let mut runs = Vec::new();
        if !self.complete {
            for (first, end) in self.zero.iter().copied() {
                let mut at = first;
                while at < end {
                    let count = u32::try_from(end - at).unwrap_or(u32::MAX);
                    runs.push(PageRun::new(at, count));
                    at += u64::from(count);
                }
            }
        }
        let groups = runs.chunks(RUNS_MAX).map(|runs| PageGroup {
            image: self.image.no,
            runs: runs.to_vec(),
            content: Content::Zero,
        });
        groups.map(|group| sealing.seal(&group)).collect()
    }

    /// The frames of what was read of one segment. Takes its time: call it where that may be.
    pub fn frames(&self, mut read: Vec<Run>, sealing: &mut Sealing) -> Result<Vec<Frame>, RestoreError> {
        read.sort_unstable_by_key(|run| run.first_page);
        let (mut frames, mut zero) = (Vec::new(), Vec::new());
        let (mut runs, mut raw) = (Vec::<PageRun>::new(), Vec::<u8>::new());
        for run in read {
            for (at, page) in run.bytes.chunks(PAGE).enumerate() {
                let no = run.first_page + at as u64;
                if is_zero(page) {
                    if !self.complete {
                        PageRun::push_page(&mut zero, no);
                    }
                    continue;
                }
                PageRun::push_page(&mut runs, no);
                raw.extend_from_slice(page);
                // The image may end within its last page.
                raw.resize(raw.len().next_multiple_of(PAGE), 0);
                if raw.len() == GROUP_PAGES * PAGE {
                    frames.push(sealing.pages(self.image.no, &mut runs, &mut raw)?);
                }
            }
        }
        if !raw.is_empty() {
            frames.push(sealing.pages(self.image.no, &mut runs, &mut raw)?);
        }
        for runs in zero.chunks(RUNS_MAX) {
            let group = PageGroup { image: self.image.no, runs: runs.to_vec(), content: Content::Zero };
            frames.push(sealing.seal(&group)?);
        }
        Ok(frames)
    }
}

impl Sealing {
    fn pages(
        &mut self,
        image: u16,
        runs: &mut Vec<PageRun>,
        raw: &mut Vec<u8>,
    ) -> Result<Frame, RestoreError> {
        let content = Content::Bytes(std::mem::take(raw).into());
        self.seal(&PageGroup { image, runs: std::mem::take(runs), content })
    }

    fn seal(&mut self, group: &PageGroup) -> Result<Frame, RestoreError> {
        let failed = |error| StoreError::disk("fold", "packing a frame", error);
        let frame = Frame::seal(self.0, group, LEVEL).map_err(failed)?;
        self.0 += 1;
        Ok(frame)
    }
}

/// zstd's level for folds: as for what agents send.
const LEVEL: i32 = 1;
