//! The table of all requests: which role each needs at least, and whether it changes anything. The router is made of it,
//! so that there is no request without an entry, and each is guarded ([`super::gate`]) as its entry says.

use super::{
    audits, drills, failovers,
    gate::{self, Gate, Rule},
    group_failovers, groups, handovers,
    openapi::{self, Shape},
    points, readiness, replicas, reports,
    role::Role::{self, Admin, Operator, Viewer},
    seeds,
    site::Site,
    status, tokens,
    types::{
        AuditList, AuditQuery, DrillRequest, FailoverPreview, FailoverRequest, GroupFailoverPreview,
        GroupFailoverRequest, GroupPointList, GroupRequest, GroupRow, InventoryList, PointList, PrunePreview,
        PruneReport, Released, ReplicaList, ReportQuery, SeedLine, SeedRequest, SiteStatus, TokenCreated,
        TokenRequest, TokenRow, UndoPreview, UndoRequest, VerifyLine, VerifyRequest,
    },
    undos, verify,
};
use crate::{
    drill::DrillRecord,
    failover::progress::Progress,
    group::Group,
    handover::{AcceptLine, Acceptance, Claim},
    readiness::Readiness,
    report::Report,
};
use axum::{Json, Router, handler::Handler, http::StatusCode, routing::MethodRouter};
use lifeboat::local_api::ApiError;
use schemars::JsonSchema;
use serde_json::Value;
use std::sync::{Arc, LazyLock};

/// One request: what it asks of its caller, what it takes and gives, and who answers.
pub struct Route {
    pub rule: Rule,
    pub shape: Shape,
    handler: MethodRouter<Arc<Site>>,
}

/// All of them. A `post` that changes nothing says so.
pub fn table() -> Vec<Route> {
    [looking(), groups_of_vms(), acting(), concerning_callers()].into_iter().flatten().collect()
}

fn looking() -> Vec<Route> {
    vec![
        get("/openapi.json", Viewer, serve_document).gives::<Value>("This document"),
        get("/v1/status", Viewer, status::status).gives::<SiteStatus>("The site and its VMs"),
        get("/v1/readiness", Viewer, readiness::all)
            .gives::<Vec<Readiness>>("Whether failovers would work, of all groups and VMs"),
        get("/v1/readiness/{name}", Viewer, readiness::one)
            .gives::<Readiness>("Whether a failover of a group or VM would work"),
        get("/v1/report", Viewer, reports::report)
            .asks::<ReportQuery>()
            .gives::<Report>("What an auditor asks: points, RPO attained, drills, failovers, readiness"),
        get("/v1/inventory", Viewer, groups::inventory).gives::<InventoryList>("The VMs of connected hosts"),
        get("/v1/vms/{vm}/points", Viewer, points::points).gives::<PointList>("The recovery points of a VM"),
        get("/v1/vms/{vm}/prune", Viewer, points::prune_preview)
            .gives::<PrunePreview>("Which points of a VM no rule keeps"),
        get("/v1/vms/{vm}/claim", Operator, handovers::claim)
            .gives::<Claim>("This site's word that a VM runs here since a failover"),
    ]
}

fn groups_of_vms() -> Vec<Route> {
    vec![
        get("/v1/groups", Viewer, groups::list).gives::<Vec<GroupRow>>("The protection groups"),
        post("/v1/groups", Operator, groups::create)
            .takes::<GroupRequest>()
            .gives::<GroupRow>("Makes a group; what its runbook runs here is for an admin to say"),
        get("/v1/groups/{group}", Viewer, groups::show).gives::<GroupRow>("One group"),
        post("/v1/groups/{group}", Operator, groups::change)
            .takes::<GroupRequest>()
            .gives::<GroupRow>("Replaces what a group says, its name too"),
        get("/v1/groups/{group}/points", Viewer, groups::points)
            .gives::<GroupPointList>("The points that all its members have of one instant"),
        post("/v1/groups/{group}/pause", Operator, groups::pause)
            .gives::<GroupRow>("No points until it is resumed"),
        post("/v1/groups/{group}/resume", Operator, groups::resume).gives::<GroupRow>("Goes on with points"),
        post("/v1/groups/{group}/delete", Operator, groups::delete)
            .gives::<Group>("Forgets a group; the points of its VMs stay"),
    ]
}

fn acting() -> Vec<Route> {
    vec![
        post("/v1/vms/{vm}/prune", Operator, points::prune)
            .gives::<PruneReport>("Takes away what no rule keeps, and folds what is left"),
        post("/v1/vms/{vm}/release", Operator, status::release)
            .gives::<Released>("Lets another host's agent go on with a VM's history"),
        post("/v1/failovers/preview", Viewer, failovers::preview)
            .changes_nothing()
            .takes::<FailoverRequest>()
            .gives::<FailoverPreview>("What a failover of a VM would mean"),
        post("/v1/failovers", Operator, failovers::fail_over)
            .takes::<FailoverRequest>()
            .streams::<Progress>("Brings a VM up here, its source given up"),
        post("/v1/group-failovers/preview", Viewer, group_failovers::preview)
            .changes_nothing()
            .takes::<GroupFailoverRequest>()
            .gives::<GroupFailoverPreview>("What a failover of a group would mean"),
        post("/v1/group-failovers", Operator, group_failovers::fail_over)
            .takes::<GroupFailoverRequest>()
            .streams::<Progress>("Brings a group up here, planned or its sources given up"),
        post("/v1/undos/preview", Viewer, undos::preview)
            .changes_nothing()
            .takes::<UndoRequest>()
            .gives::<UndoPreview>("What taking a completed failover to another point would mean"),
        post("/v1/undos", Operator, undos::undo)
            .takes::<UndoRequest>()
            .streams::<Progress>("Takes a completed failover to another point, within its window"),
        get("/v1/replicas", Viewer, replicas::list)
            .gives::<ReplicaList>("The folders of replicas, and who needs each"),
        post("/v1/replicas/prune", Operator, replicas::prune)
            .gives::<ReplicaList>("Removes the folders of replicas that nobody needs; those that it removed"),
        get("/v1/drills", Viewer, drills::list).gives::<Vec<DrillRecord>>("The failovers for trial"),
        post("/v1/drills", Operator, drills::drill)
            .takes::<DrillRequest>()
            .streams::<Progress>("Starts replicas for trial, beside whatever runs"),
        get("/v1/drills/{drill}", Viewer, drills::show).gives::<DrillRecord>("One failover for trial"),
        post("/v1/drills/{drill}/end", Operator, drills::end)
            .gives::<Vec<DrillRecord>>("Takes away what a failover for trial left running"),
        post("/v1/handovers", Operator, handovers::accept)
            .takes::<Acceptance>()
            .streams::<AcceptLine>("Lets the site where a VM runs now protect it to here"),
        // It reads any file of this machine that it is told to.
        post("/v1/seeds", Admin, seeds::seed)
            .takes::<SeedRequest>()
            .streams::<SeedLine>("Takes in disks that are here already"),
        post("/v1/verify", Operator, verify::run_verify)
            .changes_nothing()
            .takes::<VerifyRequest>()
            .streams::<VerifyLine>("Reads and hashes again what is stored"),
    ]
}

fn concerning_callers() -> Vec<Route> {
    vec![
        get("/v1/audit", Admin, audits::audit)
            .asks::<AuditQuery>()
            .gives::<AuditList>("The calls that changed something, or were to"),
        get("/v1/tokens", Admin, tokens::list).gives::<Vec<TokenRow>>("Who may ask over the network"),
        post("/v1/tokens", Admin, tokens::create)
            .takes::<TokenRequest>()
            .gives::<TokenCreated>("Makes a token, and shows it this once"),
        post("/v1/tokens/{token}/revoke", Admin, tokens::revoke).gives::<TokenRow>("Takes a token away"),
    ]
}

/// The API's document (OpenAPI 3.1): what all of these take and give.
pub fn document() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
        openapi::document(&table().iter().map(|route| (route.rule, route.shape)).collect::<Vec<_>>())
    });
    &DOCUMENT
}

async fn serve_document() -> Json<&'static Value> {
    Json(document())
}

pub fn router(site: Arc<Site>) -> Router {
    let gate = site.gate.clone();
    assemble(table().into_iter().map(|route| (route.rule, route.handler)), &gate).with_state(site)
}

/// Each route behind the gate.
fn assemble<S: Clone + Send + Sync + 'static>(
    routes: impl Iterator<Item = (Rule, MethodRouter<S>)>,
    gate: &Arc<Gate>,
) -> Router<S> {
    let guarded = routes.fold(Router::new(), |router, (rule, handler)| {
        router.route(rule.path, gate::guard(rule, handler, gate))
    });
    guarded.method_not_allowed_fallback(async || {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "unknown-request", "this is not asked in this way")
    })
}

fn get<H, T>(path: &'static str, role: Role, handler: H) -> Route
where
    H: Handler<T, Arc<Site>>,
    T: 'static,
{
    let rule = Rule { method: "GET", path, role, mutating: false };
    Route { rule, shape: Shape::default(), handler: axum::routing::get(handler) }
}

fn post<H, T>(path: &'static str, role: Role, handler: H) -> Route
where
    H: Handler<T, Arc<Site>>,
    T: 'static,
{
    let rule = Rule { method: "POST", path, role, mutating: true };
    Route { rule, shape: Shape::default(), handler: axum::routing::post(handler) }
}

impl Route {
    fn changes_nothing(mut self) -> Self {
        self.rule.mutating = false;
        self
    }
    fn asks<T: JsonSchema>(self) -> Self {
        Self { shape: self.shape.asks::<T>(), ..self }
    }
    fn takes<T: JsonSchema>(self) -> Self {
        Self { shape: self.shape.takes::<T>(), ..self }
    }
    fn gives<T: JsonSchema>(self, summary: &'static str) -> Self {
        Self { shape: self.shape.gives::<T>(summary, false), ..self }
    }
    /// Answers line by line.
    fn streams<T: JsonSchema>(self, summary: &'static str) -> Self {
        Self { shape: self.shape.gives::<T>(summary, true), ..self }
    }
}

#[cfg(test)]
mod tests;
