//! The auditor's report.

use super::{
    site::{Site, catalog_error},
    types::ReportQuery,
};
use crate::{
    catalog::Selector,
    report::{
        Report,
        gather::{Period, ReportError},
    },
};
use axum::{
    Json,
    extract::{Query, State},
};
use lifeboat::{
    local_api::{ApiError, Words},
    units::{Span, UnixMs},
};
use std::sync::Arc;

pub(super) async fn report(
    State(site): State<Arc<Site>>,
    Query(query): Query<ReportQuery>,
) -> Result<Json<Report>, ApiError> {
    let now = site.runbook.clock.now();
    let since = since(query.since.as_deref().unwrap_or(USUAL), now)?;
    let sources = site.sources();
    sources.report(query.name.as_deref(), Period { since, now }).await.map(Json).map_err(
        |error| match error {
            ReportError::Catalog(error) => catalog_error(error),
            ReportError::Points(_)
            | ReportError::Journal(_)
            | ReportError::Slots(_)
            | ReportError::Task(_) => ApiError::internal(Words::of(&error)),
        },
    )
}

/// A span, or an instant.
fn since(given: &str, now: UnixMs) -> Result<UnixMs, ApiError> {
    if let Ok(span) = given.parse::<Span>() {
        let back = u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX);
        return Ok(UnixMs(now.0.saturating_sub(back)));
    }
    match Selector::parse(given, now) {
        Ok(Selector::AtOrBefore(at)) => Ok(at),
        Ok(Selector::Latest | Selector::Id(_)) | Err(_) => {
            let message = format!("`{}` is no span of time and no instant", given.escape_debug());
            Err(ApiError::bad_request("bad-time", message).with_hint("write `30d` or `2026-01-31T12:00:00Z`"))
        }
    }
}

const USUAL: &str = "30d";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_span_or_an_instant() {
        let now = UnixMs(1_800_000_000_000);
        assert_eq!(since("30d", now).unwrap(), UnixMs(now.0 - 30 * 86_400_000));
        assert_eq!(since("2h ago", now).unwrap(), UnixMs(now.0 - 7_200_000));
        assert_eq!(since("2026-01-31T12:00:00Z", now).unwrap(), UnixMs(1_769_860_800_000));
        assert_eq!(since("9999999d", now).unwrap(), UnixMs(0));
        assert!(since("latest", now).is_err() && since("abcd", now).is_err() && since("", now).is_err());
    }
}
