//! Claims and hand-overs.

use super::{
    audit::Outcome,
    seeds::seed_error,
    site::{LINES_QUEUED, Site, catalog_error, store_error},
};
use crate::handover::{AcceptLine, Acceptance, Claim, HandoverError};
use axum::{
    Extension, Json,
    extract::{Path, State},
    response::Response,
};
use lifeboat::{
    error::chain,
    local_api::{ApiError, Words, ndjson},
};
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) async fn claim(
    State(site): State<Arc<Site>>,
    Path(vm): Path<String>,
) -> Result<Json<Claim>, ApiError> {
    site.handovers.claim(&vm).await.map(Json).map_err(handover_error)
}

pub(super) async fn accept(
    State(site): State<Arc<Site>>,
    Extension(outcome): Extension<Outcome>,
    Json(request): Json<Acceptance>,
) -> Response {
    let end = outcome.later();
    let (lines, queue) = mpsc::channel::<Result<AcceptLine, ApiError>>(LINES_QUEUED);
    // Its own task: it is brought to its end although whoever asked went away.
    tokio::spawn(async move {
        let progress = lines.clone();
        let tell = move |line| {
            let _ = progress.try_send(Ok(line));
        };
        let last = match site.handovers.accept(request, tell).await {
            Ok(report) => Ok(AcceptLine::Done { report }),
            Err(error) => {
                tracing::error!(error = chain(&error), "a VM was not handed over");
                Err(handover_error(error))
            }
        };
        end.ended(last.as_ref().err().map(|error| &error.body)).await;
        let _ = lines.send(last).await;
    });
    ndjson(queue)
}

fn handover_error(error: HandoverError) -> ApiError {
    let message = Words::of(&error);
    match error {
        HandoverError::Catalog(error) => catalog_error(error),
        HandoverError::Store(error) => store_error(error),
        HandoverError::Seed(error) => seed_error(error),
        HandoverError::NotHere { .. }
        | HandoverError::NotRunning { .. }
        | HandoverError::GivenAway { .. }
        | HandoverError::Outdated { .. }
        | HandoverError::Unfinished { .. }
        | HandoverError::Held(_)
        | HandoverError::WhichAgent(_) => ApiError::conflict("handover", message),
        HandoverError::Failover(_) | HandoverError::Journal(_) | HandoverError::Host(_) => {
            ApiError::internal(message).with_hint("run the same command again")
        }
    }
}
