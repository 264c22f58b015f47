//! One protected VM: cuts a point when it is due, ships it, and settles it on the site's word, or puts it back.
//! Promises I-1: `settle` is called only after `Outcome::Durable`; every other ending calls `put_back`. Never cuts while
//! the link is down, so that no view is held open for nobody. Called by the daemon (over QEMU and QUIC) and by the
//! simulation (over a model guest and a lossy link).

mod comparing;

use crate::{
    capture::source::{CaptureError, Cut, Source},
    protect::{
        link::{LinkEvent, Outbox, Shipment},
        resync::Resync,
        status::{Board, DurablePoint, VmStatus},
    },
    ship::seal::{SealError, Sealer},
};
use lifeboat::{
    clock::Clock,
    fault,
    format::manifest::PointMeta,
    id::{PointId, VmId},
    page::PageGroup,
    session::sender::{Action, Outcome, Sender, Standing},
    units::{Generation, UnixMs},
    wire::message::{AgentMessage, Refusal, SiteMessage, VmState},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// What the operator asked for, and what the daemon gives to all its VMs alike.
#[derive(Clone, Debug)]
pub struct Settings {
    pub interval: Duration,
    pub zstd_level: i32,
    /// Groups compressed at once; 0 compresses in place.
    pub seal_lanes: usize,
    /// A point whose link has been down for so long is put back, so that its views do not grow for ever.
    pub patience: Duration,
}

/// Everything that an actor is given.
pub struct Protection<S> {
    pub vm: VmId,
    pub name: String,
    pub source: S,
    pub settings: Settings,
    pub generation: Option<Generation>,
    pub link: mpsc::Receiver<LinkEvent>,
    pub clock: Arc<dyn Clock>,
    pub new_point: Box<dyn FnMut() -> PointId + Send>,
    /// Told each time the site names a generation, to be remembered across restarts.
    pub on_generation: Box<dyn FnMut(VmId, Generation) + Send>,
    pub board: Board,
    pub stop: watch::Receiver<bool>,
}

/// Why a point did not become durable.
#[derive(Debug, thiserror::Error)]
enum Setback {
    #[error("the agent is stopping")]
    Stopping,
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("the link to the site has been down for {0:?}; the point was put back")]
    LinkDown(Duration),
}

impl<S: Source> Protection<S> {
    /// Protects until told to stop.
    pub async fn run(self) {
        let status = VmStatus::new(self.vm, self.name.clone(), self.settings.interval.as_millis() as u64);
        let sender = Sender::new(self.vm, self.name.clone(), self.generation);
        let down_since = Some(Instant::now());
        let actor = Actor {
            given: self,
            sender,
            outbox: None,
            ended: None,
            down_since,
            status,
            failures: 0,
            resync: None,
        };
        actor.run().await;
    }
}

struct Actor<S> {
    given: Protection<S>,
    sender: Sender,
    outbox: Option<Outbox>,
    /// How the open point ended, until somebody looks.
    ended: Option<Outcome>,
    down_since: Option<Instant>,
    status: VmStatus,
    /// Points in a row that did not make it.
    failures: u32,
    /// The open point, while it is compared with the site's newest one.
    resync: Option<Resync>,
}

impl<S: Source> Actor<S> {
    async fn run(mut self) {
        self.publish().await;
        let mut due = Instant::now();
        while let Ok(basis) = self.until_due(due).await {
            let started = Instant::now();
            due = match self.point(basis).await {
                Ok(()) => started + self.given.settings.interval,
                Err(Setback::Stopping) => break,
                Err(setback) => self.set_back(setback).await,
            };
        }
        tracing::info!(vm = %self.given.name, "protection stopped");
    }

    /// Waits until the next point is due and the site is ready for it; returns the newest point that the site holds.
    async fn until_due(&mut self, due: Instant) -> Result<Option<PointId>, Setback> {
        loop {
            let open = match self.sender.standing() {
                Standing::Open { latest, .. } => Some(latest.map(|latest| latest.point)),
                Standing::Unknown | Standing::Refused(_) => None,
            };
            if let (Some(basis), true) = (open, Instant::now() >= due) {
                return Ok(basis);
            }
            // Without a standing there is nothing to wait for but the link.
            let until = open.map(|_| due);
            self.step(until).await?;
        }
    }

    /// Cuts one point and sees it through.
    async fn point(&mut self, basis: Option<PointId>) -> Result<(), Setback> {
        let point = (self.given.new_point)();
        self.ended = None;
        let mut cut = self.given.source.begin(point, basis).await?;
        self.status.set_memory(self.given.source.memory());
        if basis.is_none() {
            self.set_state(VmState::Seeding, None).await;
        }
        let actions = self.sender.begin(point, basis);
        self.perform(actions).await;
        let carried = self.carry(cut.as_mut(), basis).await;
        self.resync = None;
        match carried {
            Ok((meta, committed_at)) => {
                fault::point("cut.before-settle");
                cut.settle().await?;
                self.succeeded(point, &meta, committed_at).await;
                Ok(())
            }
            Err(setback) => {
                let actions = self.sender.abort();
                self.perform(actions).await;
                if let Err(error) = cut.put_back().await {
                    // Still owed: the source starts from what the site holds at the next `begin`, or in full.
                    tracing::warn!(vm = %self.given.name, %error, "putting a lost point back did not go cleanly");
                }
                Err(setback)
            }
        }
    }

    /// Carries a cut to the site, up to its acknowledgement.
    async fn carry(
        &mut self,
        cut: &mut dyn Cut,
        basis: Option<PointId>,
    ) -> Result<(PointMeta, UnixMs), Setback> {
        self.prepare_comparison(basis, &cut.images()).await?;
        let mut sealer = Sealer::new(self.given.settings.zstd_level, self.given.settings.seal_lanes);
        while let Some(group) = cut.before().await? {
            self.take(&mut sealer, group).await?;
        }
        self.close_comparison(&mut sealer).await?;
        self.flush(&mut sealer).await?;
        let mut meta = cut.barrier().await?;
        self.status.last_pause_us = Some(meta.stats.pause_us);
        while let Some(group) = cut.after().await? {
            self.take(&mut sealer, group).await?;
        }
        (meta.stats.memory_changed_bytes, meta.stats.disk_changed_bytes) = cut.changed();
        self.finish_comparison(&mut sealer, &mut meta).await?;
        self.flush(&mut sealer).await?;
        let actions = self.sender.end(meta.clone());
        self.perform(actions).await;
        loop {
            if let Some(Outcome::Durable { committed_at, .. }) = self.outcome()? {
                return Ok((meta, committed_at));
            }
            self.step(None).await?;
        }
    }

    async fn ship(&mut self, sealer: &mut Sealer, group: PageGroup) -> Result<(), Setback> {
        while sealer.is_full() {
            self.ship_next(sealer).await?;
        }
        sealer.put(group)?;
        Ok(())
    }

    async fn flush(&mut self, sealer: &mut Sealer) -> Result<(), Setback> {
        while self.ship_next(sealer).await? {}
        Ok(())
    }

    /// Hands the next sealed frame to the sender, once there is room; `false` when none is in work.
    async fn ship_next(&mut self, sealer: &mut Sealer) -> Result<bool, Setback> {
        let Some(frame) = sealer.take().await? else { return Ok(false) };
        self.drain_events().await?;
        while !self.sender.has_room() {
            self.outcome()?;
            self.step(None).await?;
        }
        self.outcome()?;
        let actions = self.sender.push(frame);
        self.perform(actions).await;
        Ok(true)
    }

    /// The end of the open point, if it has come; losing it is an error.
    fn outcome(&mut self) -> Result<Option<Outcome>, Setback> {
        match self.ended.take() {
            Some(Outcome::Lost { why, .. }) => Err(why.into()),
            other => Ok(other),
        }
    }

    /// Waits for one event of the link, for `until`, or for the order to stop.
    async fn step(&mut self, until: Option<Instant>) -> Result<(), Setback> {
        let patience = self.given.settings.patience;
        let out_of_patience = match (self.down_since, self.sender.open_point()) {
            (Some(since), Some(_)) => Some(since + patience),
            _ => None,
        };
        let wake = [until, out_of_patience].into_iter().flatten().min();
        // Arms receive and name; what follows decides.
        let woken = tokio::select! {
            event = self.given.link.recv() => event.map_or(Woken::Stop, Woken::Event),
            () = sleep_until(wake) => Woken::Time,
            _ = self.given.stop.wait_for(|stop| *stop) => Woken::Stop,
        };
        match woken {
            Woken::Event(event) => self.on_event(event).await,
            Woken::Time if out_of_patience.is_some_and(|at| Instant::now() >= at) => {
                return Err(Setback::LinkDown(patience));
            }
            Woken::Time => {}
            Woken::Stop => return Err(Setback::Stopping),
        }
        Ok(())
    }

    /// Handles what has already arrived, without waiting.
    async fn drain_events(&mut self) -> Result<(), Setback> {
        while let Ok(event) = self.given.link.try_recv() {
            self.on_event(event).await;
        }
        if *self.given.stop.borrow() { Err(Setback::Stopping) } else { Ok(()) }
    }

    async fn on_event(&mut self, event: LinkEvent) {
        let actions = match event {
            LinkEvent::Up { outbox, window, .. } => {
                self.outbox = Some(outbox);
                self.down_since = None;
                self.sender.link_up(window)
            }
            LinkEvent::Down { why } => {
                self.outbox = None;
                self.down_since.get_or_insert_with(Instant::now);
                self.sender.link_down();
                self.resync.iter_mut().for_each(Resync::link_down);
                let state =
                    if self.status.durable.is_some() { VmState::Degraded } else { VmState::Connecting };
                self.set_state(state, Some(format!("no link to the site: {why}"))).await;
                Vec::new()
            }
            LinkEvent::Message(SiteMessage::Compared { answer, .. }) => {
                self.resync.iter_mut().for_each(|resync| resync.on_answer(answer.clone()));
                Vec::new()
            }
            LinkEvent::Message(message) => self.sender.on_message(message),
        };
        self.perform(actions).await;
        self.note_standing().await;
        self.ask().await;
    }

    /// Keeps status and the remembered generation in step with what the site says.
    async fn note_standing(&mut self) {
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

    async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            let sent = match (action, &self.outbox) {
                (Action::Ended(outcome), _) => {
                    self.ended = Some(outcome);
                    Ok(())
                }
                (Action::Tell(message), Some(outbox)) => outbox.tell(message).await,
                (Action::Ship { point, frame }, Some(outbox)) => {
                    outbox.ship(Shipment { vm: self.given.vm, point, frame }).await
                }
                // No link: the sender says it again when there is one.
                (Action::Tell(_) | Action::Ship { .. }, None) => Ok(()),
            };
            if sent.is_err() {
                // `LinkEvent::Down` is on its way and will have everything unacknowledged sent again.
                self.outbox = None;
            }
        }
    }

    async fn succeeded(&mut self, point: PointId, meta: &PointMeta, committed_at: UnixMs) {
        self.failures = 0;
        self.status.points_durable += 1;
        let latency_ms = self.given.clock.now().0.saturating_sub(meta.cut_at.0);
        tracing::info!(
            vm = %self.given.name, %point, latency_ms, pause_us = meta.stats.pause_us,
            memory_bytes = meta.stats.memory_changed_bytes, disk_bytes = meta.stats.disk_changed_bytes,
            committed_at = committed_at.0, "point is durable"
        );
        self.set_state(VmState::Protected, None).await;
    }

    /// Notes a point that did not make it, and returns when to try again.
    async fn set_back(&mut self, setback: Setback) -> Instant {
        self.status.points_lost += 1;
        let state = match &setback {
            Setback::Capture(CaptureError::Unsupported(_)) => VmState::Refused,
            Setback::Capture(CaptureError::NotRunning(_)) => VmState::NotRunning,
            Setback::Refused(Refusal::Fenced { .. }) => VmState::Fenced,
            Setback::Stopping | Setback::Capture(CaptureError::Failed(_)) | Setback::Seal(_) => {
                VmState::Degraded
            }
            Setback::Refused(_) | Setback::LinkDown(_) => VmState::Degraded,
        };
        let reason = setback.to_string();
        if self.status.state != state || self.status.reason.as_deref() != Some(reason.as_str()) {
            tracing::warn!(vm = %self.given.name, state = state.as_str(), %reason, "no point was made");
        }
        self.set_state(state, Some(reason)).await;
        let actions = self.sender.refresh();
        self.perform(actions).await;
        let base = self.given.settings.interval.max(Duration::from_millis(200));
        let wait = match setback {
            // What the delta was made over has changed: the answer to `refresh` says what to start from.
            Setback::Refused(Refusal::WrongParent { .. } | Refusal::UnknownPoint) if self.failures < 3 => {
                Duration::ZERO
            }
            Setback::Capture(CaptureError::NotRunning(_)) => base,
            _ => (base * 2u32.pow(self.failures.min(5))).min(Duration::from_secs(60)),
        };
        self.failures = self.failures.saturating_add(1);
        Instant::now() + wait
    }

    async fn set_state(&mut self, state: VmState, reason: Option<String>) {
        self.status.state = state;
        self.status.reason = reason;
        self.publish().await;
    }

    async fn publish(&mut self) {
        self.given.board.put(self.status.clone());
        let report = AgentMessage::Report { vm: self.given.vm, report: self.status.report() };
        self.perform(vec![Action::Tell(report)]).await;
    }
}

enum Woken {
    Event(LinkEvent),
    Time,
    Stop,
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
