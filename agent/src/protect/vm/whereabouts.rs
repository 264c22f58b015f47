//! The actor's part about where the guest is: what the site is told of it, and whether our points of it are taken.
//! Promises: no point is begun before the site has granted the VM to this agent, where the site knows of such things; that
//! a guest has left is said before anything else of it.

use super::{Actor, Setback};
use crate::capture::source::Source;
use lifeboat::{
    session::sender::Standing,
    wire::message::{Place, Refusal},
};
use std::time::Duration;

/// What was said of the guest's whereabouts, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Whereabouts {
    /// The site takes our points.
    granted: bool,
    /// What it was told last, on this link.
    said: Option<Place>,
    /// Departures of the guest that were seen, and whether the last one is still to be told.
    departures: u64,
    owes: bool,
    /// The guest is on another host.
    pub left: bool,
}

impl Whereabouts {
    /// The link is gone, and with it what the site knew of us.
    pub fn link_down(&mut self) {
        (self.granted, self.said) = (false, None);
    }

    /// The guest was not found running.
    pub fn absent(&mut self) {
        self.granted = false;
    }
}

impl<S: Source> Actor<S> {
    /// Sees to it that the site takes our points; `false` if it had to be asked, or can't be: all may be different now.
    pub(super) async fn is_granted(&mut self) -> Result<bool, Setback> {
        self.tell_departure().await;
        if self.place.granted || !self.outbox.as_ref().is_some_and(|outbox| outbox.places) {
            return Ok(true);
        }
        // Where it can't be found out, beginning a point fails for the same reason, and says so.
        let Ok(Some(place)) = self.given.source.place().await else { return Ok(true) };
        if !matches!(place, Place::Here { .. }) {
            let left = place == Place::Left || self.given.neighbour.state().away;
            self.place.left |= left;
            self.say(if left { Place::Left } else { Place::NotHere }).await;
            return Ok(true);
        }
        self.place.left = false;
        self.place.said = Some(place);
        let actions = self.sender.place(place);
        self.perform(actions).await;
        loop {
            match self.sender.standing() {
                Standing::Open { .. } => break self.place.granted = true,
                Standing::Refused(refusal) => return Err(refusal.clone().into()),
                Standing::Unknown => {}
            }
            if self.outbox.is_none() || self.given.neighbour.why().is_some() {
                break;
            }
            self.outcome()?;
            self.step(None).await?;
        }
        Ok(false)
    }

    /// Says at once that the guest was migrated away; if there is no link, as soon as there is one.
    pub(super) async fn tell_departure(&mut self) {
        let seen = self.given.neighbour.state().departures;
        if seen != self.place.departures {
            (self.place.departures, self.place.owes, self.place.left) = (seen, true, true);
            (self.place.granted, self.place.said) = (false, None);
            tracing::info!(vm = %self.given.name, "the guest was migrated to another host");
        }
        if self.place.owes && self.outbox.is_some() {
            self.place.owes = false;
            self.say(Place::Left).await;
        }
    }

    /// Says it once on each link.
    pub(super) async fn say(&mut self, place: Place) {
        if self.place.said != Some(place) && self.outbox.as_ref().is_some_and(|outbox| outbox.places) {
            self.place.said = Some(place);
            let actions = self.sender.place(place);
            self.perform(actions).await;
        }
    }
}

/// Another agent's VM is asked for again no less often: its guest may come here at any time.
pub(super) fn ask_again(refusal: &Refusal, wait: Duration) -> Duration {
    if let Refusal::HeldElsewhere { .. } = refusal { wait.min(ASK_AGAIN) } else { wait }
}

const ASK_AGAIN: Duration = Duration::from_secs(5);
