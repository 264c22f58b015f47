//! A VM's history as it can be read now: every manifest, what lies over what, and what is wrong with it.
//! Promises: reads only. Called by `reopen`, and where the index has failed.

use super::{
    chain::ChainWalk,
    error::StoreError,
    finding::{Finding, PointRef},
    layer::{Layer, read_layer},
    listing::{Listing, list},
    objects::Objects,
    paths,
    slot::{Head, History},
    summary::{PointState, PointSummary},
    tree::{Node, Tree},
};
use lifeboat::{
    format::{pruned::PrunedRecord, record},
    id::{PackId, VmId},
    units::{Generation, Seq},
};
use std::collections::BTreeSet;

/// Reads every manifest without changing anything: what the index should hold.
pub(super) async fn scan(objects: &dyn Objects) -> Result<(Vec<Finding>, Vec<PointSummary>), StoreError> {
    let (mut findings, mut truth) = (Vec::new(), Vec::new());
    for (vm, listing) in list(objects).await?.0 {
        let walked = walk(objects, vm, &listing).await?;
        findings.extend(walked.findings);
        truth.extend(walked.summaries);
    }
    Ok((findings, truth))
}

pub(super) struct Walked {
    pub history: History,
    pub summaries: Vec<PointSummary>,
    pub findings: Vec<Finding>,
    /// Packs that a layer in use is made of.
    pub named: BTreeSet<PackId>,
    /// Points that were pruned, and whose removal had not come to its end.
    pub gone: BTreeSet<Seq>,
    /// Something can't be read that might name what else is there.
    pub unreadable: bool,
}

pub(super) async fn walk(objects: &dyn Objects, vm: VmId, listing: &Listing) -> Result<Walked, StoreError> {
    let (mut summaries, mut findings) = (Vec::<PointSummary>::new(), Vec::<Finding>::new());
    let (mut tree, mut unreadable) = (Tree::default(), false);
    let mut generation = listing.generations.last().copied().unwrap_or(Generation::FIRST);
    let damaged = |object: String, error: &StoreError| {
        let what = error.what();
        Finding { vm: Some(vm), point: None, object, what, affects: Vec::new() }
    };
    let pruned = match read_pruned(objects, vm, listing).await {
        Ok(pruned) => pruned,
        Err(error @ (StoreError::Damaged { .. } | StoreError::Disk { .. })) => {
            unreadable = true;
            let no = listing.pruned.last().copied().unwrap_or_default();
            findings.push(damaged(paths::pruned(vm, no), &error));
            None
        }
        Err(error) => return Err(error),
    };
    let mut chain = ChainWalk::over(pruned.clone());
    // Findings whose consequences are still growing: damaged points that follow belong to the newest one.
    let mut cause: Option<usize> = None;
    for seq in listing.manifests.keys().copied() {
        let object = paths::manifest(vm, seq);
        let layer = match layer_of(objects, vm, seq, listing).await? {
            (layer, None) => layer,
            (layer, Some((object, error))) => {
                unreadable = true;
                cause = Some(findings.len());
                findings.push(damaged(object, &error));
                layer
            }
        };
        let Some(layer) = layer else {
            chain.unreadable(seq);
            continue;
        };
        let manifest = &layer.manifest;
        let lost = lost_pack(&layer, listing);
        let verdict = chain.follow(&layer, |_| lost.clone());
        let at = PointRef { seq, point: manifest.point };
        for what in lost.into_iter().chain(verdict.loose) {
            cause = Some(findings.len());
            let (point, object) = (Some(at), object.clone());
            findings.push(Finding { vm: Some(vm), point, object, what, affects: Vec::new() });
        }
        if let (PointState::Damaged(_), Some(cause)) = (&verdict.state, cause) {
            findings[cause].affects.push(at);
        }
        generation = generation.max(manifest.generation);
        tree.0.insert(seq, Node::of(&layer, verdict.state == PointState::Ok));
        summaries.push(PointSummary::of(manifest, layer.record_bytes, verdict.state));
    }
    let gone = pruned_points(&tree, pruned.as_ref());
    summaries.retain(|summary| !gone.contains(&summary.seq));
    tree.0.retain(|seq, _| !gone.contains(seq));
    let named = tree.0.values().flat_map(|node| node.packs.iter().copied()).collect();
    let head = chain.into_last().zip(summaries.last()).map(|(link, newest)| Head {
        point: newest.point,
        seq: newest.seq,
        cut_at: newest.cut_at,
        committed_at: newest.committed_at,
        generation: newest.generation,
        link,
    });
    let top = listing.manifests.keys().next_back().copied().unwrap_or(Seq(0));
    let frozen = unreadable.then(|| "something in its history can't be read".to_owned());
    let name = summaries.last().map(|summary| summary.name.clone()).unwrap_or_default();
    let history = History { generation, top, head, doubt: None, tree, pruned, frozen, name };
    Ok(Walked { history, summaries, findings, named, gone, unreadable })
}

/// The layer of a point; where its fold can't be read, its own, and none where its manifest can't. With what was wrong.
async fn layer_of(
    objects: &dyn Objects,
    vm: VmId,
    seq: Seq,
    listing: &Listing,
) -> Result<(Option<Layer>, Option<(String, StoreError)>), StoreError> {
    let fold = listing.folds.get(&seq).and_then(|folds| folds.last().copied());
    let mut wrong = None;
    for fold in [fold, None] {
        match read_layer(objects, vm, seq, fold).await {
            Ok(layer) => return Ok((Some(layer), wrong)),
            Err(error @ (StoreError::Damaged { .. } | StoreError::Disk { .. })) => {
                let object = fold.map_or_else(|| paths::manifest(vm, seq), |no| paths::fold(vm, seq, no));
                wrong = Some((object, error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((None, wrong))
}

/// Points that were pruned, and that nothing lies over which was not.
fn pruned_points(tree: &Tree, pruned: Option<&PrunedRecord>) -> BTreeSet<Seq> {
    let Some(pruned) = pruned else { return BTreeSet::new() };
    let newest = tree.0.keys().next_back().copied();
    let stays = |seq: &Seq| Some(*seq) == newest || pruned.gap(*seq).is_none();
    let needed = tree.needed(tree.0.keys().copied().filter(stays));
    tree.0.keys().copied().filter(|seq| !needed.contains(seq)).collect()
}

/// The newest record of what was pruned.
pub async fn read_pruned(
    objects: &dyn Objects,
    vm: VmId,
    listing: &Listing,
) -> Result<Option<PrunedRecord>, StoreError> {
    let Some(no) = listing.pruned.last().copied() else { return Ok(None) };
    let path = paths::pruned(vm, no);
    let bytes = objects.get(&path, record::FILE_MAX).await?;
    match PrunedRecord::decode(&bytes) {
        Ok(pruned) if pruned.vm == vm && pruned.no == no => Ok(Some(pruned)),
        Ok(_) => Err(StoreError::damaged(&path, "it is the record of another VM or another time")),
        Err(error) => Err(StoreError::damaged(&path, error)),
    }
}

fn lost_pack(layer: &Layer, listing: &Listing) -> Option<String> {
    let there = if layer.fold.is_some() { &listing.fold_packs } else { &listing.packs };
    layer.manifest.packs.iter().find_map(|pack| match there.get(&pack.id) {
        Some(len) if *len == pack.len => None,
        Some(len) => Some(format!("pack {} has {len} bytes instead of {}", pack.id, pack.len)),
        None => Some(format!("pack {} is missing", pack.id)),
    })
}
