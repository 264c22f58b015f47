//! The actor's part of telling: status for people, reports for the site, the remembered generation.
//! Promises: a state and its reason change together; what did not make it says when it is tried again.

use super::{Actor, Setback, whereabouts::ask_again};
use crate::{
    capture::source::{CaptureError, Source},
    protect::{neighbour::SiteWord, status::DurablePoint},
};
use lifeboat::{
    format::manifest::PointMeta,
    id::PointId,
    session::sender::{Action, Standing},
    units::UnixMs,
    wire::message::{AgentMessage, Refusal, VmState},
};
use std::time::Duration;
use tokio::time::Instant;

impl<S: Source> Actor<S> {
    /// A point is late: says so before it is there.
    pub(super) async fn show_pace(&mut self) {
        self.status.pace = self.gauge.verdict();
        self.publish().await;
    }

    /// Keeps status and the remembered generation in step with what the site says.
    pub(super) async fn note_standing(&mut self) {
        match self.sender.standing() {
            Standing::Open { generation, .. } => self.given.neighbour.heard(SiteWord::Open(*generation)),
            Standing::Refused(Refusal::Fenced { current }) => {
                self.given.neighbour.heard(SiteWord::Fenced(*current));
            }
            Standing::Refused(_) => self.given.neighbour.heard(SiteWord::Refused),
            // Asked again on a link that is up: what it said before holds until it answers.
            Standing::Unknown if self.outbox.is_some() => {}
            Standing::Unknown => self.given.neighbour.heard(SiteWord::Silent),
        }
        match self.sender.standing().clone() {
            Standing::Unknown => {}
            Standing::Refused(refusal) => {
                let state =
                    if let Refusal::Fenced { .. } = refusal { VmState::Fenced } else { VmState::Refused };
                self.set_state(state, Some(refusal.to_string())).await;
            }
            Standing::Open { generation, latest } => {
                if self.given.generation != Some(generation) {
                    self.given.generation = Some(generation);
                    (self.given.on_generation)(self.given.vm, generation);
                }
                self.status.durable = latest.map(|latest| DurablePoint {
                    point: latest.point,
                    seq: Some(latest.seq),
                    cut_at: latest.cut_at,
                    committed_at: latest.committed_at,
                });
                let waiting = self.status.reason.as_deref().is_some_and(|why| why.starts_with("no link"));
                if waiting || self.status.state == VmState::Connecting {
                    let state = if latest.is_some() { VmState::Protected } else { VmState::Seeding };
                    self.set_state(state, None).await;
                }
            }
        }
    }

    pub(super) async fn succeeded(&mut self, point: PointId, meta: &PointMeta, committed_at: UnixMs) {
        self.failures = 0;
        self.status.points_durable += 1;
        self.status.under_way = self.under_way.len();
        self.gauge.durable();
        self.status.pace = self.gauge.verdict();
        let latency_ms = self.given.clock.now().0.saturating_sub(meta.cut_at.0);
        tracing::info!(
            vm = %self.given.name, %point, latency_ms, pause_us = meta.stats.pause_us,
            memory_bytes = meta.stats.memory_changed_bytes, disk_bytes = meta.stats.disk_changed_bytes,
            committed_at = committed_at.0, "point is durable"
        );
        let why = self.why_well();
        self.set_state(VmState::Protected, why).await;
    }

    /// Notes a point that did not make it, and returns when to try again.
    pub(super) async fn set_back(&mut self, setback: Setback) -> Instant {
        let others = matches!(&setback, Setback::Refused(_));
        let setback = self.note_others(setback);
        self.status.under_way = self.under_way.len();
        let state = match &setback {
            Setback::Capture(CaptureError::Unsupported(_)) => VmState::Refused,
            Setback::Capture(CaptureError::NotRunning(_)) => VmState::NotRunning,
            Setback::Aside(_) => self.given.neighbour.state().aside_state(),
            Setback::Capture(CaptureError::Busy(_)) => VmState::Yielding,
            Setback::Refused(Refusal::Fenced { .. }) => VmState::Fenced,
            Setback::Refused(Refusal::HeldElsewhere { .. }) => VmState::Refused,
            Setback::Stopping | Setback::Capture(CaptureError::Failed(_)) | Setback::Seal(_) => {
                VmState::Degraded
            }
            Setback::Refused(_) | Setback::LinkDown(_) | Setback::CalledOff | Setback::Hold(_) => {
                VmState::Degraded
            }
        };
        let (mut state, mut reason) = (state, setback.to_string());
        if state == VmState::NotRunning {
            self.at_rest.maybe = true;
            self.place.absent();
            if self.place.left || self.given.neighbour.state().away {
                state = VmState::Moved;
                reason = format!("it was migrated to another host, whose agent is to protect it ({reason})");
            }
        }
        if self.status.state != state || self.status.reason.as_deref() != Some(reason.as_str()) {
            tracing::warn!(vm = %self.given.name, state = state.as_str(), %reason, "no point was made");
        }
        self.set_state(state, Some(reason)).await;
        // Where no point was begun the site has nothing to say; a guest that does not run here may well run elsewhere, and
        // be its agent's there to ask about.
        let absent = matches!(setback, Setback::Capture(CaptureError::NotRunning(_) | CaptureError::Busy(_)));
        if (!absent || others) && self.sender.open_point().is_none() {
            let actions = self.sender.refresh();
            self.perform(actions).await;
        }
        let base = self.given.settings.interval.max(Duration::from_millis(200));
        let held = if let Setback::Refused(refusal) = &setback { Some(refusal.clone()) } else { None };
        let wait = match setback {
            // What the delta was made over has changed: the answer to `refresh` says what to start from.
            Setback::Refused(Refusal::WrongParent { .. } | Refusal::UnknownPoint) if self.failures < 3 => {
                Duration::ZERO
            }
            Setback::Capture(CaptureError::NotRunning(_) | CaptureError::Busy(_)) => {
                return Instant::now() + base;
            }
            Setback::Aside(_) => return Instant::now(),
            _ => (base * 2u32.pow(self.failures.min(5))).min(Duration::from_secs(60)),
        };
        let wait = match &held {
            Some(refusal) => ask_again(refusal, wait),
            None => wait,
        };
        self.failures = self.failures.saturating_add(1);
        Instant::now() + wait
    }

    pub(super) async fn set_state(&mut self, state: VmState, reason: Option<String>) {
        self.status.state = state;
        self.status.reason = reason;
        self.publish().await;
    }

    pub(super) async fn publish(&mut self) {
        self.given.board.put(self.status.clone());
        let mut report = self.status.report();
        if self.outbox.as_ref().is_some_and(|outbox| !outbox.places) {
            report.state = report.state.before_version_4();
        }
        let report = AgentMessage::Report { vm: self.given.vm, report };
        self.perform(vec![Action::Tell(report)]).await;
    }
}
