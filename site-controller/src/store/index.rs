//! What the store asks of an index of its points, and one in memory.
//! The index is never the truth: whatever is missing or wrong there is read again from the manifests (I-9).

use super::{
    order::{Ask, Order},
    summary::PointSummary,
};
use lifeboat::{id::VmId, units::Seq};
use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Mutex, MutexGuard, PoisonError},
};

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
