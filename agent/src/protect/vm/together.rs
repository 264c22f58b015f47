//! The actor's part in cuts of several VMs: it says when its guest is ready and when it stands, and is told when to go on.
//! Promises: whatever becomes of a cut, the site is told; a guest waits for the others within half of its longest pause, and
//! a point that was begun is cut, if not with the others then alone. The conversation stands in [`lifeboat::wire::order`].

use super::{Actor, Setback};
use crate::{
    capture::{
        meeting::Meeting,
        source::{Cut, Source},
    },
    protect::{neighbour::SiteWord, pace::Stage},
};
use lifeboat::{
    format::manifest::PointMeta,
    id::{CutId, PointId},
    session::sender::{Action, Standing},
    units::{Generation, UnixMs},
    wire::{
        message::{AgentMessage, VmState},
        order::{Assignment, CutKind, CutOrder, Part},
    },
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// A cut that the site has asked this VM to take part in.
pub(super) struct Taking {
    pub cut: CutId,
    pub kind: CutKind,
    /// Until when the site waits for `Ready`.
    until: Instant,
    /// The site has said that all are ready, and file systems are to be frozen.
    freeze: bool,
    /// The site has said when; the point of all members bears this.
    stop: Option<UnixMs>,
    /// The others are not waited for.
    alone: bool,
    /// All stand, or will: said before our guest does where there are no others.
    go: bool,
    /// While the guest stands.
    meeting: Option<Arc<Meeting>>,
    /// Of a final cut: the guest stands, and whether it ran before.
    pub(super) standing: Option<bool>,
}

impl Taking {
    fn new(cut: CutId, kind: CutKind, within_ms: u64) -> Self {
        let until = Instant::now() + Duration::from_millis(within_ms);
        let (freeze, stop, alone, go, meeting, standing) = Default::default();
        Self { cut, kind, until, freeze, stop, alone, go, meeting, standing }
    }

    /// The site has called it off, or goes on without us.
    pub(super) fn is_off(&self) -> bool {
        self.alone
    }
}

impl<S: Source> Actor<S> {
    /// An order of the site's about a cut.
    pub(super) async fn on_order(&mut self, cut: CutId, order: CutOrder) {
        if let CutOrder::Prepare { kind, within_ms } = order {
            // What is being cut is seen through first.
            if let Some(before) = self.asked.replace(Taking::new(cut, kind, within_ms)) {
                self.tell_part(before.cut, Part::Out { why: "another cut was asked for".into() }).await;
            }
            return;
        }
        if let CutOrder::Resume { .. } | CutOrder::ShutOff { .. } = order {
            // One that does not stand for good yet goes on, whatever was decided.
            if let Some(taking) = self.taking.as_mut().filter(|taking| taking.cut == cut) {
                taking.alone = true;
            }
            self.verdict = Some((cut, order));
            return;
        }
        let both = self.taking.iter_mut().chain(&mut self.asked);
        let Some(taking) = both.into_iter().find(|taking| taking.cut == cut) else { return };
        match order {
            CutOrder::Freeze => taking.freeze = true,
            CutOrder::Stop { at } => taking.stop = Some(at),
            CutOrder::Go { together } => {
                taking.alone |= !together;
                taking.go |= together;
                taking.meeting.iter().for_each(|meeting| meeting.go(together));
            }
            CutOrder::CallOff => {
                taking.alone = true;
                taking.meeting.iter().for_each(|meeting| meeting.go(false));
            }
            CutOrder::Prepare { .. } | CutOrder::Resume { .. } | CutOrder::ShutOff { .. } => {}
        }
    }

    /// Nothing more will be heard of a cut: its point is one of this VM alone, and a guest that stands goes on.
    pub(super) fn cut_link_down(&mut self) {
        self.asked = None;
        if let Some(taking) = &mut self.taking {
            taking.alone = true;
            taking.meeting.iter().for_each(|meeting| meeting.go(false));
        }
    }

    /// Whether the site says when points are cut.
    pub(super) fn is_led(&self) -> bool {
        let leads = |said: &Option<Assignment>| said.as_ref().is_some_and(|said| said.together);
        leads(&self.given.wish.borrow()) && self.outbox.as_ref().is_some_and(|outbox| outbox.orders)
    }

    /// Whether a point is due: by the site's word, or by the clock. A site that leads and falls silent is not waited for.
    pub(super) async fn is_due(&mut self, due: Instant) -> bool {
        let now = Instant::now();
        if let Standing::Refused(refusal) = self.sender.standing() {
            let why = refusal.to_string();
            self.decline(&why).await;
        }
        if self.taking.is_none() {
            self.taking = self.asked.take();
        }
        if let Some(taking) = self.taking.take_if(|taking| taking.until <= now || taking.alone) {
            self.tell_part(taking.cut, Part::Out { why: "no point could be begun in time".into() }).await;
        }
        self.taking.is_some() || (!self.is_paused() && now >= due + self.silence())
    }

    /// When to look again whether a point is due.
    pub(super) fn next_look(&self, due: Instant) -> Instant {
        match &self.taking {
            Some(taking) => taking.until,
            None if self.is_paused() => Instant::now() + LOOK_WHILE_PAUSED,
            None => due + self.silence(),
        }
    }

    fn is_paused(&self) -> bool {
        self.given.wish.borrow().as_ref().is_some_and(|said| said.paused)
    }

    /// How long a site that leads is waited for.
    fn silence(&self) -> Duration {
        if self.is_led() { self.given.settings.interval * SILENT_INTERVALS } else { Duration::ZERO }
    }

    /// Takes up what the group wishes.
    pub(super) async fn heed(&mut self) {
        // A link that comes and goes has states of its own; what the group wishes is shown again after it.
        let hidden = self.is_paused() && self.status.state != VmState::Yielding && self.outbox.is_some();
        if !hidden && !self.given.wish.has_changed().unwrap_or(false) {
            return;
        }
        let said = self.given.wish.borrow_and_update().clone();
        let interval =
            said.as_ref().map_or(self.own_interval, |said| Duration::from_millis(said.interval_ms));
        self.given.settings.interval = interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
        self.status.interval_ms = self.given.settings.interval.as_millis() as u64;
        self.status.group = said.as_ref().map(|said| said.group.clone());
        let own = self.given.settings.consistency;
        self.given.source.wish(said.as_ref().map_or(own, |said| said.consistency));
        match said.filter(|said| said.paused) {
            Some(said) => {
                let why = format!("group `{}` is paused at the site", said.group);
                self.set_state(VmState::Yielding, Some(why)).await;
            }
            None if self.status.state == VmState::Yielding => {
                let state =
                    if self.status.durable.is_some() { VmState::Protected } else { VmState::Connecting };
                self.set_state(state, None).await;
            }
            None => self.publish().await,
        }
    }

    /// At the barrier's door: says that all is done that can be while the guest runs, and waits for the others.
    async fn meet(&mut self, open: &mut dyn Cut) -> Result<Option<Arc<Meeting>>, Setback> {
        let Some(cut) = self.taking.as_ref().map(|taking| taking.cut) else { return Ok(None) };
        self.tell_part(cut, Part::Ready).await;
        loop {
            let Some(taking) = self.taking.as_mut().filter(|taking| taking.cut == cut) else {
                return Ok(None);
            };
            if taking.alone {
                return Ok(None);
            }
            if std::mem::take(&mut taking.freeze) {
                let last = taking.kind == CutKind::Final;
                self.hearing(if last { open.flush() } else { open.freeze() }).await;
                self.tell_part(cut, Part::Frozen).await;
                continue;
            }
            if let Some(at) = taking.stop {
                return if taking.kind == CutKind::Final {
                    self.stand(cut, at).await.map(|()| None)
                } else {
                    Ok(Some(self.open_meeting(cut, at)))
                };
            }
            if Instant::now() >= taking.until || self.outbox.is_none() {
                return Ok(None);
            }
            let until = taking.until;
            self.gauge.enter(Stage::Site);
            self.outcome()?;
            self.step(Some(until)).await?;
        }
    }

    fn open_meeting(&mut self, cut: CutId, at: UnixMs) -> Arc<Meeting> {
        let (vm, clock) = (self.given.vm, self.given.clock.clone());
        let control = self.outbox.as_ref().map(|outbox| outbox.control.clone());
        let stands = Box::new(move |ran| {
            let part = Part::Stopped { at: clock.now(), ran };
            // A full queue is a link that is as good as gone: the site goes on without us.
            let _ = control.map(|control| control.try_send(AgentMessage::Part { vm, cut, part }));
        });
        let meeting = Arc::new(Meeting::new(at, self.given.settings.max_pause / 2, stands));
        if let Some(taking) = &mut self.taking {
            if taking.go {
                meeting.go(true);
            }
            taking.meeting = Some(meeting.clone());
        }
        meeting
    }

    /// Cuts. The link is heard meanwhile, for it says when the guest goes on.
    pub(super) async fn at_the_barrier(&mut self, cut: &mut dyn Cut) -> Result<PointMeta, Setback> {
        let meeting = self.meet(cut).await?;
        if meeting.is_none() && self.taking.as_ref().is_none_or(|taking| taking.standing.is_none()) {
            self.hearing(cut.freeze()).await;
        }
        let mut meta = self.hearing(cut.barrier(meeting)).await?;
        self.status.consistency = self.given.source.consistency();
        if let Some(taking) = &self.taking {
            let met = taking.meeting.as_ref().is_some_and(|meeting| meeting.was_kept());
            meta.cut = (met || taking.standing.is_some()).then_some(taking.cut);
            if let (Some(ran), Some(at)) = (taking.standing, taking.stop) {
                meta.cut_at = at;
                // Of one that is off, its cut knows better.
                if !cut.is_off() {
                    meta.was_running = ran;
                }
            }
        }
        Ok(meta)
    }

    /// Waits for what is done with the guest, and hears the link meanwhile.
    async fn hearing<T>(&mut self, mut work: impl Future<Output = T> + Unpin) -> T {
        let mut linked = true;
        loop {
            tokio::select! {
                done = &mut work => return done,
                event = self.given.link.recv(), if linked => match event {
                    Some(event) => self.on_event(event).await,
                    None => linked = false,
                },
            }
        }
    }

    /// The point of this cut was sent, whole.
    pub(super) async fn has_cut(&mut self, point: PointId, pause_us: u64) {
        let Some(taking) = self.taking.as_mut() else { return };
        let together =
            taking.meeting.take().is_some_and(|meeting| meeting.was_kept()) || taking.standing.is_some();
        let cut = taking.cut;
        if taking.standing.is_none() {
            self.taking = None;
        }
        self.tell_part(cut, Part::Cut { point, together, pause_us }).await;
    }

    /// There is no point of this cut.
    pub(super) async fn has_not_cut(&mut self, setback: &Setback) {
        let Some(taking) = self.taking.take() else { return };
        if let Some(ran) = taking.standing {
            self.undo_stand(ran).await;
        }
        self.tell_part(taking.cut, Part::Out { why: setback.to_string() }).await;
    }

    /// The site gives this source another generation to write under.
    pub(super) async fn adopt(&mut self, generation: Generation) {
        if self.given.generation.is_some_and(|ours| ours > generation) {
            return;
        }
        self.given.generation = Some(generation);
        // The order says so itself; the fence must not wait for the answer to the next question.
        self.given.neighbour.heard(SiteWord::Open(generation));
        (self.given.on_generation)(self.given.vm, generation);
        self.sender.adopt(generation);
        let actions = self.sender.refresh();
        self.perform(actions).await;
    }

    /// The replicas run under this generation: this copy is fenced.
    pub(super) async fn give_away(&mut self, generation: Generation) {
        if self.given.generation.is_some_and(|ours| ours >= generation) {
            return;
        }
        self.sender.fence(generation);
        self.note_standing().await;
    }

    /// No point can be begun now: whoever has asked for one is told at once.
    pub(super) async fn decline(&mut self, why: &str) {
        for taking in [self.taking.take(), self.asked.take()].into_iter().flatten() {
            self.tell_part(taking.cut, Part::Out { why: why.to_owned() }).await;
        }
    }

    pub(super) async fn tell_part(&mut self, cut: CutId, part: Part) {
        if self.outbox.as_ref().is_some_and(|outbox| outbox.orders) {
            let message = AgentMessage::Part { vm: self.given.vm, cut, part };
            self.perform(vec![Action::Tell(message)]).await;
        }
    }
}

/// A site that leads and has said nothing for so many intervals is not waited for.
const SILENT_INTERVALS: u32 = 3;
const LOOK_WHILE_PAUSED: Duration = Duration::from_secs(1);
const INTERVAL_MIN: Duration = Duration::from_millis(200);
const INTERVAL_MAX: Duration = Duration::from_secs(86_400);
