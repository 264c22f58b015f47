//! The actor's part about waiting: whatever it waits for, it hears the link, the order to stop, and who wishes it aside.
//! Promises that what the session asks for is done in its order, and that a link that is gone is noticed, not waited for.

use super::{Actor, Setback};
use crate::{
    capture::source::Source,
    protect::{
        link::{LinkEvent, LinkGone, Shipment},
        resync::Resync,
    },
};
use lifeboat::{
    session::sender::{Action, Outcome},
    wire::message::{Refusal, SiteMessage, VmState},
};
use tokio::{sync::mpsc, time::Instant};

impl<S: Source> Actor<S> {
    /// Waits for one event of the link, for `until`, or for the order to stop.
    pub(super) async fn step(&mut self, until: Option<Instant>) -> Result<(), Setback> {
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
    pub(super) async fn drain_events(&mut self) -> Result<(), Setback> {
        while let Ok(event) = self.given.link.try_recv() {
            self.on_event(event).await;
        }
        self.check_wishes()?;
        if *self.given.stop.borrow() { Err(Setback::Stopping) } else { Ok(()) }
    }

    pub(super) async fn on_event(&mut self, event: LinkEvent) {
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
                self.cut_link_down();
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
            LinkEvent::Message(SiteMessage::Cut { cut, order, .. }) => {
                self.on_order(cut, order).await;
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

    pub(super) async fn perform(&mut self, actions: Vec<Action>) {
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
