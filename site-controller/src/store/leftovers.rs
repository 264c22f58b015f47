//! What folding, pruning and points that were never committed leave behind when the process ends in the middle.
//! Promises: nothing is removed that a manifest, readable or not, may need. Called by `reopen` only.

use crate::store::{
    error::StoreError,
    finding::{Finding, ReopenReport},
    listing::Listing,
    objects::Objects,
    paths,
    walk::Walked,
};
use lifeboat::{
    format::{
        header::{FileHeader, Kind},
        record,
    },
    id::VmId,
    units::UnixMs,
};

/// Torn records of folds and of pruning, which only a file system that lies about syncs can leave: the one before holds.
pub(super) async fn set_torn_records_aside(
    objects: &dyn Objects,
    now: UnixMs,
    vm: VmId,
    listing: &mut Listing,
    report: &mut ReopenReport,
) -> Result<(), StoreError> {
    while let Some(no) = listing.pruned.last().copied() {
        let path = paths::pruned(vm, no);
        if !set_aside(objects, now, vm, &path, Kind::Pruned, report).await? {
            break;
        }
        listing.pruned.remove(&no);
    }
    for (seq, folds) in &mut listing.folds {
        while let Some(no) = folds.last().copied() {
            let path = paths::fold(vm, *seq, no);
            if !set_aside(objects, now, vm, &path, Kind::Fold, report).await? {
                break;
            }
            folds.remove(&no);
        }
    }
    Ok(())
}

async fn set_aside(
    objects: &dyn Objects,
    now: UnixMs,
    vm: VmId,
    from: &str,
    kind: Kind,
    report: &mut ReopenReport,
) -> Result<bool, StoreError> {
    let bytes = match objects.get(from, record::FILE_MAX).await {
        Ok(bytes) if is_torn(&bytes, kind) => bytes,
        Ok(_) | Err(StoreError::Damaged { .. } | StoreError::Disk { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let to = paths::quarantined_record(vm, from.rsplit('/').next().unwrap_or(from), now);
    match objects.put_durable(&to, bytes).await {
        // A former start was interrupted between the two steps.
        Ok(()) | Err(StoreError::Exists { .. }) => objects.delete(from).await?,
        Err(error) => return Err(error),
    }
    let what = format!("cut short, as by a power cut on a disk that loses synced bytes; moved to {to}");
    let object = from.to_owned();
    report.findings.push(Finding { vm: Some(vm), point: None, object, what, affects: Vec::new() });
    Ok(true)
}

/// Removes what no layer in use is made of, in the order in which pruning does it: manifests first.
pub(super) async fn remove(
    objects: &dyn Objects,
    vm: VmId,
    listing: &Listing,
    walked: &Walked,
    report: &mut ReopenReport,
) -> Result<(), StoreError> {
    let unnamed = |id: &&_| !walked.named.contains(id);
    let packs = listing.packs.keys().filter(unnamed).map(|id| paths::pack(vm, *id));
    let fold_packs = listing.fold_packs.keys().filter(unnamed).map(|id| paths::fold_pack(vm, *id));
    let orphans: Vec<String> = packs.chain(fold_packs).collect();
    let quarantined = objects.list(&paths::quarantine_of(vm)).await?;
    let quarantined = quarantined.iter().any(|object| object.path.ends_with(".manifest"));
    if walked.unreadable {
        report.orphan_packs_kept += orphans.len() as u64;
        return Ok(());
    }
    for path in leftover_records(vm, listing, walked) {
        objects.delete(&path).await?;
        report.leftovers_removed += 1;
    }
    if quarantined {
        report.orphan_packs_kept += orphans.len() as u64;
        return Ok(());
    }
    for path in orphans {
        objects.delete(&path).await?;
        report.orphan_packs_removed += 1;
    }
    Ok(())
}

fn leftover_records(vm: VmId, listing: &Listing, walked: &Walked) -> Vec<String> {
    let mut paths: Vec<String> = walked.gone.iter().map(|seq| paths::manifest(vm, *seq)).collect();
    for (seq, folds) in &listing.folds {
        let held = walked.history.tree.0.get(seq).and_then(|node| node.fold);
        paths.extend(folds.iter().filter(|no| held != Some(**no)).map(|no| paths::fold(vm, *seq, *no)));
    }
    let held = walked.history.pruned.as_ref().map(|pruned| pruned.no);
    paths.extend(listing.pruned.iter().filter(|no| held != Some(**no)).map(|no| paths::pruned(vm, *no)));
    paths
}

/// Whether a file is the front part of a record, or no bytes of one at all.
pub(super) fn is_torn(file: &[u8], kind: Kind) -> bool {
    match FileHeader::decode(file, kind, 1..=u16::MAX) {
        Ok(header) => ((file.len() - FileHeader::LEN) as u64) < u64::from(header.body_len),
        Err(_) => file.len() < FileHeader::LEN || file.iter().all(|byte| *byte == 0),
    }
}
