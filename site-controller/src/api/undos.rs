//! Taking a completed failover to another point: what it would mean, and doing it.

use super::{
    audit::Outcome,
    failovers::failover_error,
    group_failovers::{chosen, group_error},
    site::{Site, catalog_error, watched},
    types::{UndoPreview, UndoRequest},
};
use crate::{
    failover::{group::world::WholePoint, journal::Phase, progress::Progress, undo},
    group::{Group, points::GroupPoint},
    store::PointSummary,
};
use axum::{Extension, Json, extract::State, response::Response};
use lifeboat::local_api::{ApiError, Words};
use std::{sync::Arc, time::Duration};

/// A group and a point of it, or a VM and one of its.
enum Meant {
    Group(Box<(Group, GroupPoint)>),
    Vm(String, PointSummary),
}

pub(super) async fn preview(
    State(site): State<Arc<Site>>,
    Json(request): Json<UndoRequest>,
) -> Result<Json<UndoPreview>, ApiError> {
    let internal = |error: &(dyn std::error::Error + 'static)| ApiError::internal(Words::of(error));
    let (name, members, cut_at, ran, window) = match meant(&site, &request).await? {
        Meant::Group(meant) => {
            let (group, point) = *meant;
            let record = site.runbook.journal.load_group(group.id).map_err(|error| internal(&error))?;
            let ran = record.and_then(|record| record.running_at);
            let members = point.members.iter().map(|member| member.name.clone()).collect();
            let window = group.spec.undo_window();
            (group.spec.name, members, point.cut_at, ran, window)
        }
        Meant::Vm(name, point) => {
            let record = site.runbook.journal.load(point.vm).map_err(|error| internal(&error))?;
            let ran =
                record.filter(|record| record.phase == Phase::Running).and_then(|record| record.running_at);
            (name.clone(), vec![name], point.cut_at, ran, undo::WINDOW)
        }
    };
    let now = site.runbook.clock.now();
    Ok(Json(UndoPreview {
        name,
        members,
        cut_at,
        ran_ms: ran.map(|ran| now.0.saturating_sub(ran.0)),
        open_until: ran.map(|ran| ran.after(window)),
        kept_until: now.after(window),
    }))
}

pub(super) async fn undo(
    State(site): State<Arc<Site>>,
    Extension(outcome): Extension<Outcome>,
    Json(request): Json<UndoRequest>,
) -> Result<Response, ApiError> {
    let meant = meant(&site, &request).await?;
    Ok(watched(outcome, |watcher| async move {
        match meant {
            Meant::Group(meant) => {
                let (group, point) = *meant;
                let (id, window): (_, Duration) = (group.id, group.spec.undo_window());
                let point = WholePoint::from(point);
                let done = site.group_failovers.undo(id, &point, window, &watcher).await;
                let report = done.map_err(|error| group_error(&error))?;
                Ok(Progress::GroupDone { report: Box::new(report) })
            }
            Meant::Vm(_, point) => {
                let given = point.point.to_string();
                let done = site.runbook.undo(point.vm, &given, &watcher).await;
                let report = done.map_err(|error| failover_error(&error))?;
                Ok(Progress::Done { report: Box::new(report) })
            }
        }
    }))
}

async fn meant(site: &Site, request: &UndoRequest) -> Result<Meant, ApiError> {
    if let Ok(group) = site.coordinator.book.find(&request.name) {
        let point = chosen(site, &group, &request.point).await?;
        return Ok(Meant::Group(Box::new((group, point))));
    }
    let vm = site.runbook.catalog.find_vm(&request.name).await.map_err(catalog_error)?;
    if let Some(group) = site.coordinator.book.group_of(vm.vm) {
        let message = format!("{} is in group `{}`", vm.name, group.spec.name);
        let hint = format!("`lifeboat undo {}` takes all of it", group.spec.name);
        return Err(ApiError::conflict("in-a-group", message).with_hint(hint));
    }
    let point = site.runbook.catalog.find(vm.vm, &request.point).await.map_err(catalog_error)?;
    Ok(Meant::Vm(vm.name, point))
}
