//! Version 1 of a manifest's body, and of what an agent says of a point, as they were first shipped: points said only
//! whether they hold memory, and belonged to no cut of a group.
//! Promises: nothing is lost on the way to today's form. Called by `manifest`, and by the wire for peers that know no other.

use super::{Consistency, Generation, Image, PackRef, PointId, PointStats, PreviousRef, Seq, UnixMs, VmId};
use serde::{Deserialize, Serialize};

/// As it stands in a manifest of version 1, and in `End` of the protocol's versions 1 to 4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointMeta {
    pub cut_at: UnixMs,
    pub images: Vec<Image>,
    pub has_memory: bool,
    pub was_running: bool,
    pub stats: PointStats,
}

/// A manifest's body. It is only read.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
pub(super) struct Manifest {
    pub vm: VmId,
    pub vm_name: String,
    pub generation: Generation,
    pub point: PointId,
    pub seq: Seq,
    pub previous: Option<PreviousRef>,
    pub committed_at: UnixMs,
    pub meta: PointMeta,
    pub packs: Vec<PackRef>,
    pub wire_bytes: u64,
}

impl From<PointMeta> for super::PointMeta {
    fn from(meta: PointMeta) -> Self {
        let PointMeta { cut_at, images, has_memory, was_running, stats } = meta;
        let consistency = if has_memory { Consistency::Memory } else { Consistency::Crash };
        Self { cut_at, images, consistency, was_running, stats, cut: None }
    }
}

/// For a peer that knows no other form: that file systems were frozen and that a group was cut is left out.
impl From<super::PointMeta> for PointMeta {
    fn from(meta: super::PointMeta) -> Self {
        let has_memory = meta.has_memory();
        let super::PointMeta { cut_at, images, consistency: _, was_running, stats, cut: _ } = meta;
        Self { cut_at, images, has_memory, was_running, stats }
    }
}

impl From<Manifest> for super::Manifest {
    fn from(manifest: Manifest) -> Self {
        let Manifest { vm, vm_name, generation, point, seq, previous, committed_at, meta, packs, wire_bytes } =
            manifest;
        let meta = meta.into();
        Self { vm, vm_name, generation, point, seq, previous, committed_at, meta, packs, wire_bytes }
    }
}
