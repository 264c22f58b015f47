//! Failovers: what one would mean, and doing it.

use super::{
    audit::Outcome,
    site::{Site, catalog_error, watched},
    types::{FailoverPreview, FailoverRequest},
};
use crate::{
    catalog::CatalogError,
    failover::{
        error::FailoverError,
        images::ImageError,
        journal::{Manner, Phase},
        progress::Progress,
        runbook::{LATEST, Request},
    },
    intake::board::Seen,
};
use axum::{Extension, Json, extract::State, response::Response};
use lifeboat::{
    error::chain,
    id::VmId,
    local_api::{ApiError, Words},
};
use std::sync::Arc;

pub(super) async fn preview(
    State(site): State<Arc<Site>>,
    Json(request): Json<FailoverRequest>,
) -> Result<Json<FailoverPreview>, ApiError> {
    let runbook = &site.runbook;
    let summary = runbook.catalog.find_vm(&request.vm).await.map_err(catalog_error)?;
    let journal = runbook.journal.load(summary.vm).map_err(|error| ApiError::internal(error.to_string()))?;
    let mut unfinished = journal.filter(|record| record.phase != Phase::Running);
    if let Some(record) = &unfinished
        && request.point == LATEST
        && runbook.is_outdated(record).await
    {
        // It is begun anew.
        unfinished = None;
    }
    let given = match &unfinished {
        Some(record) if request.point == LATEST => record.point.to_string(),
        _ => request.point,
    };
    let point = runbook.catalog.find(summary.vm, &given).await.map_err(catalog_error)?;
    let seen = runbook.intake.board.seen(summary.vm);
    let newest = summary.latest.as_ref().is_some_and(|latest| latest.point == point.point);
    let rests = newest && point.at_rest && seen.as_ref().is_some_and(Seen::is_protected);
    let age_ms = runbook.clock.now().0.saturating_sub(point.cut_at.0);
    let manner = Manner { start_off: request.start, ..manner_of(&site, summary.vm) };
    let addresses = manner.addresses.at(&runbook.site).words();
    Ok(Json(FailoverPreview {
        vm: summary.vm,
        name: summary.name,
        lost_ms: if rests { 0 } else { age_ms },
        left_off: point.stays_off && !request.start,
        hosts: runbook.foresee(&[(point.clone(), manner)]).await,
        point,
        source_connected: seen.as_ref().is_some_and(|seen| seen.connected),
        source_agent: seen.map(|seen| seen.agent),
        unfinished,
        addresses,
    }))
}

pub(super) async fn fail_over(
    State(site): State<Arc<Site>>,
    Extension(outcome): Extension<Outcome>,
    Json(request): Json<FailoverRequest>,
) -> Response {
    watched(outcome, |watcher| async move {
        let request = with_runbook(&site, request).await;
        let report = site.runbook.emergency(request, &watcher).await.map_err(|error| {
            tracing::error!(error = chain(&error), "failover did not succeed");
            failover_error(&error)
        })?;
        Ok(Progress::Done { report: Box::new(report) })
    })
}

/// What its group's runbook says of a VM holds for a failover of it alone as well.
async fn with_runbook(site: &Site, request: FailoverRequest) -> Request {
    let vm = site.runbook.catalog.which(&request.vm).await.ok();
    let mut manner = vm.map_or_else(Manner::default, |vm| manner_of(site, vm));
    manner.no_cold_boot |= request.no_cold_boot;
    manner.start_off = request.start;
    let skip_fence_command = request.skip_fence_command;
    Request { vm: request.vm, point: request.point, skip_fence_command, manner, host: None }
}

fn manner_of(site: &Site, vm: VmId) -> Manner {
    let group = site.coordinator.book.group_of(vm);
    let member = group.as_ref().and_then(|group| {
        let member = group.members.iter().find(|member| member.vm == vm)?;
        Some(Manner::of(&group.spec, &member.name))
    });
    member.unwrap_or_default()
}

pub(super) fn failover_error(error: &FailoverError) -> ApiError {
    let message = Words::of(error);
    match error {
        FailoverError::Catalog(CatalogError::Damaged { .. }) => ApiError::conflict("damaged", message),
        FailoverError::Catalog(_) => ApiError::not_found("not-found", message),
        FailoverError::Busy
        | FailoverError::AnotherPoint { .. }
        | FailoverError::RunsFromAnother { .. }
        | FailoverError::Unfinished { .. }
        | FailoverError::TooLate { .. }
        | FailoverError::NotBegun
        | FailoverError::DoneBefore { .. } => ApiError::conflict("conflict", message),
        FailoverError::NoHost { .. } | FailoverError::Host(_) => ApiError::conflict("no-host", message)
            .with_hint("`lifeboat check` shows what each host lacks; run the same command again when it is mended"),
        FailoverError::PointDamaged { .. } => ApiError::conflict("damaged", message)
            .with_hint("take another point: `lifeboat undo NAME --point OTHER`; `lifeboat verify` shows which ones are whole"),
        FailoverError::Preflight(_) => ApiError::conflict("preflight", message)
            .with_hint("nothing was changed; mend this and run the failover again"),
        FailoverError::Restore(_) | FailoverError::Image(ImageError::Restore(_)) => {
            ApiError::internal(message).with_hint("nothing was started; `--point` takes another point")
        }
        _ => ApiError::internal(message)
            .with_hint("run the same command again: it goes on from the last step that was completed"),
    }
}
