//! A witness on paper: words, and leases with a time, by a clock that is turned by hand. What it does is held against a real
//! etcd in tests/tests/witness.rs.

use async_trait::async_trait;
use lifeboat::{
    id::VmId,
    witness::{Change, Entry, LeaseId, Leasing, Revision, Witness, WitnessError, Word},
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

#[derive(Default)]
pub struct ModelWitness(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    now: u64,
    revision: u64,
    words: BTreeMap<VmId, (Word, Revision)>,
    /// The lease that a VM's is bound to.
    bound: BTreeMap<VmId, LeaseId>,
    /// How long each lasts, and when it ends.
    leases: BTreeMap<LeaseId, (u64, u64)>,
    given: u64,
}

impl ModelWitness {
    pub fn pass(&self, ms: u64) {
        let mut inner = self.inner();
        inner.now += ms;
        let now = inner.now;
        inner.leases.retain(|_, (_, end)| *end > now);
        let alive: Vec<LeaseId> = inner.leases.keys().copied().collect();
        inner.bound.retain(|_, lease| alive.contains(lease));
    }

    pub fn grant_now(&self, ttl: Duration) -> LeaseId {
        let mut inner = self.inner();
        inner.given += 1;
        let (id, ms) = (LeaseId(inner.given), ttl.as_millis() as u64);
        let end = inner.now + ms;
        inner.leases.insert(id, (ms, end));
        id
    }

    pub fn renew_now(&self, lease: LeaseId) -> bool {
        let mut inner = self.inner();
        let now = inner.now;
        inner.leases.get_mut(&lease).is_some_and(|(ms, end)| {
            *end = now + *ms;
            true
        })
    }

    pub fn look_now(&self, vm: VmId) -> Entry {
        let inner = self.inner();
        let (word, revision) =
            inner.words.get(&vm).map_or((None, Revision(0)), |(word, at)| (Some(word.clone()), *at));
        Entry { word, revision, leased: inner.bound.contains_key(&vm) }
    }

    /// `Err`: a lease that is bound has run out.
    pub fn change_now(&self, changes: &[Change]) -> Result<Option<Revision>, LeaseId> {
        let mut inner = self.inner();
        for change in changes {
            let seen = inner.words.get(&change.vm).map_or(Revision(0), |(_, at)| *at);
            let leased = inner.bound.contains_key(&change.vm);
            if seen != change.over || (change.leasing == Leasing::Gone && leased) {
                return Ok(None);
            }
        }
        for change in changes {
            if let Leasing::Bind(lease) = change.leasing
                && !inner.leases.contains_key(&lease)
            {
                return Err(lease);
            }
        }
        inner.revision += 1;
        let revision = Revision(inner.revision);
        for change in changes {
            inner.words.insert(change.vm, (change.word.clone(), revision));
            match change.leasing {
                Leasing::Bind(lease) => drop(inner.bound.insert(change.vm, lease)),
                Leasing::Drop => drop(inner.bound.remove(&change.vm)),
                Leasing::Gone => {}
            }
        }
        Ok(Some(revision))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Witness for ModelWitness {
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, WitnessError> {
        Ok(self.grant_now(ttl))
    }

    async fn renew(&self, lease: LeaseId) -> Result<bool, WitnessError> {
        Ok(self.renew_now(lease))
    }

    async fn look(&self, vms: &[VmId]) -> Result<Vec<Entry>, WitnessError> {
        Ok(vms.iter().map(|vm| self.look_now(*vm)).collect())
    }

    async fn change(&self, changes: &[Change]) -> Result<Option<Revision>, WitnessError> {
        self.change_now(changes).map_err(|_| WitnessError::Malformed("no such lease".into()))
    }
}
