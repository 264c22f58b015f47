//! Letting an agent go on that was fenced: the VM ran here, went back, and is that agent's now.
//! Promises: only the agent that the owner's record names, only under the generation that it names, and only while that is
//! the VM's: another failover here, or another hand-over, ends it. Called by `slot` for `Watch`, by `handover`.

use super::{Inner, Reservation, Slot};
use crate::store::StoreError;
use lifeboat::{
    format::owner::Owner, session::receiver::Held, units::Generation, wire::message::SiteMessage,
};
use std::sync::PoisonError;

impl Slot {
    /// What to answer an agent that was handed the VM and has not adopted its generation yet.
    pub(super) async fn may_adopt(
        &self,
        inner: &mut Inner,
        agent: &str,
        held: Held,
        theirs: Option<Generation>,
    ) -> Option<SiteMessage> {
        let Ok(Some(Owner::HandedTo { agent: named, generation })) = self.owner(inner).await else {
            return None;
        };
        let current = named == agent && generation == held.generation;
        // One that knows none is let in as it is, unless it would be taken for one that slept through a failover.
        let behind = theirs.map_or(held.raised_since_latest, |theirs| theirs < generation);
        // Also while the hand-over is still being finished: it would pause the very copy that it is for if it heard that it is
        // fenced. Its points are refused until then.
        (current && behind).then_some(SiteMessage::Adopt { vm: self.vm, generation })
    }
}

impl Reservation {
    pub async fn owner(&self) -> Result<Option<Owner>, StoreError> {
        let mut inner = self.slot().at_rest().await;
        self.slot().owner(&mut inner).await
    }

    /// Notes the new owner; it is let in once the VM's generation is the one it is given, and this has ended.
    pub async fn hand_to(&self, agent: &str, generation: Generation) -> Result<(), StoreError> {
        let mut inner = self.slot().at_rest().await;
        let owner = Owner::HandedTo { agent: agent.to_owned(), generation };
        self.slot().set_owner(&mut inner, owner).await
    }

    /// Ends the reservation, and has the agent go on that the VM was handed to, if it is connected.
    pub async fn hand_over(self, agent: &str, generation: Generation) {
        let slot = self.slot().clone();
        drop(self);
        let told: Vec<_> = {
            let present = slot.present.lock().unwrap_or_else(PoisonError::into_inner);
            present.values().filter(|present| present.agent == agent).map(|it| it.replies.clone()).collect()
        };
        for replies in told {
            // A closed channel is a session that has just ended; the next one is told when it watches.
            let _ = replies.send(SiteMessage::Adopt { vm: slot.vm, generation }).await;
        }
    }
}
