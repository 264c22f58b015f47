//! A VM's history as a chain: which manifests are readable, which follow from the one before, which images can still be
//! put together. Promises: memory grows with one point's images, not with the history. Called by reopen and verify.

use crate::store::{error::StoreError, objects::Objects, paths, summary::PointState};
use lifeboat::{
    chunk::digest::Digest,
    format::{
        header::FileHeader,
        manifest::{BODY_MAX, Image, ImageKind, Manifest},
    },
    id::{PointId, VmId},
    units::Seq,
};
use std::collections::BTreeMap;

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

/// An image's identity across points.
pub type ImageKey = (ImageKind, String);

pub fn key(image: &Image) -> ImageKey {
    (image.kind, image.name.clone())
}

/// The point before, as far as the next one depends on it.
#[derive(Clone, Debug)]
pub struct Link {
    pub seq: Seq,
    pub point: PointId,
    pub manifest: Digest,
    /// Every image of the point, and why it can't be put together if it can't.
    pub images: BTreeMap<ImageKey, Option<String>>,
}

impl Link {
    pub fn is_whole(&self) -> bool {
        self.images.values().all(Option::is_none)
    }
}

/// Walks a history from its oldest manifest to its newest.
#[derive(Debug, Default)]
pub struct ChainWalk {
    last: Option<Link>,
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
    /// A manifest is there but can't be read.
    pub fn unreadable(&mut self, seq: Seq) {
        self.last = None;
        self.broken = Some(format!("the manifest of point {seq} can't be read"));
    }

    /// The next readable manifest. `damage` is what is known to be wrong with this point's own share of an image.
    pub fn follow(
        &mut self,
        manifest: &Manifest,
        digest: Digest,
        damage: impl Fn(&Image) -> Option<String>,
    ) -> Verdict {
        let link = self.link_to(manifest);
        let mut images = BTreeMap::new();
        for image in &manifest.meta.images {
            let inherited = match (&link, image.full) {
                (_, true) => None,
                (Err(why), false) => Some(why.clone()),
                (Ok(None), false) => Some("the point it builds on is missing".to_owned()),
                (Ok(Some(last)), false) => match last.images.get(&key(image)) {
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
        let loose = link.err();
        self.broken = None;
        self.last = Some(Link { seq: manifest.seq, point: manifest.point, manifest: digest, images });
        Verdict { state, loose }
    }

    /// The newest point, if its manifest is readable.
    pub fn last(&self) -> Option<&Link> {
        self.last.as_ref()
    }

    pub fn into_last(self) -> Option<Link> {
        self.last
    }

    /// The point that `manifest` builds on: none where it begins a history (or the older ones were thinned out).
    fn link_to(&self, manifest: &Manifest) -> Result<Option<&Link>, String> {
        let Some(previous) = &manifest.previous else { return Ok(None) };
        let before = match (&self.last, &self.broken) {
            (Some(last), _) => last,
            (None, Some(why)) => return Err(why.clone()),
            // The oldest point there is: older ones may have been thinned out, if it can do without them.
            (None, None) if manifest.meta.images.iter().all(|image| image.full) => return Ok(None),
            (None, None) => return Err("the point it was built on is missing".into()),
        };
        if before.seq.0.checked_add(1) != Some(manifest.seq.0) {
            return Err(format!("the point before it is missing (the newest one there is {})", before.seq));
        }
        if before.manifest != previous.manifest || before.point != previous.point {
            return Err(format!("point {} is not the one it was built on", before.seq));
        }
        Ok(Some(before))
    }
}
