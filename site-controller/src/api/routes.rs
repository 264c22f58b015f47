//! The table of all requests: which role each needs at least, and whether it changes anything. The router is made of it,
//! so that there is no request without an entry.

use super::{
    failovers, group_failovers, groups, handovers, points, readiness,
    role::Role::{self, Operator, Viewer},
    seeds,
    site::Site,
    status, verify,
};
use axum::{Router, handler::Handler, routing::MethodRouter};
use std::sync::Arc;

/// One request.
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    /// The least role that may ask it.
    pub role: Role,
    /// It changes something.
    pub mutating: bool,
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
        get("/v1/vms/{vm}/claim", Operator, handovers::claim),
        post("/v1/handovers", Operator, handovers::accept),
        post("/v1/seeds", Operator, seeds::seed),
        post("/v1/verify", Operator, verify::run_verify).changes_nothing(),
    ]
}

pub fn router(site: Arc<Site>) -> Router {
    let routes = table().into_iter();
    routes.fold(Router::new(), |router, route| router.route(route.path, route.handler)).with_state(site)
}

fn get<H, T>(path: &'static str, role: Role, handler: H) -> Route
where
    H: Handler<T, Arc<Site>>,
    T: 'static,
{
    Route { method: "GET", path, role, mutating: false, handler: axum::routing::get(handler) }
}

fn post<H, T>(path: &'static str, role: Role, handler: H) -> Route
where
    H: Handler<T, Arc<Site>>,
    T: 'static,
{
    Route { method: "POST", path, role, mutating: true, handler: axum::routing::post(handler) }
}

impl Route {
    fn changes_nothing(self) -> Self {
        Self { mutating: false, ..self }
    }
}
