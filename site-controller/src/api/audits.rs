//! Reading the audit log.

use super::{
    site::{Site, catalog_error},
    types::{AuditList, AuditQuery},
};
use crate::catalog::Selector;
use axum::{
    Json,
    extract::{Query, State},
};
use lifeboat::{
    local_api::{ApiError, Words},
    units::UnixMs,
};
use std::sync::Arc;

pub(super) async fn audit(
    State(site): State<Arc<Site>>,
    Query(query): Query<AuditQuery>,
) -> Result<Json<AuditList>, ApiError> {
    let since = match query.since {
        None => UnixMs(0),
        Some(given) => match Selector::parse(&given, site.runbook.clock.now()).map_err(catalog_error)? {
            Selector::AtOrBefore(at) => at,
            Selector::Latest | Selector::Id(_) => {
                let message = format!("`{}` is no time", given.escape_debug());
                return Err(ApiError::bad_request("bad-time", message)
                    .with_hint("write `2h ago`, `12:00:00` or `2026-01-31T12:00:00Z`"));
            }
        },
    };
    let limit = query.limit.unwrap_or(USUAL).min(MOST);
    let log = site.gate.audit.clone();
    let read = tokio::task::spawn_blocking(move || log.read(since, limit)).await;
    let calls = read.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(Json(AuditList { calls: calls.map_err(|error| ApiError::internal(Words::of(&error)))? }))
}

const USUAL: usize = 1000;
const MOST: usize = 10_000;
