//! What the store keeps of each VM in memory: the head of its history, what is being received, who reads.

use super::{chain::Link, pins::Pins, tree::Tree};
use lifeboat::{
    format::pruned::PrunedRecord,
    id::{PackId, PointId},
    units::{Generation, Seq, UnixMs},
};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// One VM's place.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub history: Arc<tokio::sync::Mutex<History>>,
    pub admission: Mutex<Admission>,
    pub pins: Mutex<Pins>,
}

#[derive(Debug, Default)]
pub(super) struct Admission {
    /// Points being received.
    pub open: BTreeSet<PointId>,
    /// Packs of points that were dropped without a word; deleted when the next point is opened.
    pub garbage: Vec<PackId>,
}

/// What the next commit must follow.
#[derive(Debug)]
pub(super) struct History {
    pub generation: Generation,
    /// The highest seq that any manifest of this VM has, readable or not.
    pub top: Seq,
    pub head: Option<Head>,
    /// A manifest whose writing failed and whose removal failed too: it may be there. Nothing may be built on top before
    /// that is settled.
    pub doubt: Option<(Seq, Vec<PackId>)>,
    /// Every point, and what it lies over.
    pub tree: Tree,
    /// The newest record of what was pruned.
    pub pruned: Option<PrunedRecord>,
    /// Why nothing may be folded or pruned until the next start, if so.
    pub frozen: Option<String>,
    /// The VM's name, as its newest point has it.
    pub name: String,
}

impl Default for History {
    fn default() -> Self {
        Self {
            generation: Generation::FIRST,
            top: Seq(0),
            head: None,
            doubt: None,
            tree: Tree::default(),
            pruned: None,
            frozen: None,
            name: String::new(),
        }
    }
}

/// The newest durable point of a VM.
#[derive(Clone, Debug)]
pub struct Head {
    pub point: PointId,
    pub seq: Seq,
    pub cut_at: UnixMs,
    pub committed_at: UnixMs,
    /// The generation that wrote it.
    pub generation: Generation,
    pub(super) link: Link,
}

impl Head {
    /// Whether all of it can be restored, so that a point may be built on it.
    pub fn is_whole(&self) -> bool {
        self.link.is_whole()
    }
}

impl Slot {
    pub fn pins(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
