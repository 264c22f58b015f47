//! Reserving a VM's history: the site itself is to write it, or to give it to another agent, and no agent may meanwhile.
//! Promises: granted only while no point of a connected agent is under way, and the owner does not say that it has the guest
//! running, unless that one is fenced, or is to have it; ends with the value. Called by `seed` and `handover`.

use super::{RUNS, Slot, Slots, ownership::Word};
use crate::store::StoreError;
use lifeboat::{
    format::owner::Owner,
    id::{PointId, VmId},
};
use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError},
    time::Duration,
};

/// Nobody's points of the VM are taken while it lives.
#[derive(Debug)]
pub struct Reservation(Arc<Slot>);

impl Reservation {
    pub fn slot(&self) -> &Arc<Slot> {
        &self.0
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        *self.0.reserved.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Slots {
    /// `why` is what agents are told meanwhile.
    pub async fn reserve(&self, vm: VmId, why: &str) -> Result<Reservation, String> {
        let held = self.reserve_from(vm, why, |_| false).await?;
        if held.slot().is_idle().await { Ok(held) } else { Err(RECEIVING.into()) }
    }

    /// The same for a hand-over to an agent, which is the owner already, or will be: that it has the guest running is no reason
    /// against it. Nor is it if the owner is `fenced`: where the VM went home to its host, it has it running. Points that are
    /// under way are let end.
    pub async fn reserve_for(
        &self,
        vm: VmId,
        why: &str,
        agent: Option<&str>,
        fenced: bool,
    ) -> Result<Reservation, String> {
        let held = self.reserve_from(vm, why, |owner| fenced || Some(owner) == agent).await?;
        let end = tokio::time::Instant::now() + POINTS_END_WITHIN;
        while !held.slot().is_idle().await {
            if tokio::time::Instant::now() > end {
                return Err(RECEIVING.into());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(held)
    }

    /// `may`: whether this owner may have it running.
    async fn reserve_from(
        &self,
        vm: VmId,
        why: &str,
        may: impl Fn(&str) -> bool,
    ) -> Result<Reservation, String> {
        let slot = self.slot(vm);
        let mut inner = slot.at_rest().await;
        let owner = slot.owner(&mut inner).await.map_err(|error| error.to_string())?;
        let owner = owner.as_ref().map(Owner::agent);
        if let Some(owner) = owner.filter(|owner| !may(owner) && slot.word_of(owner) == Word::Said(RUNS)) {
            return Err(format!("agent {owner} protects this VM and has it running"));
        }
        let mut reserved = slot.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = reserved.as_deref() {
            return Err(format!("not now: {other}"));
        }
        *reserved = Some(why.to_owned());
        drop(reserved);
        drop(inner);
        Ok(Reservation(slot))
    }
}

impl Slots {
    /// Whose points of the VM are taken.
    pub async fn owner(&self, vm: VmId) -> Result<Option<Owner>, StoreError> {
        let slot = self.slot(vm);
        let mut inner = slot.at_rest().await;
        slot.owner(&mut inner).await
    }

    /// Agents that watch the VM now.
    pub fn watchers(&self, vm: VmId) -> BTreeSet<String> {
        let slot = self.slot(vm);
        let present = slot.present.lock().unwrap_or_else(PoisonError::into_inner);
        present.values().map(|present| present.agent.clone()).collect()
    }

    /// Whether this agent says that it has the VM running.
    pub fn runs_at(&self, vm: VmId, agent: &str) -> bool {
        self.slot(vm).word_of(agent) == Word::Said(RUNS)
    }
}

const RECEIVING: &str = "a point of this VM is being received";
const POINTS_END_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

impl Slot {
    /// Whether no point is under way. One whose agent is not connected would be kept for it, and may never end: it is given up.
    async fn is_idle(self: &Arc<Self>) -> bool {
        let inner = self.at_rest().await;
        let open: Vec<PointId> = inner.open.keys().copied().collect();
        let connected = inner.replies.as_ref().is_some_and(|replies| !replies.is_closed());
        drop(inner);
        if open.is_empty() || connected {
            return open.is_empty();
        }
        for point in open {
            self.abort(point).await;
        }
        self.at_rest().await.open.is_empty()
    }

    /// Why no agent's points are taken, if so.
    pub(super) fn reserved(&self) -> Option<String> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
