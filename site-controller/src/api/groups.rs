//! Protection groups: made, changed, shown; and what there is to protect.

use super::{
    automatic::may_ask,
    caller::Caller,
    role::Role,
    site::{Site, catalog_error},
    types::{GroupPointList, GroupRequest, GroupRow, GroupState, InventoryList, InventoryRow},
};
use crate::group::{BookError, Group, GroupSpec, MemberVm, points::GroupPointError};
use axum::{
    Extension, Json,
    extract::{Path, State},
    http::StatusCode,
};
use lifeboat::{
    id::VmId,
    local_api::{ApiError, Words},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

type Answer<T> = Result<Json<T>, ApiError>;

pub(super) async fn list(State(site): State<Arc<Site>>) -> Answer<Vec<GroupRow>> {
    Ok(Json(rows(&site).await?))
}

/// All groups.
pub(super) async fn rows(site: &Site) -> Result<Vec<GroupRow>, ApiError> {
    let mut rows = Vec::new();
    for group in site.coordinator.book.list() {
        rows.push(row(site, group).await?);
    }
    Ok(rows)
}

pub(super) async fn show(State(site): State<Arc<Site>>, Path(group): Path<String>) -> Answer<GroupRow> {
    let group = site.coordinator.book.find(&group).map_err(book_error)?;
    Ok(Json(row(&site, group).await?))
}

pub(super) async fn points(
    State(site): State<Arc<Site>>,
    Path(group): Path<String>,
) -> Answer<GroupPointList> {
    let group = site.coordinator.book.find(&group).map_err(book_error)?;
    let points = site.coordinator.points.list(&group).await.map_err(point_error)?;
    Ok(Json(GroupPointList { group: group.spec.name, points }))
}

pub(super) async fn create(
    State(site): State<Arc<Site>>,
    Extension(caller): Extension<Caller>,
    Json(request): Json<GroupRequest>,
) -> Answer<GroupRow> {
    let spec = checked(request.spec)?;
    may_say(&caller, None, &spec)?;
    known_hosts(&site, None, &spec)?;
    let members = resolve(&site, &spec, &[]).await?;
    may_ask(&site, None, &spec, &members).await?;
    let (coordinator, now) = (site.coordinator.clone(), site.runbook.clock.now());
    let group = blocking(move || coordinator.book.create(spec, members, now)).await?;
    site.coordinator.announce(ids(&group)).await;
    Ok(Json(row(&site, group).await?))
}

/// Replaces what the group says; its name, too, if that differs.
pub(super) async fn change(
    State(site): State<Arc<Site>>,
    Path(group): Path<String>,
    Extension(caller): Extension<Caller>,
    Json(request): Json<GroupRequest>,
) -> Answer<GroupRow> {
    let before = site.coordinator.book.find(&group).map_err(book_error)?;
    let spec = checked(request.spec)?;
    may_say(&caller, Some(&before.spec), &spec)?;
    known_hosts(&site, Some(&before.spec), &spec)?;
    let members = resolve(&site, &spec, &before.members).await?;
    may_ask(&site, Some((&before.spec, &before.members)), &spec, &members).await?;
    alter(&site, before, move |group| (group.spec, group.members) = (spec, members)).await
}

pub(super) async fn pause(State(site): State<Arc<Site>>, Path(group): Path<String>) -> Answer<GroupRow> {
    let before = site.coordinator.book.find(&group).map_err(book_error)?;
    alter(&site, before, |group| group.paused = true).await
}

pub(super) async fn resume(State(site): State<Arc<Site>>, Path(group): Path<String>) -> Answer<GroupRow> {
    let before = site.coordinator.book.find(&group).map_err(book_error)?;
    alter(&site, before, |group| group.paused = false).await
}

/// Its members are no longer protected by it; their points stay, and its history waits for a group of its name.
pub(super) async fn delete(State(site): State<Arc<Site>>, Path(group): Path<String>) -> Answer<Group> {
    let group = site.coordinator.book.find(&group).map_err(book_error)?;
    let (coordinator, id, now) = (site.coordinator.clone(), group.id, site.runbook.clock.now());
    blocking(move || {
        for forgotten in coordinator.book.delete(id, now)? {
            if let Err(error) = coordinator.points.forget(forgotten) {
                tracing::warn!(%error, "what was recorded of a group that is gone could not be removed");
            }
        }
        Ok(())
    })
    .await?;
    site.coordinator.announce(ids(&group)).await;
    Ok(Json(group))
}

pub(super) async fn inventory(State(site): State<Arc<Site>>) -> Json<InventoryList> {
    let row = |host: crate::intake::switchboard::OnHost| InventoryRow {
        vm: host.vm.vm,
        group: site.coordinator.book.group_of(host.vm.vm).map(|group| group.spec.name),
        name: host.vm.name,
        agent: host.agent,
        running: host.vm.running,
    };
    let mut vms: Vec<InventoryRow> = site.runbook.intake.switchboard.all().into_iter().map(row).collect();
    vms.sort_by(|a, b| (&a.name, &a.agent).cmp(&(&b.name, &b.agent)));
    Json(InventoryList { vms })
}

async fn alter(
    site: &Arc<Site>,
    before: Group,
    change: impl FnOnce(&mut Group) + Send + 'static,
) -> Answer<GroupRow> {
    let (coordinator, now, id) = (site.coordinator.clone(), site.runbook.clock.now(), before.id);
    let group = blocking(move || coordinator.book.change(id, now, change)).await?;
    let told: BTreeSet<VmId> = ids(&before).chain(ids(&group)).collect();
    site.coordinator.announce(told).await;
    Ok(Json(row(site, group).await?))
}

async fn row(site: &Site, group: Group) -> Result<GroupRow, ApiError> {
    let now = site.runbook.clock.now();
    let (newest, points) = site.coordinator.points.newest(&group).await.map_err(point_error)?;
    let rpo_ms = newest.as_ref().map(|newest| now.0.saturating_sub(newest.cut_at.0));
    let rpo_target_ms = u64::try_from(group.spec.rpo().as_millis()).unwrap_or(u64::MAX);
    let cuts = site.coordinator.progress(group.id);
    let state = match rpo_ms {
        _ if group.paused => GroupState::Paused,
        None => GroupState::Seeding,
        Some(age) if age > rpo_target_ms => GroupState::Late,
        Some(_) => GroupState::Protected,
    };
    let held_up: Vec<String> = cuts.held_up.iter().map(|(vm, why)| format!("{vm}: {why}")).collect();
    let apart: Vec<&str> = group
        .members
        .iter()
        .filter(|member| !site.runbook.intake.switchboard.is_reached(member.vm))
        .map(|member| member.name.as_str())
        .collect();
    let reason = match state {
        GroupState::Paused => Some(format!("paused; `lifeboat group resume {}` goes on", group.spec.name)),
        GroupState::Protected => None,
        GroupState::Seeding | GroupState::Late if !apart.is_empty() => {
            Some(format!("no connected agent has {}", apart.join(", ")))
        }
        GroupState::Seeding | GroupState::Late => (!held_up.is_empty()).then(|| held_up.join("; ")),
    };
    let readiness = site.readiness.last(&group.spec.name);
    let automatic = match &site.automatic {
        Some(automatic) => automatic.said(group.id),
        None => group.spec.automatic.then(|| "never: site.toml has no [witness]".to_owned()),
    };
    let last_drill = site.driller.book.last_of(group.id).map(Into::into);
    Ok(GroupRow {
        group,
        now,
        state,
        readiness,
        reason,
        rpo_ms,
        rpo_target_ms,
        points,
        newest,
        cuts,
        last_drill,
        automatic,
    })
}

/// Which VMs are meant: those that a group had before, those of connected hosts, and those that have points here.
async fn resolve(site: &Site, spec: &GroupSpec, before: &[MemberVm]) -> Result<Vec<MemberVm>, ApiError> {
    let mut known = BTreeMap::<VmId, String>::new();
    for vm in site.runbook.catalog.vms().await.map_err(catalog_error)? {
        known.insert(vm.vm, vm.name);
    }
    for host in site.runbook.intake.switchboard.all() {
        known.insert(host.vm.vm, host.vm.name);
    }
    let one = |given: &String| {
        if let Some(member) = before.iter().find(|member| member.name == *given) {
            return Ok(member.clone());
        }
        let id: Option<VmId> = given.parse().ok();
        let mut meant =
            known.iter().filter(|(vm, name)| Some(**vm) == id || *name == given).map(|(vm, _)| *vm);
        match (meant.next().or(id), meant.next()) {
            (Some(vm), None) => Ok(MemberVm { vm, name: given.clone() }),
            (Some(_), Some(_)) => {
                let message = format!("several VMs are called `{given}`; name it by its UUID");
                Err(ApiError::bad_request("ambiguous", message))
            }
            (None, _) => {
                let message = format!("no VM `{}` is known here", given.escape_debug());
                let hint = "`lifeboat inventory` lists the VMs of the hosts whose agents are connected; a UUID is taken in \
                            any case";
                Err(ApiError::not_found("unknown-vm", message).with_hint(hint))
            }
        }
    };
    spec.vms.iter().map(one).collect()
}

fn checked(spec: GroupSpec) -> Result<GroupSpec, ApiError> {
    spec.check().map_err(|error| ApiError::bad_request("bad-group", error.to_string()))?;
    Ok(spec)
}

/// Which commands the site runs, as root, and on which hosts it acts, is for an admin to say; others may leave it as it is.
fn may_say(caller: &Caller, before: Option<&GroupSpec>, spec: &GroupSpec) -> Result<(), ApiError> {
    let said = |spec: &GroupSpec| {
        let hosts: BTreeMap<_, _> = spec
            .runbook
            .vm
            .iter()
            .filter(|(_, steps)| !steps.hosts.is_empty())
            .map(|(vm, steps)| (vm.clone(), steps.hosts.clone()))
            .collect();
        (spec.runbook.before.clone(), spec.runbook.after.clone(), spec.drill.checks.clone(), hosts)
    };
    if caller.role >= Role::Admin || said(spec) == before.map(said).unwrap_or_default() {
        return Ok(());
    }
    let message = format!(
        "{caller} has the role {}; commands and hosts of a runbook are for an admin to say",
        caller.role
    );
    Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", message))
}

/// Of several hosts those that a runbook names must be there; where there is one, `hosts` says nothing. What was said may stay.
fn known_hosts(site: &Site, before: Option<&GroupSpec>, spec: &GroupSpec) -> Result<(), ApiError> {
    let hosts = &site.runbook.hosts;
    for (vm, steps) in spec.runbook.vm.iter().filter(|_| hosts.are_several()) {
        let said = before.and_then(|before| before.runbook.vm.get(vm)).map(|steps| &steps.hosts);
        let strangers = hosts.strangers(&steps.hosts);
        if let Some(stranger) = strangers.first().filter(|_| said != Some(&steps.hosts)) {
            let known: Vec<&str> = hosts.all().iter().map(|host| host.name.as_str()).collect();
            let message = format!(
                "runbook.vm.{vm}.hosts: this site has no host `{}`; it has {}",
                stranger.escape_debug(),
                known.join(", ")
            );
            return Err(ApiError::bad_request("bad-group", message));
        }
    }
    Ok(())
}

fn ids(group: &Group) -> impl Iterator<Item = VmId> {
    group.members.iter().map(|member| member.vm).collect::<Vec<_>>().into_iter()
}

/// Changes of the book wait for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BookError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(book_error),
        Err(error) => Err(ApiError::internal(error.to_string())),
    }
}

pub(super) fn book_error(error: BookError) -> ApiError {
    let message = Words::of(&error);
    match error {
        BookError::Unknown(_) => ApiError::not_found("unknown-group", message),
        BookError::Spec(_) | BookError::Twice(_) => ApiError::bad_request("bad-group", message),
        BookError::NameTaken(_) | BookError::Member { .. } | BookError::TooMany => {
            ApiError::conflict("conflict", message)
        }
        BookError::Disk { .. } | BookError::Malformed { .. } => ApiError::internal(message),
    }
}

pub(super) fn point_error(error: GroupPointError) -> ApiError {
    match error {
        GroupPointError::Several { .. } => ApiError::bad_request("ambiguous", Words::of(&error)),
        GroupPointError::Disk { .. } | GroupPointError::Store(_) => ApiError::internal(Words::of(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::caller::Who, group::address_spec::CardSpec};
    use lifeboat::local_api::Origin;

    #[test]
    fn what_the_site_runs_as_root_is_said_by_an_admin_alone() {
        let caller = |role| Caller {
            who: Who::Token { name: "ops".into(), id: "1".into() },
            role,
            origin: Origin::Network { from: "10.0.0.1:1".parse().unwrap() },
        };
        let (operator, admin) = (caller(Role::Operator), caller(Role::Admin));
        let plain = GroupSpec::new("shop", &["web"]);
        let change = |change: fn(&mut GroupSpec)| {
            let mut spec = plain.clone();
            change(&mut spec);
            spec
        };
        let told = [
            change(|spec| spec.runbook.before = vec![vec!["/bin/true".into()]]),
            change(|spec| spec.runbook.after = vec![vec!["/bin/true".into()]]),
            change(|spec| spec.drill.checks = vec![vec!["/bin/true".into()]]),
            change(|spec| {
                spec.runbook.vm.entry("web".into()).or_default().hosts = vec!["qemu+ssh://x/system".into()];
            }),
        ];
        for spec in &told {
            assert!(
                may_say(&operator, None, spec).is_err() && may_say(&operator, Some(&plain), spec).is_err()
            );
            assert!(may_say(&operator, Some(spec), &plain).is_err(), "nor taken away by others");
            assert!(may_say(&admin, None, spec).is_ok());
            let mut other = spec.clone();
            other.rpo = "9s".into();
            assert!(may_say(&operator, Some(spec), &other).is_ok(), "what was said may stay");
        }
        assert!(may_say(&operator, None, &plain).is_ok());
        // Less than `guest_hook`: words of ours, with addresses.
        let addressed = change(|spec| {
            let card = CardSpec { ip: vec!["10.9.0.5/24".into()], ..CardSpec::default() };
            spec.runbook.vm.entry("web".into()).or_default().address = vec![card];
        });
        assert!(may_say(&operator, None, &addressed).is_ok());
    }
}
