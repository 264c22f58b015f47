//! The actor's part about keeping aside: for as long as somebody needs the guest's QEMU for themselves, or a yield lasts.
//! Promises that nothing of the guest's is held meanwhile, and that points under way are given up as soon as it is wished.

use super::{Actor, Setback};
use crate::capture::source::Source;
use lifeboat::wire::message::VmState;
use std::time::Duration;
use tokio::time::Instant;

/// How long after a failure leaving a guest is tried again.
const LEAVE_AGAIN: Duration = Duration::from_secs(2);

impl<S: Source> Actor<S> {
    /// Keeps aside for as long as somebody wishes it, holding nothing of the guest's.
    pub(super) async fn keep_aside(&mut self) -> Result<(), Setback> {
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
            self.decline(&why).await;
            self.answer_late_verdict().await;
            let state = wishes.aside_state();
            if self.status.state != state || self.status.reason.as_ref() != Some(&why) {
                tracing::info!(vm = %self.given.name, %why, "keeping aside");
                self.set_state(state, Some(why)).await;
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
            // Refused by the site, it is no better than before.
            self.note_standing().await;
        }
        Ok(())
    }

    /// Points under way are given up as soon as somebody wishes us out of the way.
    pub(super) fn check_wishes(&self) -> Result<(), Setback> {
        match (self.sender.open_point(), self.given.neighbour.why()) {
            (Some(_), Some(why)) => Err(Setback::Aside(why)),
            _ => Ok(()),
        }
    }
}
