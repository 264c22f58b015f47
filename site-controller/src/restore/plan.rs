//! From a recovery point to ordered reads: for each image, which pages of which frames of which packs.
//! A point's layers are its own and those below it, each a point's packs or the fold that took their place.
//! Promises: the newest point wins, and within one point the frame with the higher seq; changed words lie over what is
//! below them; what no frame holds is zero; what a shrunken image lost does not come back when it grows. Memory grows with
//! frames, runs, and pages that are put together, not with the images' size.
//! [`Layers`] is pure; [`Plan::load`] feeds it manifests, indices and lists of references, each checked against its digest.

use crate::{
    restore::{
        RestoreError,
        descent::{descend, read_indexed, read_indices},
        layered::{LayeredImage, Parts},
        planned::{PackIndex, PlannedFrame, PlannedPack, RefsBySeq},
        sources::{Sources, read_refs},
    },
    store::{Folds, Layer, Objects, Pin, PointRef, Store, StoreError, list_folds, paths},
};
use futures_util::StreamExt;
use lifeboat::{
    format::{
        frame::{Codec, FrameHead},
        manifest::{Image, ImageKind, Manifest},
        pack::IndexEntry,
    },
    id::VmId,
    page::{PAGE, pages_for},
    units::Seq,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

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
    pub(super) parts: Arc<Parts>,
}

impl Plan {
    /// Plans one point of `vm`, and pins it: as long as the plan lives, nothing that it needs is removed.
    pub async fn of(store: &Store, vm: VmId, seq: Seq) -> Result<Self, RestoreError> {
        let pin = store.pin(vm, seq).await;
        let pin = pin.ok_or_else(|| StoreError::Missing { path: paths::manifest(vm, seq) })?;
        let plan = Self::load_along(store.objects().as_ref(), vm, pin.path(), pin.folds()).await?;
        Ok(Self { pin: Some(pin), ..plan })
    }

    /// Plans one point of a store that nobody changes meanwhile. Reads along its layers as far as its images need.
    pub async fn load(objects: &dyn Objects, vm: VmId, seq: Seq) -> Result<Self, RestoreError> {
        let folds = list_folds(objects, vm).await?;
        Self::load_along(objects, vm, &[seq], &folds).await
    }

    /// `path` is the point, and what is known of the layers below it, which are read ahead; where it ends, or leads astray,
    /// the layers themselves say what comes next.
    async fn load_along(
        objects: &dyn Objects,
        vm: VmId,
        path: &[Seq],
        folds: &Folds,
    ) -> Result<Self, RestoreError> {
        let mut ahead = std::pin::pin!(descend(objects, vm, path, folds));
        let first = ahead.next().await;
        let mut at = first.ok_or_else(|| RestoreError::NoImage("no layers".into()))??;
        let wanted = PointRef { seq: at.layer.manifest.seq, point: at.layer.manifest.point };
        let broken = |what: String| RestoreError::Broken { point: wanted, what };
        let mut layers = Layers::new(&at.layer.manifest);
        let mut known = path.get(1..).unwrap_or_default().iter();
        loop {
            let indices = at.indices.map_err(|error| explain(wanted, error))?;
            layers.add_indexed(objects, &at.layer, indices, wanted).await?;
            if layers.is_complete() {
                return Ok(layers.finish());
            }
            let base = at.layer.base.ok_or_else(|| broken("its history has no beginning".into()))?;
            let expected = known.next() == Some(&base.seq);
            let below = match if expected { ahead.next().await } else { None } {
                Some(below) => below,
                None => read_indexed(objects, vm, base.seq, folds.get(&base.seq).copied()).await,
            };
            let below = below.map_err(|error| explain(wanted, error))?;
            if below.layer.digest != base.manifest || below.layer.manifest.point != base.point {
                return Err(broken(format!("point {} is not the one it was built on", base.seq)));
            }
            if !expected {
                known = [].iter();
            }
            at = below;
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
    sources: Sources,
    packs: Vec<PlannedPack>,
    frames: Vec<PlannedFrame>,
}

impl Layers {
    pub fn new(newest: &Manifest) -> Self {
        Self {
            images: newest.meta.images.iter().map(LayeredImage::new).collect(),
            newest: newest.clone(),
            sources: Sources::default(),
            packs: Vec::new(),
            frames: Vec::new(),
        }
    }

    /// The point that is being planned.
    pub fn point(&self) -> PointRef {
        PointRef { seq: self.newest.seq, point: self.newest.point }
    }

    /// Whether any page of a frame of the next older point would show, or a reference leads to it.
    pub fn would_show(&self, manifest: &Manifest, head: &FrameHead) -> bool {
        let Some(image) = manifest.meta.images.iter().find(|image| image.no == head.image) else {
            return false;
        };
        let mut images = self.newest.meta.images.iter().zip(&self.images);
        let found = images.find(|(newest, _)| newest.kind == image.kind && newest.name == image.name);
        found.is_some_and(|(_, layered)| layered.would_show(image, head)) || self.sources.want_of(image, head)
    }

    /// From here on older layers only complete what is open: words that have found no base, references. For whoever writes
    /// layers anew as one that needs nothing of what is below; whether an image is complete must be asked before.
    pub fn freeze(&mut self) -> Result<(), String> {
        let mut images = self.newest.meta.images.iter().zip(&mut self.images);
        images.try_for_each(|(image, layered)| layered.freeze(image, &mut self.sources))
    }

    /// Reads the indices and references of the next older layer and lays it under those before it. `wanted` is for errors.
    pub async fn add_layer(
        &mut self,
        objects: &dyn Objects,
        layer: &Layer,
        wanted: PointRef,
    ) -> Result<(), RestoreError> {
        let indices = read_indices(objects, layer).await.map_err(|error| explain(wanted, error))?;
        self.add_indexed(objects, layer, indices, wanted).await
    }

    async fn add_indexed(
        &mut self,
        objects: &dyn Objects,
        layer: &Layer,
        indices: Vec<PackIndex>,
        wanted: PointRef,
    ) -> Result<(), RestoreError> {
        let (manifest, layers) = (&layer.manifest, &*self);
        let would_show = |head: &FrameHead| layers.would_show(manifest, head);
        let refs = read_refs(objects, self.point(), would_show, manifest, &indices).await?;
        self.add(&layer.manifest, indices, &refs).map_err(|what| RestoreError::Broken { point: wanted, what })
    }

    /// Lays the next older point under those before it. `refs` holds what its frames of references say, of those that
    /// [`Self::would_show`]. Says why if an image can't be continued there.
    pub fn add(
        &mut self,
        manifest: &Manifest,
        indices: Vec<PackIndex>,
        refs: &RefsBySeq,
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
        self.sources.enter(manifest)?;
        let first_pack = self.packs.len();
        let mut entries: Vec<(u32, IndexEntry)> = Vec::new();
        for (at, (id, path, index)) in indices.into_iter().enumerate() {
            self.packs.push(PlannedPack { id, path, point: PointRef { seq, point: manifest.point } });
            let pack = u32::try_from(first_pack + at).map_err(|_| "too many packs".to_owned())?;
            entries.extend(index.into_iter().map(|entry| (pack, entry)));
        }
        // RAM comes last, because references of the same point lead there; newest first within an image as well.
        let ram: BTreeSet<u16> = images_of(manifest, ImageKind::Ram).map(|image| image.no).collect();
        entries.sort_unstable_by_key(|(_, entry)| {
            (ram.contains(&entry.head.image), std::cmp::Reverse(entry.head.seq))
        });
        for (pack, entry) in entries {
            let image = by_number.get(&entry.head.image).copied();
            self.lay(manifest, image, pack, entry, refs)?;
        }
        self.sources.leave(manifest);
        Ok(())
    }

    fn lay(
        &mut self,
        manifest: &Manifest,
        image: Option<usize>,
        pack: u32,
        entry: IndexEntry,
        refs: &RefsBySeq,
    ) -> Result<(), String> {
        let frame = u32::try_from(self.frames.len()).map_err(|_| "too many frames".to_owned())?;
        let refs = refs.get(&entry.head.seq).map(Vec::as_slice);
        let mut shows = self.sources.lay(manifest, &entry.head, frame, refs)?;
        if let Some(layered) = image.map(|at| &mut self.images[at]) {
            shows |= layered.lay(manifest, &mut self.sources, frame, &entry.head, refs)?;
        }
        if shows && entry.head.codec != Codec::Zero {
            let body_offset = entry.body_offset();
            self.frames.push(PlannedFrame { pack, body_offset, head: entry.head });
        }
        Ok(())
    }

    /// Whether every image has reached a point in which it is complete, and every reference what it leads to.
    pub fn is_complete(&self) -> bool {
        self.images.iter().all(|image| image.complete) && self.sources.is_settled()
    }

    /// Of each image, in the order of the manifest: whether it is complete, and the ranges of pages that are zero by what
    /// the layers say, and not only because none of them speaks of them. To be asked before [`Self::freeze`].
    pub fn zeroes(&mut self) -> Vec<(bool, Vec<(u64, u64)>)> {
        let images = self.newest.meta.images.iter().zip(&mut self.images);
        images.map(|(image, layered)| (layered.complete, layered.zeroes(image))).collect()
    }

    pub fn finish(self) -> Plan {
        let (frames, chains) = (self.frames, self.sources.finish());
        let images = self.newest.meta.images.iter().zip(self.images).map(|(image, layered)| {
            let parts = layered.finish(&frames, &chains);
            ImagePlan {
                image: image.clone(),
                live_bytes: parts.pages() * PAGE as u64,
                parts: Arc::new(parts),
            }
        });
        let images = images.collect();
        Plan { images, manifest: self.newest, packs: self.packs, frames, pin: None }
    }
}

pub(super) fn images_of(manifest: &Manifest, kind: ImageKind) -> impl Iterator<Item = &Image> {
    manifest.meta.images.iter().filter(move |image| image.kind == kind)
}
