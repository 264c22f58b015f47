//! Start-up: what the process before left behind, after any ending, becomes a store again.
//!
//! * Partial uploads are removed: nobody could see them.
//! * A manifest at the end of a history that is cut short, which only a file system that lies about syncs can leave, is
//!   moved to `quarantine/` and reported. Never deleted; its packs are kept as long as it lies there.
//! * Any other manifest that can't be read stays where it is and is reported; points that build on it are damaged.
//! * A torn record of a fold or of pruning is set aside likewise; the one before it holds.
//! * Packs that nothing names belong to points or folds that were never committed, or that were replaced; they are
//!   deleted, with older folds and points that were pruned, unless some manifest of the VM can't be read: then nobody
//!   knows, and they are kept.
//!
//! Promises: refuses to guess; reports all that it did. Called by `Store::open`.

use crate::store::{
    chain::ChainWalk,
    error::StoreError,
    finding::{Finding, PointRef},
    layer::{Layer, read_layer},
    leftovers,
    objects::Objects,
    paths::{self, Named},
    site::{Head, History},
    summary::{PointState, PointSummary, SummaryIndex},
    tree::{Node, Tree},
};
use lifeboat::{
    format::{
        header::{FileHeader, Kind},
        manifest::BODY_MAX,
        pruned::PrunedRecord,
        record,
    },
    id::{PackId, VmId},
    units::{Generation, Seq, UnixMs},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// What reopening found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReopenReport {
    pub vms: u64,
    pub points: u64,
    pub damaged_points: u64,
    pub partials_removed: u64,
    pub orphan_packs_removed: u64,
    /// Packs that no readable manifest names, kept because one that can't be read might.
    pub orphan_packs_kept: u64,
    /// Points, folds and records that had been pruned or replaced, and whose removal had not come to its end.
    pub leftovers_removed: u64,
    /// Entries that the index lacked or had wrong.
    pub index_entries_corrected: u64,
    pub findings: Vec<Finding>,
}

/// What lies under one VM's directory.
#[derive(Debug, Default)]
pub struct Listing {
    pub manifests: BTreeMap<Seq, u64>,
    pub packs: BTreeMap<PackId, u64>,
    pub generations: BTreeSet<Generation>,
    /// Numbers of each point's folds.
    pub folds: BTreeMap<Seq, BTreeSet<u32>>,
    pub fold_packs: BTreeMap<PackId, u64>,
    /// Bytes of fold records, all together.
    pub fold_bytes: u64,
    pub pruned: BTreeSet<u64>,
}

impl Listing {
    /// Bytes of everything that verifying reads.
    pub fn bytes(&self) -> u64 {
        let objects = self.manifests.values().chain(self.packs.values()).chain(self.fold_packs.values());
        objects.sum::<u64>() + self.fold_bytes
    }
}

pub async fn list(objects: &dyn Objects) -> Result<(BTreeMap<VmId, Listing>, Vec<String>), StoreError> {
    let (mut vms, mut foreign) = (BTreeMap::<VmId, Listing>::new(), Vec::new());
    for object in objects.list(paths::VMS).await? {
        match paths::parse(&object.path) {
            Named::Manifest(vm, seq) => {
                vms.entry(vm).or_default().manifests.insert(seq, object.bytes);
            }
            Named::Pack(vm, id) => {
                vms.entry(vm).or_default().packs.insert(id, object.bytes);
            }
            Named::Generation(vm, generation) => {
                vms.entry(vm).or_default().generations.insert(generation);
            }
            Named::Fold(vm, seq, no) => {
                let listing = vms.entry(vm).or_default();
                listing.fold_bytes += object.bytes;
                listing.folds.entry(seq).or_default().insert(no);
            }
            Named::FoldPack(vm, id) => {
                vms.entry(vm).or_default().fold_packs.insert(id, object.bytes);
            }
            Named::Pruned(vm, no) => {
                vms.entry(vm).or_default().pruned.insert(no);
            }
            // Read when it is asked for.
            Named::Owner(..) => {}
            Named::Foreign => foreign.push(object.path),
        }
    }
    Ok((vms, foreign))
}

pub(super) async fn reopen(
    objects: &dyn Objects,
    now: UnixMs,
    index: Arc<dyn SummaryIndex>,
) -> Result<(BTreeMap<VmId, History>, ReopenReport), StoreError> {
    let mut report = ReopenReport { partials_removed: objects.sweep_partials().await?, ..Default::default() };
    let (vms, foreign) = list(objects).await?;
    report.findings.extend(foreign.into_iter().map(|object| {
        let what = "not put there by this store; left alone".into();
        Finding { vm: None, point: None, object, what, affects: Vec::new() }
    }));
    let (mut histories, mut truth) = (BTreeMap::new(), Vec::new());
    for (vm, mut listing) in vms {
        set_torn_aside(objects, now, vm, &mut listing, &mut report).await?;
        leftovers::set_torn_records_aside(objects, now, vm, &mut listing, &mut report).await?;
        let walked = walk(objects, vm, &listing).await?;
        leftovers::remove(objects, vm, &listing, &walked, &mut report).await?;
        report.vms += 1;
        report.points += walked.summaries.len() as u64;
        let damaged = walked.summaries.iter().filter(|summary| summary.state != PointState::Ok);
        report.damaged_points += damaged.count() as u64;
        report.findings.extend(walked.findings);
        truth.extend(walked.summaries);
        histories.insert(vm, walked.history);
    }
    let reconciled = tokio::task::spawn_blocking(move || index.reconcile(&truth)).await;
    report.index_entries_corrected = reconciled.unwrap_or_default();
    Ok((histories, report))
}

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
    findings: Vec<Finding>,
    /// Packs that a layer in use is made of.
    pub named: BTreeSet<PackId>,
    /// Points that were pruned, and whose removal had not come to its end.
    pub gone: BTreeSet<Seq>,
    /// Something can't be read that might name what else is there.
    pub unreadable: bool,
}

async fn walk(objects: &dyn Objects, vm: VmId, listing: &Listing) -> Result<Walked, StoreError> {
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

async fn set_torn_aside(
    objects: &dyn Objects,
    now: UnixMs,
    vm: VmId,
    listing: &mut Listing,
    report: &mut ReopenReport,
) -> Result<(), StoreError> {
    while let Some((seq, len)) = listing.manifests.last_key_value().map(|(seq, len)| (*seq, *len)) {
        let from = paths::manifest(vm, seq);
        if len > MANIFEST_MAX {
            return Ok(());
        }
        let bytes = match objects.get(&from, MANIFEST_MAX).await {
            Ok(bytes) if is_torn(&bytes, Kind::Manifest) => bytes,
            Ok(_) | Err(StoreError::Damaged { .. } | StoreError::Disk { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let to = paths::quarantined_manifest(vm, seq, now);
        match objects.put_durable(&to, bytes).await {
            // A former start was interrupted between the two steps.
            Ok(()) | Err(StoreError::Exists { .. }) => objects.delete(&from).await?,
            Err(error) => return Err(error),
        }
        listing.manifests.remove(&seq);
        let what = format!("cut short, as by a power cut on a disk that loses synced bytes; moved to {to}");
        report.findings.push(Finding { vm: Some(vm), point: None, object: from, what, affects: Vec::new() });
    }
    Ok(())
}

/// Whether a file is the front part of a record, or no bytes of one at all.
pub(super) fn is_torn(file: &[u8], kind: Kind) -> bool {
    match FileHeader::decode(file, kind, 1..=u16::MAX) {
        Ok(header) => ((file.len() - FileHeader::LEN) as u64) < u64::from(header.body_len),
        Err(_) => file.len() < FileHeader::LEN || file.iter().all(|byte| *byte == 0),
    }
}

const MANIFEST_MAX: u64 = BODY_MAX as u64 + FileHeader::LEN as u64;
