//! From a recovery point to ordered reads: for each image, which pages of which frames of which packs.
//! A point's layers are its own and those below it, each a point's packs or the fold that took their place.
//! Promises: the newest point wins, and within one point the frame with the higher seq; what no frame holds is zero; what
//! a shrunken image lost does not come back when it grows. Memory grows with frames and runs, not with the images' size.
//! [`Layers`] is pure; [`Plan::load`] feeds it manifests and indices, each checked against its digest.

use crate::{
    restore::RestoreError,
    store::{
        Folds, Layer, Objects, Pin, PointRef, Store, StoreError, list_folds, paths, read_index_at, read_layer,
    },
};
use lifeboat::{
    extent::overlay::{Overlay, Piece},
    format::{
        frame::{Codec, FrameHead},
        manifest::{Image, ImageKind, Manifest},
        pack::IndexEntry,
    },
    id::{PackId, VmId},
    page::{PAGE, pages_for},
    units::Seq,
};
use std::collections::BTreeMap;

/// All that is needed to read the images of one point.
#[derive(Debug)]
pub struct Plan {
    pub manifest: Manifest,
    pub(super) packs: Vec<PlannedPack>,
    pub(super) frames: Vec<PlannedFrame>,
    images: Vec<ImagePlan>,
    /// Keeps all that is planned where it is.
    pin: Option<Pin>,
}

/// One image of the point.
#[derive(Debug)]
pub struct ImagePlan {
    pub image: Image,
    /// Bytes that are not zero by omission, as far as frames tell.
    pub live_bytes: u64,
    /// In the order in which packs are best read.
    pub(super) uses: Vec<Use>,
}

#[derive(Debug)]
pub(super) struct PlannedPack {
    pub id: PackId,
    pub path: String,
    pub point: PointRef,
}

#[derive(Debug)]
pub(super) struct PlannedFrame {
    /// Index into the plan's packs.
    pub pack: u32,
    pub body_offset: u64,
    pub head: FrameHead,
}

/// `count` pages of the image from `first`, which stand in a frame from its page `raw_page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub frame: u32,
    pub raw_page: u32,
    pub first: u64,
    pub count: u32,
}

impl Plan {
    /// Plans one point of `vm`, and pins it: as long as the plan lives, nothing that it needs is removed.
    pub async fn of(store: &Store, vm: VmId, seq: Seq) -> Result<Self, RestoreError> {
        let pin = store.pin(vm, seq).await;
        let pin = pin.ok_or_else(|| StoreError::Missing { path: paths::manifest(vm, seq) })?;
        let plan = Self::load_along(store.objects().as_ref(), vm, seq, pin.folds()).await?;
        Ok(Self { pin: Some(pin), ..plan })
    }

    /// Plans one point of a store that nobody changes meanwhile. Reads along its layers as far as its images need.
    pub async fn load(objects: &dyn Objects, vm: VmId, seq: Seq) -> Result<Self, RestoreError> {
        let folds = list_folds(objects, vm).await?;
        Self::load_along(objects, vm, seq, &folds).await
    }

    async fn load_along(
        objects: &dyn Objects,
        vm: VmId,
        seq: Seq,
        folds: &Folds,
    ) -> Result<Self, RestoreError> {
        let read = async |seq| read_layer(objects, vm, seq, folds.get(&seq).copied()).await;
        let mut layer = read(seq).await?;
        let wanted = PointRef { seq, point: layer.manifest.point };
        let broken = |what: String| RestoreError::Broken { point: wanted, what };
        let mut layers = Layers::new(&layer.manifest);
        loop {
            layers.add_layer(objects, &layer, wanted).await?;
            if layers.is_complete() {
                return Ok(layers.finish());
            }
            let base = layer.base.ok_or_else(|| broken("its history has no beginning".into()))?;
            let below = read(base.seq).await.map_err(|error| explain(wanted, error))?;
            if below.digest != base.manifest || below.manifest.point != base.point {
                return Err(broken(format!("point {} is not the one it was built on", base.seq)));
            }
            layer = below;
        }
    }

    /// Whether the plan keeps its objects from being removed.
    pub fn is_pinned(&self) -> bool {
        self.pin.is_some()
    }

    pub fn images(&self) -> &[ImagePlan] {
        &self.images
    }

    pub fn image(&self, kind: ImageKind, name: &str) -> Option<&ImagePlan> {
        self.images.iter().find(|plan| plan.image.kind == kind && plan.image.name == name)
    }

    pub fn point(&self) -> PointRef {
        PointRef { seq: self.manifest.seq, point: self.manifest.point }
    }
}

fn explain(point: PointRef, error: StoreError) -> RestoreError {
    match error {
        StoreError::Damaged { path, what } => {
            RestoreError::Broken { point, what: format!("{path} is damaged: {what}") }
        }
        StoreError::Missing { path } => RestoreError::Broken { point, what: format!("{path} is missing") },
        other => other.into(),
    }
}

/// Points laid under each other, newest first.
#[derive(Debug)]
pub struct Layers {
    newest: Manifest,
    images: Vec<LayeredImage>,
    packs: Vec<PlannedPack>,
    frames: Vec<PlannedFrame>,
}

#[derive(Debug)]
struct LayeredImage {
    pages: Overlay<Source>,
    /// Pages from here on are zero whatever older points hold: the image was shorter once.
    limit: u64,
    complete: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Zero,
    Frame { frame: u32, raw_page: u32 },
}

impl Piece for Source {
    fn skip(&self, units: u64) -> Self {
        match *self {
            Self::Zero => Self::Zero,
            // Within one frame, whose pages are few; only runs of zero pages are long.
            Self::Frame { frame, raw_page } => Self::Frame { frame, raw_page: raw_page + units as u32 },
        }
    }
    fn continues(&self, units: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Frame { frame, raw_page }, Self::Frame { frame: other, raw_page: at }) => {
                frame == other && u64::from(*raw_page) + units == u64::from(*at)
            }
            (Self::Zero, Self::Frame { .. }) | (Self::Frame { .. }, Self::Zero) => false,
        }
    }
}

impl Layers {
    pub fn new(newest: &Manifest) -> Self {
        let images = newest.meta.images.iter().map(|image| LayeredImage {
            pages: Overlay::default(),
            limit: pages_for(image.bytes),
            complete: false,
        });
        Self { images: images.collect(), newest: newest.clone(), packs: Vec::new(), frames: Vec::new() }
    }

    /// Reads the indices of the next older layer and lays it under those before it. `wanted` is for errors.
    pub async fn add_layer(
        &mut self,
        objects: &dyn Objects,
        layer: &Layer,
        wanted: PointRef,
    ) -> Result<(), RestoreError> {
        let mut indices = Vec::with_capacity(layer.manifest.packs.len());
        for pack in &layer.manifest.packs {
            let path = layer.pack_path(pack.id);
            let index = read_index_at(objects, &path, pack).await.map_err(|error| explain(wanted, error))?;
            indices.push((pack.id, path, index));
        }
        self.add(&layer.manifest, indices).map_err(|what| RestoreError::Broken { point: wanted, what })
    }

    /// Lays the next older point under those before it. Says why if an image can't be continued there.
    pub fn add(
        &mut self,
        manifest: &Manifest,
        indices: Vec<(PackId, String, Vec<IndexEntry>)>,
    ) -> Result<(), String> {
        let seq = manifest.seq;
        let mut by_number = BTreeMap::new();
        for (at, image) in self.newest.meta.images.iter().enumerate() {
            let layered = &mut self.images[at];
            if layered.complete {
                continue;
            }
            let here = manifest.image(image.kind, &image.name);
            let here = here.ok_or_else(|| format!("point {seq} has no image `{}`", image.name))?;
            layered.limit = layered.limit.min(pages_for(here.bytes));
            layered.complete = here.full;
            by_number.insert(here.no, at);
        }
        let first_pack = self.packs.len();
        let mut entries: Vec<(u32, IndexEntry)> = Vec::new();
        for (at, (id, path, index)) in indices.into_iter().enumerate() {
            self.packs.push(PlannedPack { id, path, point: PointRef { seq, point: manifest.point } });
            let pack = u32::try_from(first_pack + at).map_err(|_| "too many packs".to_owned())?;
            entries.extend(index.into_iter().map(|entry| (pack, entry)));
        }
        // Newest first within the point as well.
        entries.sort_unstable_by_key(|(_, entry)| std::cmp::Reverse(entry.head.seq));
        for (pack, entry) in entries {
            if let Some(at) = by_number.get(&entry.head.image).copied() {
                self.lay(at, pack, entry)?;
            }
        }
        Ok(())
    }

    fn lay(&mut self, image: usize, pack: u32, entry: IndexEntry) -> Result<(), String> {
        let frame = u32::try_from(self.frames.len()).map_err(|_| "too many frames".to_owned())?;
        let layered = &mut self.images[image];
        let (mut raw_page, mut shows) = (0u32, false);
        for run in &entry.head.runs {
            let end = run.end().unwrap_or(run.first).min(layered.limit);
            let source = match entry.head.codec {
                Codec::Zero => Source::Zero,
                Codec::Plain | Codec::Zstd => Source::Frame { frame, raw_page },
            };
            shows |= run.first < end && layered.pages.lay_under(run.first, end, &source);
            raw_page = raw_page.wrapping_add(run.count);
        }
        if shows && entry.head.codec != Codec::Zero {
            let body_offset = entry.body_offset();
            self.frames.push(PlannedFrame { pack, body_offset, head: entry.head });
        }
        Ok(())
    }

    /// Whether every image has reached a point in which it is complete.
    pub fn is_complete(&self) -> bool {
        self.images.iter().all(|image| image.complete)
    }

    /// Of each image, in the order of the manifest: whether it is complete, and the ranges of pages that are zero by what
    /// the layers say, and not only because none of them speaks of them.
    pub fn zeroes(&mut self) -> Vec<(bool, Vec<(u64, u64)>)> {
        let zeroes = self.newest.meta.images.iter().zip(&mut self.images).map(|(image, layered)| {
            // What the image lost by shrinking does not come back from below.
            let pages = pages_for(image.bytes);
            if layered.limit < pages {
                layered.pages.lay_under(layered.limit, pages, &Source::Zero);
            }
            let zero = layered.pages.iter().filter(|(_, _, source)| **source == Source::Zero);
            (layered.complete, zero.map(|(first, end, _)| (first, end)).collect())
        });
        zeroes.collect()
    }

    pub fn finish(self) -> Plan {
        let frames = self.frames;
        let images = self.newest.meta.images.iter().zip(self.images).map(|(image, layered)| {
            let mut uses: Vec<Use> = layered.pages.iter().filter_map(as_use).collect();
            uses.sort_unstable_by_key(|used| {
                let frame = &frames[used.frame as usize];
                (frame.pack, frame.body_offset, used.raw_page)
            });
            let pages: u64 = uses.iter().map(|used| u64::from(used.count)).sum();
            ImagePlan { image: image.clone(), live_bytes: pages * PAGE as u64, uses }
        });
        let images = images.collect();
        Plan { images, manifest: self.newest, packs: self.packs, frames, pin: None }
    }
}

fn as_use((first, end, source): (u64, u64, &Source)) -> Option<Use> {
    match *source {
        Source::Zero => None,
        Source::Frame { frame, raw_page } => {
            // One frame's pages: at most 64.
            Some(Use { frame, raw_page, first, count: (end - first) as u32 })
        }
    }
}
