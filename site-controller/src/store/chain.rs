//! A VM's history as a chain: which manifests are readable, which follow from the one before (or from a gap that was
//! pruned on purpose), which images can still be put together from the layers that are there. Promises: memory grows with
//! the number of points; images are held once for all that have the same. Called by reopen and verify.

use crate::store::{layer::Layer, summary::PointState};
use lifeboat::{
    chunk::digest::Digest,
    format::{
        manifest::{Image, ImageKind},
        pruned::PrunedRecord,
    },
    id::PointId,
    units::Seq,
};
use std::{collections::BTreeMap, sync::Arc};

/// An image's identity across points.
pub type ImageKey = (ImageKind, String);

pub fn key(image: &Image) -> ImageKey {
    (image.kind, image.name.clone())
}

/// Every image of a point, and why it can't be put together if it can't.
pub type Images = BTreeMap<ImageKey, Option<String>>;

/// A point, as far as others depend on it.
#[derive(Clone, Debug)]
pub struct Link {
    pub seq: Seq,
    pub point: PointId,
    pub manifest: Digest,
    pub images: Arc<Images>,
}

impl Link {
    pub fn is_whole(&self) -> bool {
        self.images.values().all(Option::is_none)
    }

    fn is(&self, point: PointId, manifest: Digest) -> bool {
        self.point == point && self.manifest == manifest
    }
}

/// Walks a history from its oldest manifest to its newest.
#[derive(Debug, Default)]
pub struct ChainWalk {
    pruned: Option<PrunedRecord>,
    links: BTreeMap<Seq, Link>,
    last: Option<Seq>,
    broken: Option<String>,
}

/// What the walk learnt about one point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub state: PointState,
    /// The point does not follow from the one before it, although it says so.
    pub loose: Option<String>,
}

impl ChainWalk {
    /// A walk that knows which points were pruned.
    pub fn over(pruned: Option<PrunedRecord>) -> Self {
        Self { pruned, ..Self::default() }
    }

    /// A manifest is there but can't be read.
    pub fn unreadable(&mut self, seq: Seq) {
        self.last = None;
        self.broken = Some(format!("the manifest of point {seq} can't be read"));
    }

    /// The next readable point. `damage` is what is known to be wrong with this layer's own share of an image.
    pub fn follow(&mut self, layer: &Layer, damage: impl Fn(&Image) -> Option<String>) -> Verdict {
        let manifest = &layer.manifest;
        let link = self.link_to(layer);
        let ground = self.ground(layer, &link);
        let mut images = Images::new();
        for image in &manifest.meta.images {
            let inherited = match (&ground, image.full) {
                (_, true) => None,
                (Err(why), false) => Some(why.clone()),
                (Ok(None), false) => Some("the point it builds on is missing".to_owned()),
                (Ok(Some(below)), false) => match below.images.get(&key(image)) {
                    Some(state) => state.clone(),
                    None => Some(format!("the point before it has no image `{}`", image.name)),
                },
            };
            images.insert(key(image), damage(image).or(inherited));
        }
        let state = match images.iter().find_map(|((_, name), why)| why.as_ref().map(|why| (name, why))) {
            Some((name, why)) => PointState::Damaged(format!("image `{name}`: {why}")),
            None => PointState::Ok,
        };
        let same = ground.ok().flatten().or_else(|| self.last()).filter(|other| *other.images == images);
        let images = same.map_or_else(|| Arc::new(images), |other| other.images.clone());
        let (seq, point) = (manifest.seq, manifest.point);
        self.broken = None;
        self.last = Some(seq);
        self.links.insert(seq, Link { seq, point, manifest: layer.digest, images });
        Verdict { state, loose: link.err() }
    }

    /// The newest point, if its manifest is readable.
    pub fn last(&self) -> Option<&Link> {
        self.links.get(&self.last?)
    }

    pub fn into_last(mut self) -> Option<Link> {
        self.links.remove(&self.last?)
    }

    /// The point that the layer lies over: none where it is complete.
    fn ground(&self, layer: &Layer, link: &Result<Option<Seq>, String>) -> Result<Option<&Link>, String> {
        if layer.fold.is_none() {
            return link.clone().map(|seq| seq.and_then(|seq| self.links.get(&seq)));
        }
        let Some(base) = layer.base else { return Ok(None) };
        match self.links.get(&base.seq) {
            Some(found) if found.is(base.point, base.manifest) => Ok(Some(found)),
            Some(_) => Err(format!("point {} is not the one that its fold lies over", base.seq)),
            None => Err(format!("point {}, which its fold lies over, is missing", base.seq)),
        }
    }

    /// The point before, where it is there: none where the layer's point begins a history, or follows a gap.
    fn link_to(&self, layer: &Layer) -> Result<Option<Seq>, String> {
        let manifest = &layer.manifest;
        let Some(previous) = &manifest.previous else { return Ok(None) };
        let before = Seq(manifest.seq.0.saturating_sub(1));
        if let Some(last) = self.last().filter(|last| last.seq == before) {
            if last.is(previous.point, previous.manifest) {
                return Ok(Some(before));
            }
            return Err(format!("point {before} is not the one it was built on"));
        }
        if let Some(gap) = self.pruned.as_ref().and_then(|pruned| pruned.gap(before)) {
            if gap.last == before && gap.end != *previous {
                return Err(format!("point {before}, which was pruned, is not the one it was built on"));
            }
            if let (Some(last), Some(named)) = (self.last(), &gap.before)
                && last.seq.0 + 1 == gap.first.0
                && !last.is(named.point, named.manifest)
            {
                let (first, last) = (gap.first, last.seq);
                return Err(format!("point {last} is not the one that pruned point {first} was built on"));
            }
            return Ok(None);
        }
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        match self.last() {
            // The oldest point there is: older ones may have been taken away by hand, if it can do without them.
            None if manifest.meta.images.iter().all(|image| image.full) => Ok(None),
            None => Err("the point it was built on is missing".into()),
            Some(last) => {
                Err(format!("the point before it is missing (the newest one there is {})", last.seq))
            }
        }
    }
}
