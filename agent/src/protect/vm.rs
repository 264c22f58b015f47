//! One protected VM: cuts a point when it is due ([`one_point`]), ships it, and settles it on the site's word, or puts it
//! back. The next point may be cut while the last one travels ([`under_way`]). [`waiting`] hears the link, [`aside`] keeps
//! out of others' way, [`at_rest`] knows what a guest needs that is off.
//! Promises I-1: `settle` is called only after `Outcome::Durable`; a cut that is not sent whole is put back, and what was
//! sent and is lost is not named to the source again. Never cuts while the link is down, so that no view is held open for
//! nobody. Called by the daemon (over QEMU and QUIC) and by the simulation (over a model guest and a lossy link).

mod aside;
mod at_rest;
mod comparing;
mod hold;
mod one_point;
mod telling;
mod together;
mod under_way;
mod waiting;
mod whereabouts;

use crate::{
    capture::source::{CaptureError, Source},
    protect::{
        assignments::Said,
        gauge::Gauge,
        holds::Holds,
        link::{LinkEvent, Outbox},
        neighbour::{self, Neighbour},
        pace::Stage,
        resync::Resync,
        status::{Board, VmStatus},
    },
    ship::{
        base_cache::BaseCache,
        budget::{Budget, Lanes},
        delta::Deltas,
        seal::SealError,
    },
};
use at_rest::AtRest;
use lifeboat::{
    clock::Clock,
    id::{CutId, PointId, VmId},
    session::sender::{Outcome, Sender},
    units::{Compression, Generation},
    wire::{
        message::Refusal,
        order::{ConsistencyWish, CutOrder},
    },
};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use together::Taking;
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
    /// No pause lasts longer.
    pub max_pause: Duration,
    /// What points without memory are to be, where no group says.
    pub consistency: ConsistencyWish,
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
    /// What the site's groups say of the VM.
    pub wish: watch::Receiver<Said>,
    pub holds: Holds,
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
    #[error("the planned failover was called off")]
    CalledOff,
    #[error("the record of a hold: {0}")]
    Hold(std::io::Error),
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
        let own_interval = self.settings.interval;
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
            at_rest: AtRest::default(),
            taking: None,
            asked: None,
            verdict: None,
            own_interval,
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
    at_rest: AtRest,
    /// The cut of several VMs that the site has asked us into.
    taking: Option<Taking>,
    /// The next one, asked for while a point is being cut.
    asked: Option<Taking>,
    /// How the site ends a hold.
    verdict: Option<(CutId, CutOrder)>,
    /// The interval without a group's wish.
    own_interval: Duration,
}

impl<S: Source> Actor<S> {
    async fn run(mut self) {
        self.given.wish.mark_changed();
        self.heed().await;
        self.publish().await;
        // Points may be long in coming, where the site is away or somebody wants us aside.
        if let Err(error) = self.given.source.clear().await {
            tracing::warn!(vm = %self.given.name, %error, "what an agent before us may have left is taken away later");
        }
        while let Err(setback) = self.take_up_hold().await {
            if matches!(setback, Setback::Stopping) {
                return;
            }
            tracing::warn!(vm = %self.given.name, %setback, "what is held could not be taken up; trying again");
            if matches!(self.step(Some(Instant::now() + LOOK_AGAIN)).await, Err(Setback::Stopping)) {
                return;
            }
        }
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
    async fn until_due(&mut self, mut due: Instant) -> Result<Vec<PointId>, Setback> {
        loop {
            self.keep_aside().await?;
            self.forget_if_asked().await?;
            self.outcome()?;
            self.settle().await;
            self.heed().await;
            self.answer_late_verdict().await;
            let is_due = self.is_due(due).await;
            if is_due && let Some(over) = self.may_begin() {
                if self.rests(&over).await {
                    due = Instant::now() + self.given.settings.interval.max(LOOK_AGAIN);
                    continue;
                }
                if !self.is_granted().await? {
                    continue;
                }
                if let Some(over) = self.may_begin() {
                    return Ok(over);
                }
            }
            let waits = is_due && !self.under_way.is_empty();
            self.gauge.enter(if waits { self.waits_for() } else { Stage::Rest });
            let look = (!is_due || self.taking.is_some()).then(|| self.next_look(due));
            self.step(look).await?;
        }
    }
}

/// Between two tries at the start to find out what is held.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
