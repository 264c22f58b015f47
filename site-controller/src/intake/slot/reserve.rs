//! Reserving a VM's history: the site itself is to write it, or to give it to another agent, and no agent may meanwhile.
//! Promises: granted only while no point is under way and the owner does not say that it has the guest running, unless that
//! one is fenced; ends with the value. Called by `seed` and `handover`.

use super::{RUNS, Slot, Slots, ownership::Word};
use crate::store::StoreError;
use lifeboat::{format::owner::Owner, id::VmId};
use std::sync::{Arc, PoisonError};

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
        self.reserve_from(vm, why, false).await
    }

    /// The same of a VM that was failed over here and given to nobody since: its owner is fenced, and where the VM went home to
    /// its host, it has it running.
    pub async fn reserve_fenced(&self, vm: VmId, why: &str) -> Result<Reservation, String> {
        self.reserve_from(vm, why, true).await
    }

    async fn reserve_from(&self, vm: VmId, why: &str, fenced: bool) -> Result<Reservation, String> {
        let slot = self.slot(vm);
        let mut inner = slot.at_rest().await;
        let owner = slot.owner(&mut inner).await.map_err(|error| error.to_string())?;
        let has_it = |owner: &Owner| !fenced && slot.word_of(owner.agent()) == Word::Said(RUNS);
        if let Some(owner) = owner.filter(has_it) {
            return Err(format!("agent {} protects this VM and has it running", owner.agent()));
        }
        if !inner.open.is_empty() {
            return Err("a point of this VM is being received".into());
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
}

impl Slot {
    /// Why no agent's points are taken, if so.
    pub(super) fn reserved(&self) -> Option<String> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
