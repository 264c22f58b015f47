//! Drills: begun, listed, ended.

use super::{
    audit::Outcome,
    groups::point_error,
    site::{Site, catalog_error, watched},
    types::DrillRequest,
};
use crate::{
    drill::{DrillError, DrillRecord, run::Request},
    failover::progress::Progress,
};
use axum::{
    Extension, Json,
    extract::{Path, State},
    response::Response,
};
use lifeboat::local_api::{ApiError, Words};
use std::sync::Arc;

pub(super) async fn list(State(site): State<Arc<Site>>) -> Json<Vec<DrillRecord>> {
    Json(site.driller.book.list())
}

pub(super) async fn show(
    State(site): State<Arc<Site>>,
    Path(drill): Path<String>,
) -> Result<Json<DrillRecord>, ApiError> {
    let missing =
        || ApiError::not_found("unknown-drill", "there is no such drill; `lifeboat drills` lists them");
    site.driller.book.find(&drill).map(Json).ok_or_else(missing)
}

pub(super) async fn end(
    State(site): State<Arc<Site>>,
    Path(drill): Path<String>,
) -> Result<Json<Vec<DrillRecord>>, ApiError> {
    site.driller.end(&drill).await.map(Json).map_err(drill_error)
}

pub(super) async fn drill(
    State(site): State<Arc<Site>>,
    Extension(outcome): Extension<Outcome>,
    Json(request): Json<DrillRequest>,
) -> Response {
    watched(outcome, |watcher| async move {
        let DrillRequest { name, point, keep } = request;
        let request = Request { name, point, keep, scheduled: false };
        let record = site.driller.run(&request, &watcher).await.map_err(drill_error)?;
        Ok(Progress::DrillDone { id: record.id })
    })
}

fn drill_error(error: DrillError) -> ApiError {
    match error {
        DrillError::Catalog(error) => catalog_error(error),
        DrillError::NoPoint { .. } | DrillError::NothingKept(_) => {
            ApiError::not_found("not-found", error.to_string())
        }
        DrillError::Points(error) => point_error(error),
        DrillError::Busy => ApiError::conflict("conflict", error.to_string()),
        DrillError::Replica(_) | DrillError::Preflight(_) | DrillError::Record(_) => {
            ApiError::internal(Words::of(&error))
        }
    }
}
