//! A VM's journal: its points and why they are kept, what would go, and pruning by hand.

use super::{
    site::{Site, catalog_error},
    types::{Kept, PointList, PrunePreview, PruneReport},
};
use crate::{
    catalog::PointSummary,
    retention::keeper::{KeepError, Outlook},
};
use axum::{
    Json,
    extract::{Path, State},
};
use lifeboat::{
    id::VmId,
    local_api::{ApiError, Words},
    units::Seq,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub(super) async fn points(
    State(site): State<Arc<Site>>,
    Path(vm): Path<String>,
) -> Result<Json<PointList>, ApiError> {
    let catalog = &site.runbook.catalog;
    let summary = catalog.find_vm(&vm).await.map_err(catalog_error)?;
    let points = catalog.points(summary.vm).await.map_err(catalog_error)?;
    let kept = kept(&site, summary.vm, &points).await;
    Ok(Json(PointList { vm: summary.vm, name: summary.name, points, kept }))
}

/// Of each of `points`, why it is there. Where that can't be told, nothing is said.
async fn kept(site: &Site, vm: VmId, points: &[PointSummary]) -> Vec<Kept> {
    let Ok(outlook) = site.keeper.outlook(vm).await else {
        return points.iter().map(|_| Kept { why: "?".into(), layers: 0 }).collect();
    };
    let by_seq: BTreeMap<Seq, _> = outlook.journal.points.iter().map(|point| (point.seq, point)).collect();
    let going: BTreeSet<Seq> = outlook.going.iter().copied().collect();
    let newest = by_seq.keys().next_back().copied();
    let why = |seq: Seq| match outlook.wanted.get(&seq) {
        Some(why) => why.to_string(),
        None if Some(seq) == newest => "newest".into(),
        None if outlook.held.contains(&seq) => "failover".into(),
        None if by_seq.get(&seq).is_some_and(|point| point.pinned) => "read".into(),
        None if going.contains(&seq) => "no".into(),
        None => "base".into(),
    };
    let layers = |seq: Seq| by_seq.get(&seq).map_or(0, |point| point.layers);
    points.iter().map(|point| Kept { why: why(point.seq), layers: layers(point.seq) }).collect()
}

pub(super) async fn prune_preview(
    State(site): State<Arc<Site>>,
    Path(vm): Path<String>,
) -> Result<Json<PrunePreview>, ApiError> {
    let catalog = &site.runbook.catalog;
    let summary = catalog.find_vm(&vm).await.map_err(catalog_error)?;
    let Outlook { journal, wanted, held, going } =
        site.keeper.outlook(summary.vm).await.map_err(|error| keep_error(&error))?;
    let mut points = catalog.points(summary.vm).await.map_err(catalog_error)?;
    points.retain(|point| going.contains(&point.seq));
    let stays = |seq: &Seq| wanted.contains_key(seq) || held.contains(seq) || going.contains(seq);
    let bases = journal.points.iter().filter(|point| !stays(&point.seq)).count() as u64;
    Ok(Json(PrunePreview {
        vm: summary.vm,
        name: summary.name,
        kept: journal.points.len() as u64 - going.len() as u64,
        going: points,
        bases,
        frozen: journal.frozen,
    }))
}

pub(super) async fn prune(
    State(site): State<Arc<Site>>,
    Path(vm): Path<String>,
) -> Result<Json<PruneReport>, ApiError> {
    let catalog = &site.runbook.catalog;
    let id = catalog.which(&vm).await.map_err(catalog_error)?;
    // Its own task: what was begun is brought to its end although the operator's terminal went away.
    let passed = tokio::spawn({
        let site = site.clone();
        async move { site.keeper.pass(id, true, &site.stop).await }
    });
    let passed = passed.await.map_err(|error| ApiError::internal(error.to_string()))?;
    let passed = passed.map_err(|error| keep_error(&error))?;
    let after = catalog.find_vm(&id.to_string()).await.map_err(catalog_error)?;
    Ok(Json(PruneReport {
        vm: id,
        name: after.name,
        pruned: passed.pruned.len() as u64,
        pruned_bytes: passed.pruned_bytes,
        folds: passed.folds.len() as u64,
        stored_bytes: after.stored_bytes,
    }))
}

fn keep_error(error: &KeepError) -> ApiError {
    ApiError::internal(Words::of(error))
}
