//! A point in one line, and what the store asks of an index of them.
//! The index is never the truth: whatever is missing or wrong there is read again from the manifests (I-9).

use super::order::{Ask, Order};
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
use std::{
    collections::BTreeMap,
    fmt::{self, Debug},
    sync::{Mutex, MutexGuard, PoisonError},
};

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

/// An index of summaries. It may lose anything at any time, but then says so by answering `None`.
pub trait SummaryIndex: Send + Sync + Debug {
    /// Makes the index hold exactly `truth`; returns how many entries were wrong or missing.
    fn reconcile(&self, truth: &[PointSummary]) -> u64;
    fn put(&self, summary: &PointSummary);
    /// Points of one VM that are gone.
    fn forget(&self, vm: VmId, seqs: &[Seq]);
    /// The points of one VM by seq, or of all VMs by VM and seq; `None` if the index can't be trusted any more.
    fn points(&self, vm: Option<VmId>) -> Option<Vec<PointSummary>>;
    /// One point of a VM, if it has such a one, without looking at the others; `None` as for [`Self::points`].
    fn find(&self, vm: VmId, ask: Ask) -> Option<Option<PointSummary>>;
}

/// An index for tests, and for when there is no room on disk for a better one.
#[derive(Debug, Default)]
pub struct MemoryIndex(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    points: BTreeMap<(VmId, Seq), PointSummary>,
    order: Order,
}

impl MemoryIndex {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SummaryIndex for MemoryIndex {
    fn reconcile(&self, truth: &[PointSummary]) -> u64 {
        let points = truth.iter().map(|summary| ((summary.vm, summary.seq), summary.clone())).collect();
        *self.held() = Held { points, order: Order::of(truth) };
        0
    }
    fn put(&self, summary: &PointSummary) {
        let mut held = self.held();
        held.order.put(summary);
        held.points.insert((summary.vm, summary.seq), summary.clone());
    }
    fn forget(&self, vm: VmId, seqs: &[Seq]) {
        let mut held = self.held();
        for seq in seqs {
            held.order.forget(vm, *seq);
            held.points.remove(&(vm, *seq));
        }
    }
    fn points(&self, vm: Option<VmId>) -> Option<Vec<PointSummary>> {
        let held = self.held();
        Some(held.points.values().filter(|summary| vm.is_none_or(|vm| summary.vm == vm)).cloned().collect())
    }
    fn find(&self, vm: VmId, ask: Ask) -> Option<Option<PointSummary>> {
        let held = self.held();
        Some(held.order.find(vm, ask).and_then(|seq| held.points.get(&(vm, seq)).cloned()))
    }
}
