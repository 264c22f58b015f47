//! What agents say of themselves and their VMs, for `lifeboat status`. In memory only: it is asked for again at each
//! session, and what it says is told apart from what the store knows.

use lifeboat::{
    id::VmId,
    units::UnixMs,
    wire::message::{VmReport, VmState},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// A VM as its agent last described it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Seen {
    pub name: String,
    pub agent: String,
    /// Whether that agent's session is open now.
    pub connected: bool,
    pub last_heard: UnixMs,
    pub report: Option<VmReport>,
    /// Another agent that would write this VM's history, and was refused.
    #[serde(default)]
    pub contender: Option<Contender>,
}

impl Seen {
    /// Its agent is there, and says that all is well: of a VM whose newest point is of its disks at rest, that these are so
    /// still.
    pub fn is_protected(&self) -> bool {
        let says = self.report.as_ref().is_some_and(|report| report.state == VmState::Protected);
        self.connected && says
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Contender {
    pub agent: String,
    pub why: String,
    pub at: UnixMs,
}

/// VMs that one agent may have the board remember: an agent names them, so there must be a bound.
pub const VMS_PER_SITE_MAX: usize = 10_000;

#[derive(Debug, Default)]
pub struct Board {
    vms: Mutex<BTreeMap<VmId, (u64, Seen)>>,
    /// When the certificate expires that an agent showed last.
    certificates: Mutex<BTreeMap<String, UnixMs>>,
}

impl Board {
    /// A session says that it watches a VM; `false` if the board is full. What another agent said of it stays: only one
    /// that owns the VM takes its place ([`Self::take`]).
    pub fn watch(&self, session: u64, vm: VmId, name: &str, agent: &str, now: UnixMs) -> bool {
        let (known, room) = self
            .rows(|rows| (rows.get(&vm).map(|(_, seen)| seen.agent == agent), rows.len() < VMS_PER_SITE_MAX));
        match known {
            None if !room => return false,
            None | Some(true) => self.take(session, vm, name, agent, now),
            Some(false) => {}
        }
        true
    }

    /// The row of a VM that is known is this session's from now on.
    pub fn take(&self, session: u64, vm: VmId, name: &str, agent: &str, now: UnixMs) {
        self.rows(|rows| {
            let before = rows.remove(&vm).map(|(_, seen)| seen).filter(|seen| seen.agent == agent);
            let (report, contender) = before.map(|seen| (seen.report, seen.contender)).unwrap_or_default();
            let (name, agent) = (name.into(), agent.into());
            let seen = Seen { name, agent, connected: true, last_heard: now, report, contender };
            rows.insert(vm, (session, seen));
        });
    }

    /// The VM is this session's agent's.
    pub fn own(&self, session: u64, vm: VmId, agent: &str, now: UnixMs) {
        let row = self.rows(|rows| rows.get(&vm).map(|(of, seen)| (*of, seen.name.clone())));
        if let Some((_, name)) = row.filter(|(of, _)| *of != session) {
            self.take(session, vm, &name, agent, now);
        }
    }

    /// Another agent than the owner would write the VM's history; with `None`, no more.
    pub fn contend(&self, vm: VmId, agent: &str, why: Option<String>, now: UnixMs) {
        self.rows(|rows| {
            let Some((_, seen)) = rows.get_mut(&vm) else { return };
            match why {
                Some(why) => seen.contender = Some(Contender { agent: agent.into(), why, at: now }),
                None if seen.contender.as_ref().is_some_and(|other| other.agent == agent) => {
                    seen.contender = None
                }
                None => {}
            }
        });
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

    /// An agent has connected, with a certificate of the site's that ends then.
    pub fn certified(&self, agent: &str, expires: UnixMs) {
        let mut known = self.certificates.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(agent.to_owned(), expires);
    }

    pub fn certificate_expires(&self, agent: &str) -> Option<UnixMs> {
        self.certificates.lock().unwrap_or_else(PoisonError::into_inner).get(agent).copied()
    }

    fn rows<T>(&self, with: impl FnOnce(&mut BTreeMap<VmId, (u64, Seen)>) -> T) -> T {
        with(&mut self.vms.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
