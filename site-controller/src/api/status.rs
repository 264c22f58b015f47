//! The site and its VMs, and giving a VM's history away.

use super::{
    groups,
    site::{Site, catalog_error, store_error},
    types::{Released, SiteStatus, VmRow},
};
use crate::{catalog::VmSummary, intake::board::Seen};
use axum::{
    Json,
    extract::{Path, State},
};
use lifeboat::{local_api::ApiError, units::UnixMs};
use std::sync::Arc;

pub(super) async fn status(State(site): State<Arc<Site>>) -> Result<Json<SiteStatus>, ApiError> {
    let runbook = &site.runbook;
    let now = runbook.clock.now();
    let mut vms = Vec::new();
    for vm in runbook.catalog.vms().await.map_err(catalog_error)? {
        vms.push(row(&site, vm, now).await?);
    }
    // VMs that an agent watches, but that have no point yet.
    for (vm, seen) in runbook.intake.board.all() {
        if vms.iter().all(|row| row.vm != vm) {
            let generation = runbook.store.generation(vm).await;
            vms.push(VmRow {
                vm,
                name: seen.name.clone(),
                generation,
                points: 0,
                damaged_points: 0,
                stored_bytes: 0,
                latest: None,
                oldest: None,
                layers: 0,
                frozen: None,
                rpo_ms: None,
                readiness: site.readiness.last(&seen.name),
                agent: Some(seen),
                failover: None,
            });
        }
    }
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(SiteStatus {
        site: site.config.name.clone(),
        release: env!("CARGO_PKG_VERSION").into(),
        now,
        store_free_bytes: runbook.store.objects().free_bytes().await.map_err(store_error)?,
        store_reserve_bytes: site.config.reserve.0,
        certificate_expires: site.certificate_expires,
        refused_connections: (site.refused)(),
        vms,
        groups: groups::rows(&site).await?,
        findings: site.findings.clone(),
    }))
}

async fn row(site: &Site, summary: VmSummary, now: UnixMs) -> Result<VmRow, ApiError> {
    let runbook = &site.runbook;
    let readiness = site.readiness.last(&summary.name);
    let failover = runbook.journal.load(summary.vm).map_err(|error| ApiError::internal(error.to_string()))?;
    let agent = runbook.intake.board.seen(summary.vm);
    let journal = runbook.store.journal(summary.vm).await;
    Ok(VmRow {
        vm: summary.vm,
        name: summary.name,
        generation: summary.generation,
        points: summary.points,
        damaged_points: summary.damaged_points,
        stored_bytes: summary.stored_bytes,
        rpo_ms: summary.latest.as_ref().filter(|latest| !latest.seed).map(|latest| {
            let rests = latest.at_rest && agent.as_ref().is_some_and(Seen::is_protected);
            if rests { 0 } else { now.0.saturating_sub(latest.cut_at.0) }
        }),
        latest: summary.latest,
        oldest: journal.points.first().map(|oldest| oldest.cut_at),
        layers: journal.points.iter().map(|point| point.layers).max().unwrap_or_default(),
        frozen: journal.frozen,
        readiness,
        agent,
        failover,
    })
}

/// Whoever has the guest running may write its history from now on.
pub(super) async fn release(
    State(site): State<Arc<Site>>,
    Path(vm): Path<String>,
) -> Result<Json<Released>, ApiError> {
    let runbook = &site.runbook;
    let summary = runbook.catalog.find_vm(&vm).await.map_err(catalog_error)?;
    match runbook.intake.slots.slot(summary.vm).release().await {
        Ok(agent) => Ok(Json(Released { vm: summary.vm, name: summary.name, agent })),
        Err(why) => Err(ApiError::conflict("held", format!("{} can't be released: {why}", summary.name))
            .with_hint("shut the guest off there, or take it out of that host's agent.toml, and try again")),
    }
}
