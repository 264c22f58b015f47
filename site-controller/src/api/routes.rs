//! Answers to the requests of [`super::types`].

use super::{
    journal::{kept, prune, prune_preview},
    types::{
        FailoverPreview, FailoverRequest, PointList, Released, SiteStatus, VerifyLine, VerifyRequest, VmRow,
    },
};
use crate::{
    catalog::{CatalogError, VmSummary},
    config::SiteConfig,
    failover::{
        images::ImageError,
        journal::Phase,
        progress::{Progress, Watcher},
        runbook::{FailoverError, LATEST, Request, Runbook},
    },
    retention::keeper::Keeper,
    store::{Pin, StoreError},
    verify,
};
use axum::{
    Json, Router,
    extract::{Path, State},
    response::Response,
    routing::{get, post},
};
use lifeboat::{
    error::chain,
    local_api::{ApiError, ndjson},
    units::UnixMs,
};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// Lines of progress that may wait for a slow watcher; more are left out.
const LINES_QUEUED: usize = 64;

/// What all requests share.
pub struct Site {
    pub config: SiteConfig,
    pub runbook: Arc<Runbook>,
    pub keeper: Arc<Keeper>,
    /// The daemon is stopping.
    pub stop: watch::Receiver<bool>,
    pub certificate_expires: UnixMs,
    /// Connections turned away since the start.
    pub refused: Box<dyn Fn() -> u64 + Send + Sync>,
    pub findings: Vec<String>,
}

pub fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/vms/{vm}/points", get(points))
        .route("/v1/vms/{vm}/prune", get(prune_preview).post(prune))
        .route("/v1/vms/{vm}/release", post(release))
        .route("/v1/failovers/preview", post(preview))
        .route("/v1/failovers", post(fail_over))
        .route("/v1/verify", post(run_verify))
        .with_state(site)
}

async fn status(State(site): State<Arc<Site>>) -> Result<Json<SiteStatus>, ApiError> {
    let runbook = &site.runbook;
    let now = runbook.clock.now();
    let mut vms = Vec::new();
    for vm in runbook.catalog.vms().await.map_err(catalog_error)? {
        vms.push(row(runbook, vm, now).await?);
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
        findings: site.findings.clone(),
    }))
}

async fn row(runbook: &Runbook, summary: VmSummary, now: UnixMs) -> Result<VmRow, ApiError> {
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
        rpo_ms: summary.latest.as_ref().map(|latest| now.0.saturating_sub(latest.cut_at.0)),
        latest: summary.latest,
        oldest: journal.points.first().map(|oldest| oldest.cut_at),
        layers: journal.points.iter().map(|point| point.layers).max().unwrap_or_default(),
        frozen: journal.frozen,
        agent,
        failover,
    })
}

async fn points(State(site): State<Arc<Site>>, Path(vm): Path<String>) -> Result<Json<PointList>, ApiError> {
    let catalog = &site.runbook.catalog;
    let summary = catalog.find_vm(&vm).await.map_err(catalog_error)?;
    let points = catalog.points(summary.vm).await.map_err(catalog_error)?;
    let kept = kept(&site, summary.vm, &points).await;
    Ok(Json(PointList { vm: summary.vm, name: summary.name, points, kept }))
}

/// Whoever has the guest running may write its history from now on.
async fn release(State(site): State<Arc<Site>>, Path(vm): Path<String>) -> Result<Json<Released>, ApiError> {
    let runbook = &site.runbook;
    let summary = runbook.catalog.find_vm(&vm).await.map_err(catalog_error)?;
    match runbook.intake.slots.slot(summary.vm).release().await {
        Ok(agent) => Ok(Json(Released { vm: summary.vm, name: summary.name, agent })),
        Err(why) => Err(ApiError::conflict("held", format!("{} can't be released: {why}", summary.name))
            .with_hint("shut the guest off there, or take it out of that host's agent.toml, and try again")),
    }
}

async fn preview(
    State(site): State<Arc<Site>>,
    Json(request): Json<FailoverRequest>,
) -> Result<Json<FailoverPreview>, ApiError> {
    let runbook = &site.runbook;
    let summary = runbook.catalog.find_vm(&request.vm).await.map_err(catalog_error)?;
    let journal = runbook.journal.load(summary.vm).map_err(|error| ApiError::internal(error.to_string()))?;
    let unfinished = journal.filter(|record| record.phase != Phase::Running);
    let given = match &unfinished {
        Some(record) if request.point == LATEST => record.point.to_string(),
        _ => request.point,
    };
    let point = runbook.catalog.find(summary.vm, &given).await.map_err(catalog_error)?;
    let seen = runbook.intake.board.seen(summary.vm);
    Ok(Json(FailoverPreview {
        vm: summary.vm,
        name: summary.name,
        lost_ms: runbook.clock.now().0.saturating_sub(point.cut_at.0),
        point,
        source_connected: seen.as_ref().is_some_and(|seen| seen.connected),
        source_agent: seen.map(|seen| seen.agent),
        unfinished,
    }))
}

async fn fail_over(State(site): State<Arc<Site>>, Json(request): Json<FailoverRequest>) -> Response {
    let (lines, queue) = mpsc::channel::<Result<Progress, ApiError>>(LINES_QUEUED);
    let (steps, mut told) = mpsc::channel(LINES_QUEUED);
    let forward = lines.clone();
    tokio::spawn(async move {
        while let Some(progress) = told.recv().await {
            if forward.send(Ok(progress)).await.is_err() {
                // Nobody watches any more; the failover goes on.
                told.close();
            }
        }
    });
    // Its own task: a failover is not undone because the operator's terminal went away.
    tokio::spawn(async move {
        let watcher = Watcher::new(steps);
        let request = Request { vm: request.vm, point: request.point };
        match site.runbook.emergency(request, &watcher).await {
            Ok(report) => watcher.finish(Progress::Done { report }).await,
            Err(error) => {
                tracing::error!(error = chain(&error), "failover did not succeed");
                let _ = lines.send(Err(failover_error(&error))).await;
            }
        }
    });
    ndjson(queue)
}

async fn run_verify(
    State(site): State<Arc<Site>>,
    Json(request): Json<VerifyRequest>,
) -> Result<Response, ApiError> {
    let runbook = site.runbook.clone();
    let vm = match request.vm {
        Some(given) => Some(runbook.catalog.find_vm(&given).await.map_err(catalog_error)?.vm),
        None => None,
    };
    let (lines, queue) = mpsc::channel(LINES_QUEUED);
    tokio::spawn(async move {
        let progress = lines.clone();
        let tell = move |at: verify::VerifyProgress| {
            let line = VerifyLine::Progress { done_bytes: at.done_bytes, total_bytes: at.total_bytes };
            let _ = progress.try_send(Ok(line));
        };
        // Whatever there is now stays while it is read.
        let vms = vm.map_or_else(|| runbook.store.vms(), |vm| vec![vm]);
        let _held: Vec<Pin> = vms.into_iter().map(|vm| runbook.store.hold(vm)).collect();
        let verified = tokio::select! {
            verified = verify::verify(runbook.store.objects(), vm, tell) => verified,
            // The watcher is gone: nobody waits for the report.
            () = lines.closed() => return,
        };
        let last = verified.map(|report| VerifyLine::Done { report }).map_err(store_error);
        let _ = lines.send(last).await;
    });
    Ok(ndjson(queue))
}

pub(super) fn catalog_error(error: CatalogError) -> ApiError {
    match error {
        CatalogError::Store(error) => store_error(error),
        other => ApiError::not_found("not-found", other.to_string()),
    }
}

fn store_error(error: StoreError) -> ApiError {
    ApiError::internal(chain(&error))
}

fn failover_error(error: &FailoverError) -> ApiError {
    let message = chain(error);
    match error {
        FailoverError::Catalog(_) => ApiError::not_found("not-found", message),
        FailoverError::Busy
        | FailoverError::AnotherPoint { .. }
        | FailoverError::RunsFromAnother { .. }
        | FailoverError::DoneBefore { .. } => ApiError::conflict("conflict", message),
        FailoverError::Preflight(_) => ApiError::conflict("preflight", message)
            .with_hint("nothing was changed; mend this and run the failover again"),
        FailoverError::Restore(_) | FailoverError::Image(ImageError::Restore(_)) => {
            ApiError::internal(message).with_hint("nothing was started; `--point` takes another point")
        }
        _ => ApiError::internal(message)
            .with_hint("run the same command again: it goes on from the last step that was completed"),
    }
}
