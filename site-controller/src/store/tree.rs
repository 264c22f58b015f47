//! A VM's points in memory: which lies over which, and what it takes on disk. Pure.
//! Promises: a point lies over an older one, so that every path ends. Built by reopen, changed by commit, fold and prune
//! under the VM's lock, and only after the disk has it. Memory: some 200 bytes for each point.

use crate::store::{layer::Folds, layer::Layer, paths};
use lifeboat::{
    chunk::digest::Digest,
    format::manifest::PreviousRef,
    id::{PackId, PointId, VmId},
    units::{Seq, UnixMs},
};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug)]
pub struct Node {
    pub point: PointId,
    pub manifest: Digest,
    /// What its manifest names as the point before it.
    pub before: Option<PreviousRef>,
    /// The point that its layer lies over.
    pub base: Option<Seq>,
    /// The number of its fold; none while its own packs are there.
    pub fold: Option<u32>,
    pub packs: Vec<PackId>,
    pub pack_bytes: u64,
    pub record_bytes: u64,
    pub cut_at: UnixMs,
    /// Whether all of it can be restored, as far as reopening could tell.
    pub whole: bool,
}

impl Node {
    pub fn of(layer: &Layer, whole: bool) -> Self {
        let manifest = &layer.manifest;
        Self {
            point: manifest.point,
            manifest: layer.digest,
            before: manifest.previous,
            base: layer.base.map(|base| base.seq),
            fold: layer.fold,
            packs: manifest.packs.iter().map(|pack| pack.id).collect(),
            pack_bytes: layer.pack_bytes(),
            record_bytes: layer.record_bytes,
            cut_at: manifest.meta.cut_at,
            whole,
        }
    }

    /// How later manifests name it.
    pub fn named(&self) -> PreviousRef {
        PreviousRef { point: self.point, manifest: self.manifest }
    }

    /// What its layer consists of, but for the manifest: what a fold of the point replaces.
    pub fn layer_paths(&self, vm: VmId, seq: Seq) -> Vec<String> {
        let place = if self.fold.is_some() { paths::fold_pack } else { paths::pack };
        let record = self.fold.map(|no| paths::fold(vm, seq, no));
        record.into_iter().chain(self.packs.iter().map(|id| place(vm, *id))).collect()
    }
}

#[derive(Clone, Debug, Default)]
pub struct Tree(pub BTreeMap<Seq, Node>);

impl Tree {
    /// The points whose layers make up `seq`, from it downwards: as far as they are there.
    pub fn path(&self, seq: Seq) -> Vec<Seq> {
        let mut path = Vec::new();
        let mut at = Some(seq);
        while let Some((seq, node)) = at.and_then(|seq| Some((seq, self.0.get(&seq)?))) {
            path.push(seq);
            at = node.base.filter(|base| *base < seq);
        }
        path
    }

    /// The folds along a path.
    pub fn folds(&self, path: &[Seq]) -> Folds {
        path.iter().filter_map(|seq| Some((*seq, self.0.get(seq)?.fold?))).collect()
    }

    /// Points that others lie over, with how many do.
    pub fn children(&self) -> BTreeMap<Seq, usize> {
        let mut children = BTreeMap::new();
        for base in self.0.values().filter_map(|node| node.base) {
            *children.entry(base).or_default() += 1;
        }
        children
    }

    /// All points on the paths of `seqs`.
    pub fn needed(&self, seqs: impl Iterator<Item = Seq>) -> BTreeSet<Seq> {
        let mut needed = BTreeSet::new();
        for seq in seqs {
            let mut at = Some(seq);
            while let Some(seq) = at.filter(|seq| needed.insert(*seq)) {
                at = self.0.get(&seq).and_then(|node| node.base).filter(|base| *base < seq);
            }
        }
        needed
    }
}
