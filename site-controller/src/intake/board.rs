//! What agents say of themselves and their VMs, for `lifeboat status`. In memory only: it is asked for again at each
//! session, and what it says is told apart from what the store knows.

use lifeboat::{
    id::VmId,
    units::UnixMs,
    wire::message::{VmReport, VmState},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// A VM as its agent last described it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    pub name: String,
    pub agent: String,
    /// Whether that agent's session is open now.
    pub connected: bool,
    pub last_heard: UnixMs,
    pub report: Option<VmReport>,
}

/// VMs that one agent may have the board remember: an agent names them, so there must be a bound.
pub const VMS_PER_SITE_MAX: usize = 10_000;

#[derive(Debug, Default)]
pub struct Board(Mutex<BTreeMap<VmId, (u64, Seen)>>);

impl Board {
    /// A session says that it watches a VM; `false` if the board is full.
    pub fn watch(&self, session: u64, vm: VmId, name: &str, agent: &str, now: UnixMs) -> bool {
        self.rows(|rows| {
            if !rows.contains_key(&vm) && rows.len() >= VMS_PER_SITE_MAX {
                return false;
            }
            let report = rows.remove(&vm).and_then(|(_, seen)| seen.report);
            let seen =
                Seen { name: name.into(), agent: agent.into(), connected: true, last_heard: now, report };
            rows.insert(vm, (session, seen));
            true
        })
    }

    pub fn report(&self, session: u64, vm: VmId, report: VmReport, now: UnixMs) {
        self.rows(|rows| {
            if let Some((_, seen)) = rows.get_mut(&vm).filter(|(owner, _)| *owner == session) {
                seen.report = Some(report);
                seen.last_heard = now;
            }
        });
    }

    /// The session is over; what it said stays, marked as such.
    pub fn gone(&self, session: u64, now: UnixMs) {
        self.rows(|rows| {
            for (_, seen) in rows.values_mut().filter(|(owner, _)| *owner == session) {
                seen.connected = false;
                seen.last_heard = now;
            }
        });
    }

    pub fn fenced(&self, vm: VmId) {
        self.rows(|rows| {
            if let Some(report) = rows.get_mut(&vm).and_then(|(_, seen)| seen.report.as_mut()) {
                report.state = VmState::Fenced;
            }
        });
    }

    pub fn seen(&self, vm: VmId) -> Option<Seen> {
        self.rows(|rows| rows.get(&vm).map(|(_, seen)| seen.clone()))
    }

    pub fn all(&self) -> Vec<(VmId, Seen)> {
        self.rows(|rows| rows.iter().map(|(vm, (_, seen))| (*vm, seen.clone())).collect())
    }

    fn rows<T>(&self, with: impl FnOnce(&mut BTreeMap<VmId, (u64, Seen)>) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
