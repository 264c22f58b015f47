//! A point in one line.

use lifeboat::{
    format::{
        header::FileHeader,
        manifest::{Consistency, ImageKind, Manifest, blob},
    },
    id::{CutId, PointId, VmId},
    units::{Generation, Seq, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Whether a point can be restored, as far as manifests and the presence of packs can tell; `verify` knows more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PointState {
    Ok,
    Damaged(String),
}

impl fmt::Display for PointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => write!(f, "ok"),
            Self::Damaged(why) => write!(f, "damaged: {why}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PointSummary {
    pub vm: VmId,
    pub name: String,
    pub point: PointId,
    pub seq: Seq,
    pub cut_at: UnixMs,
    pub committed_at: UnixMs,
    pub generation: Generation,
    pub has_memory: bool,
    /// Disks that the site read itself, and no state of the VM that anybody should go back to unasked.
    #[serde(default)]
    pub seed: bool,
    /// Disks of a VM that was off, as they stood.
    #[serde(default)]
    pub at_rest: bool,
    /// It was off because somebody wanted it so: its replica is not started.
    #[serde(default)]
    pub stays_off: bool,
    pub consistency: Consistency,
    /// The cut of a group that it is one part of.
    pub cut: Option<CutId>,
    pub memory_changed_bytes: u64,
    pub disk_changed_bytes: u64,
    pub wire_bytes: u64,
    pub pause_us: u64,
    /// Bytes of this point's packs and manifest on disk.
    pub stored_bytes: u64,
    pub state: PointState,
}

impl PointSummary {
    pub fn of(manifest: &Manifest, manifest_len: u64, state: PointState) -> Self {
        let packs = manifest.packs.iter().fold(0u64, |sum, pack| sum.saturating_add(pack.len));
        debug_assert!(manifest_len >= FileHeader::LEN as u64);
        Self {
            vm: manifest.vm,
            name: manifest.vm_name.clone(),
            point: manifest.point,
            seq: manifest.seq,
            cut_at: manifest.meta.cut_at,
            committed_at: manifest.committed_at,
            generation: manifest.generation,
            has_memory: manifest.meta.has_memory(),
            seed: manifest.image(ImageKind::Blob, blob::SEED).is_some(),
            at_rest: manifest.image(ImageKind::Blob, blob::AT_REST).is_some(),
            stays_off: manifest.stays_off(),
            consistency: manifest.meta.consistency,
            cut: manifest.meta.cut,
            memory_changed_bytes: manifest.meta.stats.memory_changed_bytes,
            disk_changed_bytes: manifest.meta.stats.disk_changed_bytes,
            wire_bytes: manifest.wire_bytes,
            pause_us: manifest.meta.stats.pause_us,
            stored_bytes: packs.saturating_add(manifest_len),
            state,
        }
    }
}
