//! Start-up: what the process before left behind, after any ending, becomes a store again.
//!
//! * Partial uploads are removed: nobody could see them.
//! * A manifest at the end of a history that is cut short, which only a file system that lies about syncs can leave, is
//!   moved to `quarantine/` and reported. Never deleted; its packs are kept as long as it lies there.
//! * Any other manifest that can't be read stays where it is and is reported; points that build on it are damaged.
//! * Packs that no manifest names belong to points that were never committed, and are deleted, unless some manifest of
//!   the VM can't be read: then nobody knows, and they are kept.
//!
//! Promises: refuses to guess; reports all that it did. Called by `Store::open`.

use crate::store::{
    chain::{ChainWalk, read_manifest},
    error::StoreError,
    finding::{Finding, PointRef},
    objects::Objects,
    paths::{self, Named},
    site::{Head, History},
    summary::{PointState, PointSummary, SummaryIndex},
};
use lifeboat::{
    format::{
        header::{FileHeader, Kind},
        manifest::{BODY_MAX, Manifest},
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
        let walked = walk(objects, vm, &listing).await?;
        remove_orphans(objects, vm, &listing, &walked, &mut report).await?;
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

struct Walked {
    history: History,
    summaries: Vec<PointSummary>,
    findings: Vec<Finding>,
    named: BTreeSet<PackId>,
    unreadable: bool,
}

async fn walk(objects: &dyn Objects, vm: VmId, listing: &Listing) -> Result<Walked, StoreError> {
    let mut chain = ChainWalk::default();
    let (mut summaries, mut findings) = (Vec::<PointSummary>::new(), Vec::<Finding>::new());
    let (mut named, mut unreadable) = (BTreeSet::new(), false);
    let mut generation = listing.generations.last().copied().unwrap_or(Generation::FIRST);
    // Findings whose consequences are still growing: damaged points that follow belong to the newest one.
    let mut cause: Option<usize> = None;
    for seq in listing.manifests.keys().copied() {
        let object = paths::manifest(vm, seq);
        let (manifest, digest, len) = match read_manifest(objects, vm, seq).await {
            Ok(read) => read,
            Err(error @ (StoreError::Damaged { .. } | StoreError::Disk { .. })) => {
                chain.unreadable(seq);
                unreadable = true;
                cause = Some(findings.len());
                let what = error.what();
                findings.push(Finding { vm: Some(vm), point: None, object, what, affects: Vec::new() });
                continue;
            }
            Err(error) => return Err(error),
        };
        let lost = lost_pack(&manifest, listing);
        let verdict = chain.follow(&manifest, digest, |_| lost.clone());
        let at = PointRef { seq, point: manifest.point };
        for what in lost.into_iter().chain(verdict.loose) {
            cause = Some(findings.len());
            let (point, object) = (Some(at), object.clone());
            findings.push(Finding { vm: Some(vm), point, object, what, affects: Vec::new() });
        }
        if let (PointState::Damaged(_), Some(cause)) = (&verdict.state, cause) {
            findings[cause].affects.push(at);
        }
        named.extend(manifest.packs.iter().map(|pack| pack.id));
        generation = generation.max(manifest.generation);
        summaries.push(PointSummary::of(&manifest, len, verdict.state));
    }
    let head = chain.into_last().zip(summaries.last()).map(|(link, newest)| Head {
        point: newest.point,
        seq: newest.seq,
        cut_at: newest.cut_at,
        committed_at: newest.committed_at,
        generation: newest.generation,
        link,
    });
    let top = listing.manifests.keys().next_back().copied().unwrap_or(Seq(0));
    let history = History { generation, top, head, doubt: None };
    Ok(Walked { history, summaries, findings, named, unreadable })
}

fn lost_pack(manifest: &Manifest, listing: &Listing) -> Option<String> {
    manifest.packs.iter().find_map(|pack| match listing.packs.get(&pack.id) {
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
            Ok(bytes) if is_torn(&bytes) => bytes,
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

/// Whether a file is the front part of a manifest, or no bytes of one at all.
fn is_torn(file: &[u8]) -> bool {
    match FileHeader::decode(file, Kind::Manifest, 1..=u16::MAX) {
        Ok(header) => ((file.len() - FileHeader::LEN) as u64) < u64::from(header.body_len),
        Err(_) => file.len() < FileHeader::LEN || file.iter().all(|byte| *byte == 0),
    }
}

async fn remove_orphans(
    objects: &dyn Objects,
    vm: VmId,
    listing: &Listing,
    walked: &Walked,
    report: &mut ReopenReport,
) -> Result<(), StoreError> {
    let orphans: Vec<PackId> =
        listing.packs.keys().filter(|pack| !walked.named.contains(pack)).copied().collect();
    if orphans.is_empty() {
        return Ok(());
    }
    let quarantined = !objects.list(&paths::quarantine_of(vm)).await?.is_empty();
    if walked.unreadable || quarantined {
        report.orphan_packs_kept += orphans.len() as u64;
        return Ok(());
    }
    for pack in orphans {
        objects.delete(&paths::pack(vm, pack)).await?;
        report.orphan_packs_removed += 1;
    }
    Ok(())
}

const MANIFEST_MAX: u64 = BODY_MAX as u64 + FileHeader::LEN as u64;
