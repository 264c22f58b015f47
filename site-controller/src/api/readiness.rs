//! Whether failovers would work.

use super::site::{Site, catalog_error};
use crate::readiness::Readiness;
use axum::{
    Json,
    extract::{Path, State},
};
use lifeboat::local_api::ApiError;
use std::sync::Arc;

pub(super) async fn all(State(site): State<Arc<Site>>) -> Result<Json<Vec<Readiness>>, ApiError> {
    site.readiness.all().await.map(Json).map_err(catalog_error)
}

pub(super) async fn one(
    State(site): State<Arc<Site>>,
    Path(name): Path<String>,
) -> Result<Json<Readiness>, ApiError> {
    site.readiness.one(&name).await.map(Json).map_err(catalog_error)
}
