//! A point's layer as it lies in the store now: its own packs over the point before it, or the fold that took their
//! place, over an older point or over none. Promises: a fold is believed only if it names the digest of the very manifest
//! whose point it serves, and says of each image what a manifest would. Called by restore, verify, reopen and folding.

use crate::store::{
    error::StoreError,
    objects::Objects,
    paths::{self, Named},
};
use lifeboat::{
    chunk::digest::Digest,
    format::{
        fold::{BaseRef, FoldRecord},
        header::FileHeader,
        manifest::{BODY_MAX, ImageKind, Manifest},
        record,
    },
    id::{PackId, VmId},
    units::Seq,
};
use std::collections::BTreeMap;

/// The number of the fold that holds, for each point that has been folded.
pub type Folds = BTreeMap<Seq, u32>;

#[derive(Clone, Debug)]
pub struct Layer {
    /// The point's manifest, but for what the fold changed: its packs, and which of its images are full.
    pub manifest: Manifest,
    /// Of the manifest as it is stored.
    pub digest: Digest,
    /// The point that this layer lies over; none where it is complete.
    pub base: Option<BaseRef>,
    /// The fold's number, if this is one.
    pub fold: Option<u32>,
    /// Bytes of manifest and fold record on disk.
    pub record_bytes: u64,
}

impl Layer {
    /// Where one of the layer's packs lies.
    pub fn pack_path(&self, id: PackId) -> String {
        let place = if self.fold.is_some() { paths::fold_pack } else { paths::pack };
        place(self.manifest.vm, id)
    }

    pub fn pack_bytes(&self) -> u64 {
        self.manifest.packs.iter().fold(0, |sum, pack| sum.saturating_add(pack.len))
    }

    pub(super) fn own(manifest: Manifest, digest: Digest, record_bytes: u64) -> Self {
        let complete = manifest.meta.images.iter().all(|image| image.full);
        let base = manifest.previous.filter(|_| !complete).map(|previous| BaseRef {
            // A first point is complete, or its manifest is refused.
            seq: Seq(manifest.seq.0.saturating_sub(1)),
            point: previous.point,
            manifest: previous.manifest,
        });
        Self { manifest, digest, base, fold: None, record_bytes }
    }

    fn folded(mut self, fold: FoldRecord, no: u32, bytes: u64) -> Result<Self, &'static str> {
        let own = &mut self.manifest;
        if fold.vm != own.vm || fold.seq != own.seq || fold.point != own.point || fold.no != no {
            return Err("it is the fold of another point");
        }
        if fold.manifest != self.digest {
            return Err("the manifest of its point is not the one it was made for");
        }
        let mut known = 0;
        for image in &mut own.meta.images {
            image.full = fold.full.binary_search(&image.no).is_ok();
            known += usize::from(image.full);
            if !image.full && (image.kind == ImageKind::Blob || fold.base.is_none()) {
                return Err("an image is not complete that must be");
            }
        }
        if known != fold.full.len() {
            return Err("it names an image that its point does not have");
        }
        own.packs = fold.packs;
        Ok(Self { base: fold.base, fold: Some(no), record_bytes: self.record_bytes + bytes, ..self })
    }
}

/// Reads, checks and decodes the manifest of one point; also its digest and length.
pub async fn read_manifest(
    objects: &dyn Objects,
    vm: VmId,
    seq: Seq,
) -> Result<(Manifest, Digest, u64), StoreError> {
    let path = paths::manifest(vm, seq);
    let bytes = objects.get(&path, u64::from(BODY_MAX) + FileHeader::LEN as u64).await?;
    let (manifest, digest) = Manifest::decode(&bytes).map_err(|error| StoreError::damaged(&path, error))?;
    if manifest.vm != vm || manifest.seq != seq {
        return Err(StoreError::damaged(&path, "it is the manifest of another point"));
    }
    Ok((manifest, digest, bytes.len() as u64))
}

/// Reads and checks a point's manifest and, where `fold` names one, its fold.
pub async fn read_layer(
    objects: &dyn Objects,
    vm: VmId,
    seq: Seq,
    fold: Option<u32>,
) -> Result<Layer, StoreError> {
    let (manifest, digest, len) = read_manifest(objects, vm, seq).await?;
    let own = Layer::own(manifest, digest, len);
    let Some(no) = fold else { return Ok(own) };
    let path = paths::fold(vm, seq, no);
    let bytes = objects.get(&path, record::FILE_MAX).await?;
    let fold = FoldRecord::decode(&bytes).map_err(|error| StoreError::damaged(&path, error))?;
    own.folded(fold, no, bytes.len() as u64).map_err(|why| StoreError::damaged(&path, why))
}

/// The folds that hold in a VM's history, as its folder tells.
pub async fn list_folds(objects: &dyn Objects, vm: VmId) -> Result<Folds, StoreError> {
    let mut folds = Folds::new();
    for object in objects.list(&paths::folds_of(vm)).await? {
        if let Named::Fold(_, seq, no) = paths::parse(&object.path) {
            let held = folds.entry(seq).or_default();
            *held = no.max(*held);
        }
    }
    Ok(folds)
}
