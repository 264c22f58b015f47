//! Making, listing and revoking tokens.

use super::{
    caller::Caller,
    site::Site,
    token_book::TokenError,
    types::{TokenCreated, TokenRequest, TokenRow},
};
use axum::{
    Extension, Json,
    extract::{Path, State},
};
use lifeboat::local_api::{ApiError, Words};
use std::sync::Arc;

type Answer<T> = Result<Json<T>, ApiError>;

pub(super) async fn list(State(site): State<Arc<Site>>) -> Json<Vec<TokenRow>> {
    Json(site.gate.tokens.list())
}

pub(super) async fn create(
    State(site): State<Arc<Site>>,
    Extension(caller): Extension<Caller>,
    Json(request): Json<TokenRequest>,
) -> Answer<TokenCreated> {
    blocking(move || site.gate.tokens.create(request, &caller.to_string())).await
}

pub(super) async fn revoke(State(site): State<Arc<Site>>, Path(token): Path<String>) -> Answer<TokenRow> {
    blocking(move || site.gate.tokens.revoke(&token)).await
}

/// Changes of the book wait for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TokenError> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map(Json).map_err(|error| token_error(&error)),
        Err(error) => Err(ApiError::internal(error.to_string())),
    }
}

fn token_error(error: &TokenError) -> ApiError {
    let message = Words::of(error);
    match error {
        TokenError::BadName => ApiError::bad_request("bad-name", message),
        TokenError::Unknown(_) => ApiError::not_found("unknown-token", message)
            .with_hint("`lifeboat token list` lists those there are"),
        TokenError::NameTaken(_) | TokenError::TooMany => ApiError::conflict("conflict", message),
        TokenError::Disk { .. } | TokenError::Malformed { .. } => ApiError::internal(message),
    }
}
