//! One protected VM: cuts a point when it is due, ships it, and settles it on the site's word, or puts it back. The next
//! point may be cut while the last one travels ([`under_way`]).
//! Promises I-1: `settle` is called only after `Outcome::Durable`; a cut that is not sent whole is put back, and what was
//! sent and is lost is not named to the source again. Never cuts while
//! the link is down, so that no view is held open for nobody. Called by the daemon (over QEMU and QUIC) and by the
//! simulation (over a model guest and a lossy link).

mod comparing;
mod telling;
mod under_way;
mod whereabouts;

use crate::{
    capture::source::{CaptureError, Cut, Source},
    protect::{
        gauge::Gauge,
        link::{LinkEvent, LinkGone, Outbox, Shipment},
        neighbour::{self, Neighbour},
        pace::Stage,
        resync::Resync,
        status::{Board, VmStatus},
    },
    ship::{
        base_cache::BaseCache,
        budget::{Budget, Lanes},
        delta::{Deltas, Load},
        seal::{SealError, Sealer},
    },
};
use lifeboat::{
    clock::Clock,
    format::manifest::PointMeta,
    id::{PointId, VmId},
    page::PageGroup,
    session::sender::{Action, Outcome, Sender},
    units::{Compression, Generation},
    wire::message::{Refusal, SiteMessage, VmState},
};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use under_way::Sent;
use whereabouts::Whereabouts;

/// What the operator asked for, and what the daemon gives to all its VMs alike.
#[derive(Clone, Debug)]
pub struct Settings {
    pub interval: Duration,
    pub compression: Compression,
    /// Groups compressed at once, and bytes on their way: shared by all VMs.
    pub lanes: Lanes,
    pub budget: Budget,
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
    /// Says when to keep aside.
    pub neighbour: Arc<Neighbour>,
    /// Shared by all VMs.
    pub bases: Arc<BaseCache>,
    pub stop: watch::Receiver<bool>,
}

/// Why a point did not become durable.
#[derive(Debug, thiserror::Error)]
enum Setback {
    #[error("the agent is stopping")]
    Stopping,
    #[error("{0}")]
    Aside(String),
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
        let Settings { interval, compression, budget, .. } = &self.settings;
        let gauge = Gauge::new(*interval, *compression, budget);
        let wishes = self.neighbour.watch();
        let deltas = Deltas::new(self.bases.clone());
        let actor = Actor {
            given: self,
            sender,
            deltas,
            outbox: None,
            under_way: VecDeque::new(),
            unsettled: Vec::new(),
            outcomes: VecDeque::new(),
            down_since,
            status,
            wishes,
            failures: 0,
            gauge,
            resync: None,
            place: Whereabouts::default(),
        };
        actor.run().await;
    }
}

struct Actor<S> {
    given: Protection<S>,
    sender: Sender,
    deltas: Deltas,
    outbox: Option<Outbox>,
    /// Points that were sent and are not durable yet, oldest first.
    under_way: VecDeque<Sent>,
    /// Points that are durable, which the source is still to be told.
    unsettled: Vec<PointId>,
    /// How points ended, until somebody looks.
    outcomes: VecDeque<Outcome>,
    down_since: Option<Instant>,
    status: VmStatus,
    wishes: watch::Receiver<neighbour::State>,
    /// Points in a row that did not make it.
    failures: u32,
    gauge: Gauge,
    /// The open point, while it is compared with the site's newest one.
    resync: Option<Resync>,
    place: Whereabouts,
}

impl<S: Source> Actor<S> {
    async fn run(mut self) {
        self.publish().await;
        let mut due = Instant::now();
        loop {
            let over = match self.until_due(due).await {
                Ok(over) => over,
                Err(Setback::Stopping) => break,
                Err(setback) => {
                    self.give_up(&setback, None).await;
                    due = self.set_back(setback).await;
                    continue;
                }
            };
            let started = Instant::now();
            due = match self.point(over).await {
                Ok(()) => started + self.given.settings.interval,
                Err(Setback::Stopping) => break,
                Err(setback) => self.set_back(setback).await,
            };
        }
        tracing::info!(vm = %self.given.name, "protection stopped");
    }

    /// Waits until the next point is due and may be cut; returns what it builds on.
    async fn until_due(&mut self, due: Instant) -> Result<Vec<PointId>, Setback> {
        loop {
            self.keep_aside().await?;
            self.forget_if_asked().await?;
            self.outcome()?;
            self.settle().await;
            let is_due = Instant::now() >= due;
            if is_due && self.may_begin().is_some() {
                if !self.is_granted().await? {
                    continue;
                }
                if let Some(over) = self.may_begin() {
                    return Ok(over);
                }
            }
            let waits = is_due && !self.under_way.is_empty();
            self.gauge.enter(if waits { self.waits_for() } else { Stage::Rest });
            self.step((!is_due).then_some(due)).await?;
        }
    }

    /// Keeps aside for as long as somebody wishes it, holding nothing of the guest's.
    async fn keep_aside(&mut self) -> Result<(), Setback> {
        let mut kept = false;
        self.tell_departure().await;
        while let Some(why) = self.given.neighbour.why() {
            if self.sender.open_point().is_some() {
                return Err(Setback::Aside(why));
            }
            let wishes = self.given.neighbour.state();
            if wishes.leave
                && !wishes.aside
                && let Err(error) = self.given.source.leave().await
            {
                self.set_state(
                    VmState::Yielding,
                    Some(format!("{why}; not everything is undone yet: {error}")),
                )
                .await;
                self.step(Some(Instant::now() + LEAVE_AGAIN)).await?;
                continue;
            }
            self.given.neighbour.set_aside(true);
            kept = true;
            if self.status.state != VmState::Yielding || self.status.reason.as_ref() != Some(&why) {
                tracing::info!(vm = %self.given.name, %why, "keeping aside");
                self.set_state(VmState::Yielding, Some(why)).await;
            }
            self.step(None).await?;
            self.tell_departure().await;
        }
        if kept {
            self.given.neighbour.set_aside(false);
            let state = match (&self.outbox, self.status.durable) {
                (None, _) => VmState::Connecting,
                (Some(_), None) => VmState::Seeding,
                (Some(_), Some(_)) => VmState::Protected,
            };
            self.set_state(state, None).await;
        }
        Ok(())
    }

    /// Cuts one point and sends it.
    async fn point(&mut self, over: Vec<PointId>) -> Result<(), Setback> {
        let point = (self.given.new_point)();
        let basis = over.last().copied();
        self.gauge.begin(basis.is_some());
        self.gauge.enter(Stage::Capture);
        let mut cut = match self.given.source.begin(point, &over).await {
            Ok(cut) => cut,
            Err(error) => {
                let setback = error.into();
                self.give_up(&setback, None).await;
                return Err(setback);
            }
        };
        self.status.set_memory(self.given.source.memory());
        if basis.is_none() {
            self.set_state(VmState::Seeding, None).await;
        }
        let carried = self.carry(point, cut.as_mut(), basis).await;
        self.resync = None;
        let setback = match carried {
            // From here on the next point may be begun over it, and nothing of it is forgotten.
            Ok(meta) => match cut.sent().await {
                Ok(()) => {
                    self.sent(point, meta).await;
                    return Ok(());
                }
                Err(error) => error.into(),
            },
            Err(setback) => {
                self.give_up(&setback, Some(point)).await;
                if let Err(error) = cut.put_back().await {
                    // Still owed: the source starts from what the site holds at the next `begin`, or in full.
                    tracing::warn!(vm = %self.given.name, %error, "putting a lost point back did not go cleanly");
                }
                return Err(setback);
            }
        };
        self.give_up(&setback, Some(point)).await;
        Err(setback)
    }

    /// Carries a cut to the site, up to its last frame.
    async fn carry(
        &mut self,
        point: PointId,
        cut: &mut dyn Cut,
        basis: Option<PointId>,
    ) -> Result<PointMeta, Setback> {
        self.make_way(basis, &cut.images()).await?;
        let reads_deltas = self.outbox.as_ref().is_some_and(|outbox| outbox.reads_deltas);
        self.deltas.begin(point, basis, reads_deltas);
        self.deltas.images(&cut.images());
        let actions = self.sender.begin(point, basis);
        self.perform(actions).await;
        self.prepare_comparison(basis, &cut.images()).await?;
        let mut sealer = Sealer::new(self.gauge.level(), self.given.settings.lanes.clone());
        while let Some(group) = cut.before().await? {
            self.take(&mut sealer, group).await?;
        }
        self.close_comparison(&mut sealer).await?;
        self.flush(&mut sealer).await?;
        self.gauge.cut();
        let mut meta = cut.barrier().await?;
        self.status.last_pause_us = Some(meta.stats.pause_us);
        self.deltas.all_images(&meta.images);
        while let Some(group) = cut.after().await? {
            self.take(&mut sealer, group).await?;
        }
        (meta.stats.memory_changed_bytes, meta.stats.disk_changed_bytes) = cut.changed();
        self.finish_comparison(&mut sealer, &mut meta).await?;
        self.flush(&mut sealer).await?;
        Ok(meta)
    }

    async fn ship(&mut self, sealer: &mut Sealer, group: PageGroup) -> Result<(), Setback> {
        self.deltas.put(group);
        while let Some(load) = self.deltas.ready() {
            self.seal(sealer, load).await?;
        }
        Ok(())
    }

    async fn seal(&mut self, sealer: &mut Sealer, load: Load) -> Result<(), Setback> {
        while sealer.is_full() {
            self.ship_next(sealer).await?;
        }
        let level = self.gauge.level();
        self.status.zstd_level = level;
        sealer.set_level(level);
        sealer.put(load)?;
        self.gauge.enter(Stage::Capture);
        Ok(())
    }

    async fn flush(&mut self, sealer: &mut Sealer) -> Result<(), Setback> {
        while let Some(load) = self.deltas.finish_next() {
            self.seal(sealer, load).await?;
        }
        while self.ship_next(sealer).await? {}
        self.gauge.enter(Stage::Capture);
        Ok(())
    }

    /// Hands the next sealed frame to the sender, once there is room; `false` when none is in work.
    async fn ship_next(&mut self, sealer: &mut Sealer) -> Result<bool, Setback> {
        self.gauge.enter(Stage::Pack);
        let Some(frame) = sealer.take().await? else { return Ok(false) };
        self.gauge.enter(Stage::Link);
        self.drain_events().await?;
        while !self.sender.has_room(self.gauge.may_hold()) || self.lane_is_full() {
            self.outcome()?;
            self.step(None).await?;
        }
        self.outcome()?;
        self.gauge.shipped(frame.encoded_len());
        let actions = self.sender.push(frame);
        self.gauge.holds(self.sender.held_bytes());
        self.perform(actions).await;
        Ok(true)
    }

    /// Whether the link would make us wait for a frame to leave: nothing else could be heard meanwhile.
    fn lane_is_full(&self) -> bool {
        self.outbox.as_ref().is_some_and(|outbox| outbox.frames.capacity() == 0 && !outbox.frames.is_closed())
    }

    /// Waits for one event of the link, for `until`, or for the order to stop.
    async fn step(&mut self, until: Option<Instant>) -> Result<(), Setback> {
        let patience = self.given.settings.patience;
        let out_of_patience = match (self.down_since, self.sender.open_point()) {
            (Some(since), Some(_)) => Some(since + patience),
            _ => None,
        };
        let show = self.gauge.look_again();
        let wake = [until, out_of_patience, show].into_iter().flatten().min();
        // Arms receive and name; what follows decides.
        let lane = self.outbox.as_ref().filter(|_| self.lane_is_full()).map(|outbox| &outbox.frames);
        let woken = tokio::select! {
            event = self.given.link.recv() => event.map_or(Woken::Stop, Woken::Event),
            () = sleep_until(wake) => Woken::Time,
            () = room_in(lane) => Woken::Time,
            _ = self.given.stop.wait_for(|stop| *stop) => Woken::Stop,
            changed = self.wishes.changed() => changed.map_or(Woken::Stop, |()| Woken::Wish),
        };
        match woken {
            Woken::Event(event) => self.on_event(event).await,
            Woken::Time if out_of_patience.is_some_and(|at| Instant::now() >= at) => {
                return Err(Setback::LinkDown(patience));
            }
            Woken::Time if show.is_some_and(|at| Instant::now() >= at) => self.show_pace().await,
            Woken::Time => {}
            Woken::Wish => self.check_wishes()?,
            Woken::Stop => return Err(Setback::Stopping),
        }
        Ok(())
    }

    /// Handles what has already arrived, without waiting.
    async fn drain_events(&mut self) -> Result<(), Setback> {
        while let Ok(event) = self.given.link.try_recv() {
            self.on_event(event).await;
        }
        self.check_wishes()?;
        if *self.given.stop.borrow() { Err(Setback::Stopping) } else { Ok(()) }
    }

    /// Points under way are given up as soon as somebody wishes us out of the way.
    fn check_wishes(&self) -> Result<(), Setback> {
        match (self.sender.open_point(), self.given.neighbour.why()) {
            (Some(_), Some(why)) => Err(Setback::Aside(why)),
            _ => Ok(()),
        }
    }

    async fn on_event(&mut self, event: LinkEvent) {
        let actions = match event {
            LinkEvent::Up { outbox, window, .. } => {
                let reads = outbox.reads_deltas || !self.deltas.in_use();
                let overlaps = outbox.overlaps || self.sender.points().len() <= 1;
                if let (Some(point), false) = (self.sender.open_point(), reads && overlaps) {
                    let detail = "the site is of an older release now, which does not read what is under way";
                    let why = Refusal::Invalid { detail: detail.into() };
                    self.outcomes.push_back(Outcome::Lost { point, why });
                }
                self.outbox = Some(outbox);
                self.down_since = None;
                self.sender.link_up(window)
            }
            LinkEvent::Down { why } => {
                self.outbox = None;
                self.down_since.get_or_insert_with(Instant::now);
                self.sender.link_down();
                self.gauge.link_down();
                self.place.link_down();
                self.status.pace = None;
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
        self.gauge.holds(self.sender.held_bytes());
        self.note_arrivals().await;
        self.note_standing().await;
        self.ask().await;
    }

    async fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            let sent = match (action, &self.outbox) {
                (Action::Ended(outcome), _) => {
                    self.outcomes.push_back(outcome);
                    Ok(())
                }
                (Action::Tell(message), Some(outbox)) => outbox.tell(message).await,
                (Action::Ship { point, frame }, Some(outbox)) => tokio::select! {
                    sent = outbox.ship(Shipment { vm: self.given.vm, point, frame }) => sent,
                    // A slow link must not keep the agent from stopping.
                    _ = self.given.stop.wait_for(|stop| *stop) => Err(LinkGone),
                },
                // No link: the sender says it again when there is one.
                (Action::Tell(_) | Action::Ship { .. }, None) => Ok(()),
            };
            if sent.is_err() {
                // `LinkEvent::Down` is on its way and will have everything unacknowledged sent again.
                self.outbox = None;
            }
        }
    }
}

/// How long after a failure leaving a guest is tried again.
const LEAVE_AGAIN: Duration = Duration::from_secs(2);

enum Woken {
    Event(LinkEvent),
    Time,
    Wish,
    Stop,
}

/// Waits until a lane has room or its link is gone; for ever without one.
async fn room_in(lane: Option<&mpsc::Sender<Shipment>>) {
    match lane {
        Some(lane) => drop(lane.reserve().await),
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
