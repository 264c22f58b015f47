//! What all requests share, and the errors that most of them may answer.

use super::{audit::Outcome, gate::Gate};
use crate::{
    automatic::Automatic,
    catalog::CatalogError,
    config::SiteConfig,
    drill::Driller,
    failover::{
        group::Groups,
        progress::{Progress, Watcher},
        runbook::Runbook,
    },
    group::coordinator::Coordinator,
    handover::Handovers,
    readiness::watch::Watch,
    report::{gather::Sources, log::SlotLog},
    retention::keeper::Keeper,
    seed::Seeder,
    store::StoreError,
};
use axum::response::Response;
use lifeboat::{
    local_api::{ApiError, Words, ndjson},
    units::UnixMs,
};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// What all requests share.
pub struct Site {
    pub config: SiteConfig,
    pub gate: Arc<Gate>,
    pub runbook: Arc<Runbook>,
    pub keeper: Arc<Keeper>,
    pub coordinator: Arc<Coordinator>,
    pub group_failovers: Arc<Groups>,
    pub driller: Arc<Driller>,
    pub seeder: Seeder,
    pub readiness: Arc<Watch>,
    pub slots: SlotLog,
    pub handovers: Handovers,
    /// Where a witness is configured.
    pub automatic: Option<Arc<Automatic>>,
    /// The daemon is stopping.
    pub stop: watch::Receiver<bool>,
    pub certificate_expires: UnixMs,
    /// Connections turned away since the start.
    pub refused: Box<dyn Fn() -> u64 + Send + Sync>,
    pub findings: Vec<String>,
}

impl Site {
    /// What reports are made from.
    pub fn sources(&self) -> Sources<'_> {
        Sources {
            site: &self.config.name,
            catalog: &self.runbook.catalog,
            coordinator: &self.coordinator,
            journal: &self.runbook.journal,
            board: &self.runbook.intake.board,
            drills: &self.driller.book,
            readiness: &self.readiness,
            slots: &self.slots,
            clock: &*self.runbook.clock,
        }
    }
}

pub(super) fn catalog_error(error: CatalogError) -> ApiError {
    match error {
        CatalogError::Store(error) => store_error(error),
        damaged @ CatalogError::Damaged { .. } => ApiError::conflict("damaged", damaged.to_string()),
        other => ApiError::not_found("not-found", other.to_string()),
    }
}

pub(super) fn store_error(error: StoreError) -> ApiError {
    ApiError::internal(Words::of(&error))
}

/// Lines of progress that may wait for a slow watcher; more are left out.
pub(super) const LINES_QUEUED: usize = 64;

/// Work that tells how far it is, line by line. It is its own task: it is not undone because the operator's terminal went
/// away. How it ends is told and written down.
pub(super) fn watched<W>(outcome: Outcome, work: impl FnOnce(Watcher) -> W) -> Response
where
    W: Future<Output = Result<Progress, ApiError>> + Send + 'static,
{
    let (lines, queue) = mpsc::channel::<Result<Progress, ApiError>>(LINES_QUEUED);
    let (steps, mut told) = mpsc::channel(LINES_QUEUED);
    let forward = lines.clone();
    tokio::spawn(async move {
        while let Some(progress) = told.recv().await {
            if forward.send(Ok(progress)).await.is_err() {
                // Nobody watches any more; the work goes on.
                told.close();
            }
        }
    });
    let (watcher, end) = (Watcher::new(steps), outcome.later());
    let work = work(watcher.clone());
    tokio::spawn(async move {
        let done = work.await;
        end.ended(done.as_ref().err().map(|error| &error.body)).await;
        match done {
            Ok(last) => watcher.finish(last).await,
            Err(error) => {
                let _ = lines.send(Err(error)).await;
            }
        }
    });
    ndjson(queue)
}
