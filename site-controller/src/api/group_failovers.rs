//! Failovers of groups: what one would mean, and doing it.

use super::{
    audit::Outcome,
    failovers::failover_error,
    groups::{book_error, point_error},
    site::{Site, catalog_error, watched},
    types::{GroupFailoverPreview, GroupFailoverRequest},
};
use crate::{
    catalog::Selector,
    failover::{
        error::FailoverError,
        group::{
            GroupError, outline,
            world::{Chosen, WholePoint},
        },
        journal::Manner,
        placing::Foreseen,
        progress::{Progress, Watcher},
        report::GroupReport,
        runbook::LATEST,
    },
    group::{Group, MemberVm, address_spec::Occasion, coordinator::new_cut, points::GroupPoint},
};
use axum::{Extension, Json, extract::State, response::Response};
use lifeboat::{
    error::chain,
    local_api::{ApiError, Words},
};
use std::sync::Arc;

pub(super) async fn preview(
    State(site): State<Arc<Site>>,
    Json(request): Json<GroupFailoverRequest>,
) -> Result<Json<GroupFailoverPreview>, ApiError> {
    let (group, point) = meant(&site, &request).await?;
    let board = site.coordinator.switchboard();
    let reached = group.members.iter().filter(|member| board.is_reached(member.vm));
    let cut_at = point.as_ref().map(|point| point.cut_at);
    let mut left_off = Vec::new();
    for member in point.iter().flat_map(|point| &point.members) {
        let found = site.runbook.catalog.find(member.vm, &member.point.to_string()).await;
        if found.map_err(catalog_error)?.stays_off {
            left_off.push(member.name.clone());
        }
    }
    let addresses = |member: &MemberVm| {
        let rules = group.spec.addresses(&member.name, Occasion::Failover).unwrap_or_default();
        let rules = rules.at(&site.config.name);
        (!rules.is_empty()).then(|| (member.name.clone(), rules.words()))
    };
    let hosts = hosts(&site, &group, point.as_ref()).await?;
    let fences = !site.runbook.stonith.command.is_empty() && !request.skip_fence_command;
    let of_site = outline::OfSite { fences, guest_hook: &site.runbook.guest_hook };
    let steps = outline::steps(&group.spec, request.planned, &left_off, of_site);
    Ok(Json(GroupFailoverPreview {
        name: group.spec.name.clone(),
        planned: request.planned,
        members: group.spec.vms.clone(),
        starts: group.spec.starts().unwrap_or_default(),
        cut_at,
        lost_ms: cut_at.map_or(0, |at| site.runbook.clock.now().0.saturating_sub(at.0)),
        left_off,
        reached: reached.map(|member| member.name.clone()).collect(),
        addresses: group.members.iter().filter_map(addresses).collect(),
        hosts,
        steps,
    }))
}

/// Of a planned one, for the newest points.
async fn hosts(site: &Site, group: &Group, point: Option<&GroupPoint>) -> Result<Option<Foreseen>, ApiError> {
    let mut points = Vec::new();
    for member in &group.members {
        let of = point.and_then(|point| point.members.iter().find(|of| of.vm == member.vm));
        let given = of.map_or_else(|| LATEST.to_owned(), |of| of.point.to_string());
        match site.runbook.catalog.find(member.vm, &given).await {
            Ok(point) => points.push((point, Manner::of(&group.spec, &member.name))),
            Err(_) if point.is_none() => return Ok(None),
            Err(error) => return Err(catalog_error(error)),
        }
    }
    Ok(site.runbook.foresee(&points).await)
}

pub(super) async fn fail_over(
    State(site): State<Arc<Site>>,
    Extension(outcome): Extension<Outcome>,
    Json(request): Json<GroupFailoverRequest>,
) -> Result<Response, ApiError> {
    let (group, point) = meant(&site, &request).await?;
    Ok(watched(outcome, |watcher| async move {
        let id = group.id;
        let done = carry_out(&site, group, point, &request, &watcher).await;
        // Sources that could not be told yet what became of them are told when they can be.
        tokio::spawn(async move { site.group_failovers.settle(id).await });
        let report = done.map_err(|error| {
            tracing::error!(error = chain(&error), "a group's failover did not succeed");
            group_error(&error)
        })?;
        Ok(Progress::GroupDone { report: Box::new(report) })
    }))
}

async fn carry_out(
    site: &Site,
    group: Group,
    point: Option<GroupPoint>,
    request: &GroupFailoverRequest,
    watcher: &Watcher,
) -> Result<GroupReport, GroupError> {
    match point {
        Some(point) => {
            let point = WholePoint::from(point);
            let chosen = Chosen { point: &point, newest: request.point == LATEST };
            site.group_failovers.emergency(group, chosen, request.skip_fence_command, watcher).await
        }
        None => site.group_failovers.planned(group, new_cut(), watcher).await,
    }
}

/// The group, or the VM as a group of one, and of an emergency the point.
async fn meant(site: &Site, request: &GroupFailoverRequest) -> Result<(Group, Option<GroupPoint>), ApiError> {
    if request.planned && request.point != LATEST {
        return Err(ApiError::bad_request(
            "point-of-planned",
            "a planned failover takes no point: it makes one of its own, which loses nothing",
        ));
    }
    let group = match site.coordinator.book.find(&request.name) {
        Ok(group) => group,
        Err(_) if request.planned => {
            let vm = site.runbook.catalog.find_vm(&request.name).await.map_err(catalog_error)?;
            if let Some(group) = site.coordinator.book.group_of(vm.vm) {
                let message = format!("{} is in group `{}`", vm.name, group.spec.name);
                let hint = format!("`lifeboat failover {} --planned` takes all of it", group.spec.name);
                return Err(ApiError::conflict("in-a-group", message).with_hint(hint));
            }
            Group::alone(vm.vm, &vm.name, site.runbook.clock.now())
        }
        Err(error) => return Err(book_error(error)),
    };
    if request.planned {
        return Ok((group, None));
    }
    let newest = request.point == LATEST;
    let begun =
        site.group_failovers.goes_on_with(group.id, newest).await.map_err(|error| group_error(&error))?;
    let point = match begun {
        Some(at) if newest => match chosen(site, &group, &at.to_string()).await {
            Ok(point) if point.cut_at == at => point,
            // The group has changed since; what was begun is done all the same.
            _ => chosen(site, &group, LATEST).await?,
        },
        _ => chosen(site, &group, &request.point).await?,
    };
    if let Some(at) = begun.filter(|at| !newest && *at != point.cut_at) {
        let message = format!("a failover of this group to its point of {at} is committed, and not finished");
        return Err(ApiError::conflict("conflict", message)
            .with_hint("run it again without --point: it goes on with that one; `lifeboat undo` takes it to another afterwards"));
    }
    Ok((group, Some(point)))
}

/// The point of the group that an operator means.
pub(super) async fn chosen(site: &Site, group: &Group, given: &str) -> Result<GroupPoint, ApiError> {
    let selector = Selector::parse(given, site.runbook.clock.now()).map_err(catalog_error)?;
    let found = site.coordinator.points.select(group, &selector).await.map_err(point_error)?;
    let name = &group.spec.name;
    let missing = || {
        let message = format!("group `{name}` has no point `{given}` that holds all its members");
        ApiError::not_found("no-point", message)
            .with_hint(format!("`lifeboat group points {name}` lists those there are"))
    };
    found.ok_or_else(missing)
}

pub(super) fn group_error(error: &GroupError) -> ApiError {
    let message = Words::of(error);
    match error {
        GroupError::NoPoint(_) => ApiError::not_found("no-point", message),
        GroupError::CalledOff { .. } => ApiError::conflict("called-off", message),
        GroupError::Busy => ApiError::conflict("busy", message),
        GroupError::Committed
        | GroupError::GivenUp
        | GroupError::Unfinished(_)
        | GroupError::DoneBefore(_) => ApiError::conflict("conflict", message),
        GroupError::Cut(_) | GroupError::Script(_) => ApiError::conflict("not-possible", message),
        GroupError::Vm(error)
            if matches!(
                **error,
                FailoverError::PointDamaged { .. } | FailoverError::NoHost { .. } | FailoverError::Host(_)
            ) =>
        {
            failover_error(error)
        }
        GroupError::Vm(_) | GroupError::Journal(_) | GroupError::Incomplete { .. } => {
            ApiError::internal(message)
                .with_hint("run the same command again: it goes on from the last step that was completed")
        }
    }
}
