//! Taking in disks that are here already.

use super::{
    audit::Outcome,
    site::{LINES_QUEUED, Site, store_error},
    types::{SeedLine, SeedRequest},
};
use crate::seed::SeedError;
use axum::{Extension, Json, extract::State, response::Response};
use lifeboat::{
    error::chain,
    local_api::{ApiError, Words, ndjson},
};
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) async fn seed(
    State(site): State<Arc<Site>>,
    Extension(outcome): Extension<Outcome>,
    Json(request): Json<SeedRequest>,
) -> Response {
    let end = outcome.later();
    let (lines, queue) = mpsc::channel::<Result<SeedLine, ApiError>>(LINES_QUEUED);
    // Its own task: a seed is not given up because the operator's terminal went away.
    tokio::spawn(async move {
        let intake = &site.runbook.intake;
        let progress = lines.clone();
        let tell = move |at| {
            let _ = progress.try_send(Ok(SeedLine::Progress(at)));
        };
        let seeded = async {
            let order = site.seeder.order(request, &site.runbook.catalog, &intake.board).await?;
            site.seeder.seed(&intake.slots, &order, tell).await
        };
        let last = match seeded.await {
            Ok(report) => Ok(SeedLine::Done { report }),
            Err(error) => {
                tracing::error!(error = chain(&error), "a seed did not succeed");
                Err(seed_error(error))
            }
        };
        end.ended(last.as_ref().err().map(|error| &error.body)).await;
        let _ = lines.send(last).await;
    });
    ndjson(queue)
}

pub(super) fn seed_error(error: SeedError) -> ApiError {
    let message = Words::of(&error);
    match error {
        SeedError::Store(error) => store_error(error),
        SeedError::Disks(_) | SeedError::Image { .. } => ApiError::conflict("disks", message),
        SeedError::Active { .. } | SeedError::Held(_) => ApiError::conflict("held", message),
        _ => ApiError::internal(message)
            .with_hint("nothing of it is kept; run the same command again when this is mended"),
    }
}
