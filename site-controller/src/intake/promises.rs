//! What this site has promised agents: not to fail a VM over by itself for a while after it heard them; and VMs that it
//! is closed for, as it may be claiming them. Promises: from the moment at which a VM is closed, no agent is promised
//! anything, nor told that the VM is its own; a site that was just started counts as having heard every agent then. In
//! memory. Filled by `session`; asked by `automatic`.

use lifeboat::id::VmId;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

#[derive(Debug)]
pub struct Promises {
    started: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    heard: BTreeMap<VmId, Instant>,
    closed: BTreeSet<VmId>,
}

impl Default for Promises {
    fn default() -> Self {
        Self { started: Instant::now(), inner: Mutex::default() }
    }
}

impl Promises {
    /// An agent that writes the VM's history is heard; `false`: nothing is promised.
    pub fn heard(&self, vm: VmId) -> bool {
        let mut inner = self.inner();
        let open = !inner.closed.contains(&vm);
        if open {
            inner.heard.insert(vm, Instant::now());
        }
        open
    }

    pub fn close(&self, vm: VmId) {
        self.inner().closed.insert(vm);
    }

    pub fn open(&self, vm: VmId) {
        self.inner().closed.remove(&vm);
    }

    pub fn is_closed(&self, vm: VmId) -> bool {
        self.inner().closed.contains(&vm)
    }

    /// The clock stands still while this machine sleeps: then agents were silent for longer than this says.
    pub fn silent_for(&self, vm: VmId) -> Duration {
        let heard = self.inner().heard.get(&vm).copied();
        heard.map_or(self.started, |heard| heard.max(self.started)).elapsed()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_that_is_closed_for_a_vm_promises_nothing_and_one_that_was_just_started_waits() {
        let (promises, vm) = (Promises::default(), VmId::from_bytes([1; 16]));
        assert!(promises.silent_for(vm) < Duration::from_secs(10), "silence begins with the start");
        assert!(promises.heard(vm));
        let before = promises.silent_for(vm);
        promises.close(vm);
        assert!(!promises.heard(vm) && promises.is_closed(vm) && promises.silent_for(vm) >= before);
        promises.open(vm);
        assert!(promises.heard(vm));
    }
}
