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
    error::StoreError,
    finding::{Finding, ReopenReport},
    index::SummaryIndex,
    leftovers::{self, is_torn},
    listing::{Listing, list},
    objects::Objects,
    paths,
    slot::History,
    summary::PointState,
    walk::walk,
};
use lifeboat::{
    format::{
        header::{FileHeader, Kind},
        manifest::BODY_MAX,
    },
    id::VmId,
    units::UnixMs,
};
use std::{collections::BTreeMap, sync::Arc};

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

const MANIFEST_MAX: u64 = BODY_MAX as u64 + FileHeader::LEN as u64;
