//! Pins: whoever reads points says so, and nothing that was there when it began is removed before it has ended.
//! What pruning and folding replace goes to the VM's trash; a pin protects all that came into the trash after it.
//! Promises: dropping a pin is enough, also in a panic. Called by restore, verify and the rooms that change the store.

use crate::store::{error::StoreError, layer::Folds, site::Store, slot::Slot};
use lifeboat::{id::VmId, units::Seq};
use std::{collections::VecDeque, sync::Arc};

/// Somebody reads points of a VM.
#[derive(Debug)]
pub struct Pin {
    slot: Arc<Slot>,
    id: u64,
    path: Vec<Seq>,
    folds: Folds,
}

impl Pin {
    pub(super) fn new(slot: &Arc<Slot>, seq: Option<Seq>, path: Vec<Seq>, folds: Folds) -> Self {
        let id = slot.pins().begin(seq);
        Self { slot: slot.clone(), id, path, folds }
    }

    /// The layers of the point that is read, the newest first.
    pub fn path(&self) -> &[Seq] {
        &self.path
    }

    /// The folds along the path of the point that is read.
    pub fn folds(&self) -> &Folds {
        &self.folds
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.slot.pins().end(self.id);
    }
}

impl Store {
    /// Pins one point, so that it can be read in peace; none if it is not there (any more).
    pub async fn pin(&self, vm: VmId, seq: Seq) -> Option<Pin> {
        let slot = self.shared.slot(vm);
        let history = slot.history.clone().lock_owned().await;
        let path = history.tree.path(seq);
        let folds = history.tree.folds(&path);
        // Under the lock: whoever takes the point away sees the pin, or the pin does not see the point.
        (!path.is_empty()).then(|| Pin::new(&slot, Some(seq), path, folds))
    }

    /// Pins all that a VM has now, for whoever reads the store itself.
    pub fn hold(&self, vm: VmId) -> Pin {
        Pin::new(&self.shared.slot(vm), None, Vec::new(), Folds::new())
    }

    /// Removes trash that nobody reads, at most `most` objects; returns how many. What can't be removed stays for the
    /// next time, and after a restart is an orphan.
    pub async fn sweep(&self, vm: VmId, most: usize) -> Result<usize, StoreError> {
        let slot = self.shared.slot(vm);
        let mut taken = VecDeque::from(slot.pins().take(most));
        let mut removed = 0;
        while let Some((_, path)) = taken.front() {
            lifeboat::fault::point("sweep.remove");
            if let Err(error) = self.shared.objects.delete(path).await {
                slot.pins().put_back(taken);
                return Err(error);
            }
            taken.pop_front();
            removed += 1;
        }
        Ok(removed)
    }
}
