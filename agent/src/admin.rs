//! The agent's local API: `GET /v1/status`, and `POST /v1/yield`, `/v1/resume`, `/v1/resync`, `/v1/unprotect`. Served by
//! `daemon`, asked by the commands of the same names. Promises: an answer to `yield` or `unprotect` means that nothing
//! is held any more.

use crate::protect::{
    neighbour::{Asked, Neighbour, Neighbours},
    status::{AgentStatus, Board},
};
use axum::{
    Json, Router,
    extract::State,
    routing::{get, post},
};
use lifeboat::{boot, clock::Clock, local_api::ApiError, units::UnixMs};
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};

type Shared = (Board, Arc<dyn Clock>, Neighbours);

/// Keep aside for a while.
#[derive(Debug, Serialize, Deserialize)]
pub struct YieldRequest {
    pub vm: String,
    pub for_ms: u64,
    /// Who asks, for status.
    pub by: String,
}

/// Go on; compare with the site; or end the protection.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmRequest {
    pub vm: String,
}

/// What has been done, in words.
#[derive(Debug, Serialize, Deserialize)]
pub struct Done {
    pub done: String,
}

pub fn router(board: Board, clock: Arc<dyn Clock>, neighbours: Neighbours) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/yield", post(keep_aside))
        .route("/v1/resume", post(resume))
        .route("/v1/resync", post(resync))
        .route("/v1/unprotect", post(unprotect))
        .with_state((board, clock, neighbours))
}

async fn status(State((board, clock, _)): State<Shared>) -> Json<AgentStatus> {
    Json(board.read(clock.now()))
}

async fn keep_aside(
    State((_, clock, neighbours)): State<Shared>,
    Json(request): Json<YieldRequest>,
) -> Result<Json<Done>, ApiError> {
    let neighbour = find(&neighbours, &request.vm)?;
    if !(1..=YIELD_MAX_MS).contains(&request.for_ms) {
        return Err(ApiError::bad_request("bad-time", "keep aside for how long? up to 30d: `10m`"));
    }
    let by: String = request.by.chars().filter(|c| !c.is_control()).take(BY_MAX).collect();
    let until_uptime_ms = boot::uptime_ms().saturating_add(request.for_ms);
    let until = UnixMs(clock.now().0.saturating_add(request.for_ms));
    remembered(neighbour.ask(Some(Asked { until_uptime_ms, until, by })))?;
    until_aside(&neighbour).await?;
    let done = format!(
        "{}: nothing is held in its QEMU, but for dirty bitmaps, until {until}; `lifeboat-agent resume {}` ends it",
        request.vm, request.vm
    );
    Ok(Json(Done { done }))
}

async fn resume(
    State((_, _, neighbours)): State<Shared>,
    Json(request): Json<VmRequest>,
) -> Result<Json<Done>, ApiError> {
    let neighbour = find(&neighbours, &request.vm)?;
    remembered(neighbour.ask(None))?;
    let done = match neighbour.why() {
        Some(why) => format!("{}: nobody asks for it any more, but it is still {why}", request.vm),
        None => format!("{}: protection goes on", request.vm),
    };
    Ok(Json(Done { done }))
}

async fn resync(
    State((_, _, neighbours)): State<Shared>,
    Json(request): Json<VmRequest>,
) -> Result<Json<Done>, ApiError> {
    let neighbour = find(&neighbours, &request.vm)?;
    neighbour.ask_afresh();
    let done = format!(
        "{}: the next point compares all of its memory and disks with the site's copy; `lifeboat-agent status` tells how \
         far it is",
        request.vm
    );
    Ok(Json(Done { done }))
}

async fn unprotect(
    State((_, _, neighbours)): State<Shared>,
    Json(request): Json<VmRequest>,
) -> Result<Json<Done>, ApiError> {
    let neighbour = find(&neighbours, &request.vm)?;
    neighbour.set_aside(false);
    neighbour.leave();
    until_aside(&neighbour).await?;
    let done = format!(
        "{}: no longer protected; nothing is left in its QEMU. Take it out of agent.toml, or the next start of the agent \
         protects it again",
        request.vm
    );
    Ok(Json(Done { done }))
}

fn find(neighbours: &Neighbours, vm: &str) -> Result<Arc<Neighbour>, ApiError> {
    neighbours.find(vm).ok_or_else(|| {
        let known = neighbours.names().join(", ");
        ApiError::not_found("unknown-vm", format!("no VM `{}` is protected here", vm.escape_debug()))
            .with_hint(format!("protected here: {known}"))
    })
}

fn remembered(saved: std::io::Result<()>) -> Result<(), ApiError> {
    saved.map_err(|error| ApiError::internal(format!("the wish could not be remembered: {error}")))
}

/// Waits until the protection holds nothing any more.
async fn until_aside(neighbour: &Neighbour) -> Result<(), ApiError> {
    let mut state = neighbour.watch();
    let aside = tokio::time::timeout(ASIDE_WITHIN, state.wait_for(|state| state.aside)).await;
    match aside {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => {
            let message =
                format!("the protection is not out of the way after {} s yet", ASIDE_WITHIN.as_secs());
            Err(ApiError::conflict("not-yet", message)
                .with_hint("it still goes there: look at `lifeboat-agent status`"))
        }
    }
}

/// A step of a cut that is under way is finished first.
const ASIDE_WITHIN: Duration = Duration::from_secs(60);
const YIELD_MAX_MS: u64 = 30 * 86_400_000;
const BY_MAX: usize = 64;

/// The status as text for people.
pub fn show(status: &AgentStatus) -> String {
    let mut out = format!("Link: {}\n", status.link);
    for vm in &status.vms {
        let rpo = vm.rpo_ms.map_or_else(
            || "no durable point yet".to_owned(),
            |ms| format!("RPO {}.{} s", ms / 1000, ms % 1000 / 100),
        );
        out += &format!("{}: {}, {rpo}, every {}\n", vm.name, vm.state.as_str(), Seconds(vm.interval_ms));
        if let Some(reason) = vm.why() {
            out += &format!("  why: {reason}\n");
        }
        let copy = vm.fence.as_ref().and_then(|fence| fence.what.as_ref());
        if let Some(what) = copy.filter(|what| vm.reason.as_ref() != Some(*what)) {
            out += &format!("  this copy: {what}\n");
        }
        if let Some(memory) = &vm.memory {
            out += &format!("  memory: {memory}\n");
        }
        if let Some(kept) = &vm.consistency {
            out += &format!("  consistency: {}\n", kept.words);
        }
        if let Some(change) = vm.memory_engine.as_ref().and_then(|memory| memory.last_change.as_ref()) {
            let name = |engine: &Option<String>| engine.clone().unwrap_or_else(|| "disks only".into());
            let (at, from, to) = (change.at, name(&change.from), name(&change.to));
            out += &format!("  memory engine changed: {at}, from {from} to {to}: {}\n", change.why);
        }
        if let Some(pause_us) = vm.last_pause_us {
            out += &format!("  last pause: {:.1} ms\n", pause_us as f64 / 1e3);
        }
        if let Some(durable) = &vm.durable {
            out += &format!(
                "  newest durable point: {} of {}\n",
                durable.point.short(),
                UnixMs(durable.cut_at.0)
            );
        }
    }
    out
}

struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:01} s", self.0 / 1000, self.0 % 1000 / 100)
    }
}
