//! The table of all requests: which role each needs at least, and whether it changes anything. The router is made of it,
//! so that there is no request without an entry, and each is guarded ([`super::gate`]) as its entry says.

use super::{
    audits, drills, failovers,
    gate::{self, Gate, Rule},
    group_failovers, groups, handovers, points, readiness,
    role::Role::{self, Admin, Operator, Viewer},
    seeds,
    site::Site,
    status, tokens, undos, verify,
};
use axum::{Router, handler::Handler, http::StatusCode, routing::MethodRouter};
use lifeboat::local_api::ApiError;
use std::sync::Arc;

/// One request: what it asks of its caller, and who answers.
pub struct Route {
    pub rule: Rule,
    handler: MethodRouter<Arc<Site>>,
}

/// All of them. A `post` that changes nothing says so.
pub fn table() -> Vec<Route> {
    vec![
        get("/v1/status", Viewer, status::status),
        get("/v1/readiness", Viewer, readiness::all),
        get("/v1/readiness/{name}", Viewer, readiness::one),
        get("/v1/inventory", Viewer, groups::inventory),
        get("/v1/groups", Viewer, groups::list),
        post("/v1/groups", Operator, groups::create),
        get("/v1/groups/{group}", Viewer, groups::show),
        post("/v1/groups/{group}", Operator, groups::change),
        get("/v1/groups/{group}/points", Viewer, groups::points),
        post("/v1/groups/{group}/pause", Operator, groups::pause),
        post("/v1/groups/{group}/resume", Operator, groups::resume),
        post("/v1/groups/{group}/delete", Operator, groups::delete),
        get("/v1/vms/{vm}/points", Viewer, points::points),
        get("/v1/vms/{vm}/prune", Viewer, points::prune_preview),
        post("/v1/vms/{vm}/prune", Operator, points::prune),
        post("/v1/vms/{vm}/release", Operator, status::release),
        post("/v1/failovers/preview", Viewer, failovers::preview).changes_nothing(),
        post("/v1/failovers", Operator, failovers::fail_over),
        post("/v1/group-failovers/preview", Viewer, group_failovers::preview).changes_nothing(),
        post("/v1/group-failovers", Operator, group_failovers::fail_over),
        post("/v1/undos/preview", Viewer, undos::preview).changes_nothing(),
        post("/v1/undos", Operator, undos::undo),
        get("/v1/drills", Viewer, drills::list),
        post("/v1/drills", Operator, drills::drill),
        get("/v1/drills/{drill}", Viewer, drills::show),
        post("/v1/drills/{drill}/end", Operator, drills::end),
        get("/v1/vms/{vm}/claim", Operator, handovers::claim),
        post("/v1/handovers", Operator, handovers::accept),
        // It reads any file of this machine that it is told to.
        post("/v1/seeds", Admin, seeds::seed),
        post("/v1/verify", Operator, verify::run_verify).changes_nothing(),
        get("/v1/audit", Admin, audits::audit),
        get("/v1/tokens", Admin, tokens::list),
        post("/v1/tokens", Admin, tokens::create),
        post("/v1/tokens/{token}/revoke", Admin, tokens::revoke),
    ]
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
    Route { rule, handler: axum::routing::get(handler) }
}

fn post<H, T>(path: &'static str, role: Role, handler: H) -> Route
where
    H: Handler<T, Arc<Site>>,
    T: 'static,
{
    let rule = Rule { method: "POST", path, role, mutating: true };
    Route { rule, handler: axum::routing::post(handler) }
}

impl Route {
    fn changes_nothing(mut self) -> Self {
        self.rule.mutating = false;
        self
    }
}

#[cfg(test)]
mod tests;
