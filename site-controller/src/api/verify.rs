//! Reading everything again.

use super::{
    site::{LINES_QUEUED, Site, catalog_error, store_error},
    types::{VerifyLine, VerifyRequest},
};
use crate::{store::Pin, verify};
use axum::{Json, extract::State, response::Response};
use lifeboat::local_api::{ApiError, ndjson};
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) async fn run_verify(
    State(site): State<Arc<Site>>,
    Json(request): Json<VerifyRequest>,
) -> Result<Response, ApiError> {
    let runbook = site.runbook.clone();
    let vm = match request.vm {
        Some(given) => Some(runbook.catalog.which(&given).await.map_err(catalog_error)?),
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
