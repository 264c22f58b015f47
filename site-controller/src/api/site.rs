//! What all requests share, and the errors that most of them may answer.

use super::gate::Gate;
use crate::{
    catalog::CatalogError,
    config::SiteConfig,
    failover::{group::Groups, runbook::Runbook},
    group::coordinator::Coordinator,
    handover::Handovers,
    readiness::watch::Watch,
    retention::keeper::Keeper,
    seed::Seeder,
    store::StoreError,
};
use lifeboat::{error::chain, local_api::ApiError, units::UnixMs};
use std::sync::Arc;
use tokio::sync::watch;

/// What all requests share.
pub struct Site {
    pub config: SiteConfig,
    pub gate: Arc<Gate>,
    pub runbook: Arc<Runbook>,
    pub keeper: Arc<Keeper>,
    pub coordinator: Arc<Coordinator>,
    pub group_failovers: Arc<Groups>,
    pub seeder: Seeder,
    pub readiness: Arc<Watch>,
    pub handovers: Handovers,
    /// The daemon is stopping.
    pub stop: watch::Receiver<bool>,
    pub certificate_expires: UnixMs,
    /// Connections turned away since the start.
    pub refused: Box<dyn Fn() -> u64 + Send + Sync>,
    pub findings: Vec<String>,
}

pub(super) fn catalog_error(error: CatalogError) -> ApiError {
    match error {
        CatalogError::Store(error) => store_error(error),
        other => ApiError::not_found("not-found", other.to_string()),
    }
}

pub(super) fn store_error(error: StoreError) -> ApiError {
    ApiError::internal(chain(&error))
}

/// Lines of progress that may wait for a slow watcher; more are left out.
pub(super) const LINES_QUEUED: usize = 64;
