//! The agent's local API: `GET /v1/status`. Served by `daemon`, asked by `lifeboat-agent status`.

use crate::protect::status::{AgentStatus, Board};
use axum::{Json, Router, extract::State, routing::get};
use lifeboat::{clock::Clock, units::UnixMs};
use std::sync::Arc;

type Shared = (Board, Arc<dyn Clock>);

pub fn router(board: Board, clock: Arc<dyn Clock>) -> Router {
    Router::new().route("/v1/status", get(status)).with_state((board, clock))
}

async fn status(State((board, clock)): State<Shared>) -> Json<AgentStatus> {
    Json(board.read(clock.now()))
}

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
        if let Some(memory) = &vm.memory {
            out += &format!("  memory: {memory}\n");
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
