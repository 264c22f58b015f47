//! Which agent has which VM, and how to reach it: what sessions tell of their hosts, and orders to them.
//! Promises: an order goes to the host where the VM runs, where one is known; what agents say of cuts is passed to whoever
//! listens, and what a held guest's agent said last is remembered. Filled by `session`; used by `group` and `failover`.

use super::slot::Replies;
use lifeboat::{
    id::{CutId, VmId},
    wire::{
        message::SiteMessage,
        order::{Assignment, CutOrder, Offered, Part},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};
use tokio::sync::broadcast;

/// VMs of one host that are taken note of.
pub const VMS_MAX: usize = 1000;
/// Words of agents that may wait for a slow listener, who then learns that he missed some.
const WORDS_QUEUED: usize = 4096;

/// What an agent said of its VM's part in a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    pub vm: VmId,
    pub cut: CutId,
    pub part: Part,
}

/// A host's VM, as its agent tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnHost {
    pub agent: String,
    pub vm: Offered,
}

/// What a VM's group says of it.
type Assigner = Box<dyn Fn(VmId) -> Option<Assignment> + Send + Sync>;

pub struct Switchboard {
    lines: Mutex<BTreeMap<u64, Line>>,
    /// Sessions of agents that know how to freeze.
    freezing: Mutex<BTreeSet<u64>>,
    /// What was said last of guests that stand for a failover.
    held: Mutex<BTreeMap<VmId, (CutId, Part)>>,
    words: broadcast::Sender<Heard>,
    assigner: OnceLock<Assigner>,
}

/// One session with an agent that knows orders.
struct Line {
    agent: String,
    replies: Replies,
    vms: BTreeMap<VmId, Offered>,
}

impl Default for Switchboard {
    fn default() -> Self {
        let (lines, freezing, held, assigner) = Default::default();
        Self { lines, freezing, held, words: broadcast::channel(WORDS_QUEUED).0, assigner }
    }
}

impl std::fmt::Debug for Switchboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Switchboard").field("lines", &self.lines().len()).finish_non_exhaustive()
    }
}

impl Switchboard {
    /// Who knows which group a VM is in; said once.
    pub fn assign_by(&self, assigner: impl Fn(VmId) -> Option<Assignment> + Send + Sync + 'static) {
        let _ = self.assigner.set(Box::new(assigner));
    }

    /// A session tells which VMs its host has. Each is answered by what its group says.
    pub async fn inventory(&self, session: u64, agent: &str, vms: Vec<Offered>, replies: &Replies) {
        let vms: BTreeMap<VmId, Offered> =
            vms.into_iter().take(VMS_MAX).map(|offered| (offered.vm, offered)).collect();
        let known: Vec<VmId> = vms.keys().copied().collect();
        let line = Line { agent: agent.into(), replies: replies.clone(), vms };
        self.lines().insert(session, line);
        for vm in known {
            let assignment = self.assigner.get().and_then(|assigner| assigner(vm));
            let _ = replies.send(SiteMessage::Assign { vm, assignment }).await;
        }
    }

    /// The session is over.
    pub fn gone(&self, session: u64) {
        self.lines().remove(&session);
        self.freezing().remove(&session);
    }

    /// The session's agent can be told to freeze.
    pub fn knows_freezes(&self, session: u64) {
        self.freezing().insert(session);
    }

    /// Whether the host where the VM is can be told to freeze its file systems.
    pub fn may_freeze(&self, vm: VmId) -> bool {
        let session = whose(&self.lines(), vm).map(|(session, _)| session);
        session.is_some_and(|session| self.freezing().contains(&session))
    }

    /// An agent says how its VM's part in a cut stands. Only who is given the orders for the VM has anything to say of it:
    /// another host may have a copy.
    pub fn heard(&self, session: u64, heard: Heard) {
        if whose(&self.lines(), heard.vm).is_none_or(|(whose, _)| whose != session) {
            return;
        }
        if let Part::Held { .. } | Part::HoldEnded { .. } = heard.part {
            self.held().insert(heard.vm, (heard.cut, heard.part.clone()));
        }
        // Nobody may be listening.
        let _ = self.words.send(heard);
    }

    pub fn listen(&self) -> broadcast::Receiver<Heard> {
        self.words.subscribe()
    }

    /// What was said last of a guest that stands, or stood, for a failover.
    pub fn last_of_hold(&self, vm: VmId) -> Option<(CutId, Part)> {
        self.held().get(&vm).cloned()
    }

    /// Tells the host where the VM is: the session in which it was told; `None` if none is connected that has it.
    pub async fn order(&self, vm: VmId, cut: CutId, order: CutOrder) -> Option<u64> {
        let (session, replies) = self.reach(vm)?;
        replies.send(SiteMessage::Cut { vm, cut, order }).await.is_ok().then_some(session)
    }

    /// The session in which an order about the VM would be given now.
    pub fn session(&self, vm: VmId) -> Option<u64> {
        self.reach(vm).map(|(session, _)| session)
    }

    /// The VM's group has changed: every host that has the VM is told.
    pub async fn reassign(&self, vm: VmId) {
        let assignment = self.assigner.get().and_then(|assigner| assigner(vm));
        let hosts: Vec<Replies> = {
            let lines = self.lines();
            lines
                .values()
                .filter(|line| line.vms.contains_key(&vm))
                .map(|line| line.replies.clone())
                .collect()
        };
        for replies in hosts {
            let assignment = assignment.clone();
            let _ = replies.send(SiteMessage::Assign { vm, assignment }).await;
        }
    }

    /// All VMs that connected hosts have.
    pub fn all(&self) -> Vec<OnHost> {
        let lines = self.lines();
        let of = |line: &Line| {
            let agent = line.agent.clone();
            line.vms
                .values()
                .map(move |vm| OnHost { agent: agent.clone(), vm: vm.clone() })
                .collect::<Vec<_>>()
        };
        lines.values().flat_map(of).collect()
    }

    /// Whether a host is connected that says that the VM runs there.
    pub fn runs_somewhere(&self, vm: VmId) -> bool {
        self.lines().values().any(|line| line.vms.get(&vm).is_some_and(|offered| offered.running))
    }

    /// Whether a host is connected that has the VM.
    pub fn is_reached(&self, vm: VmId) -> bool {
        self.session(vm).is_some()
    }

    fn reach(&self, vm: VmId) -> Option<(u64, Replies)> {
        whose(&self.lines(), vm).map(|(session, line)| (session, line.replies.clone()))
    }

    fn lines(&self) -> MutexGuard<'_, BTreeMap<u64, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn freezing(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.freezing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<VmId, (CutId, Part)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The session with the host where the VM runs; if it runs nowhere, with one that has it.
fn whose(lines: &BTreeMap<u64, Line>, vm: VmId) -> Option<(u64, &Line)> {
    let hosts = lines.iter().filter_map(|(session, line)| Some((line.vms.get(&vm)?.running, *session, line)));
    // Of two sessions of one agent the newer one lives.
    hosts.max_by_key(|(running, session, _)| (*running, *session)).map(|(_, session, line)| (session, line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    fn offered(no: u8, running: bool) -> Offered {
        Offered { vm: VmId::from_bytes([no; 16]), name: format!("vm{no}"), running }
    }

    #[tokio::test]
    async fn orders_go_where_the_vm_runs_and_every_host_hears_of_its_group() {
        let board = Switchboard::default();
        board.assign_by(|_| None);
        let ((a, mut at_a), (b, mut at_b)) = (mpsc::channel(16), mpsc::channel(16));
        let vm = offered(1, true).vm;
        board.inventory(1, "a", vec![offered(1, true), offered(2, true)], &a).await;
        board.inventory(2, "b", vec![offered(1, false)], &b).await;
        assert_eq!((at_a.len(), at_b.len()), (2, 1), "each VM is answered");
        board.knows_freezes(2);
        assert!(!board.may_freeze(vm), "it runs where nobody knows how");
        board.knows_freezes(1);
        assert!(board.may_freeze(vm));
        while at_a.try_recv().is_ok() {}
        while at_b.try_recv().is_ok() {}
        assert_eq!(board.order(vm, CutId::from_bytes([3; 16]), CutOrder::CallOff).await, Some(1));
        assert!(matches!(at_a.try_recv(), Ok(SiteMessage::Cut { order: CutOrder::CallOff, .. })));
        assert!(at_b.try_recv().is_err());
        let (cut, mut words) = (CutId::from_bytes([3; 16]), board.listen());
        let part = Part::HoldEnded { gone: true };
        board.heard(2, Heard { vm, cut, part: part.clone() });
        assert!(words.try_recv().is_err() && board.last_of_hold(vm).is_none(), "a copy elsewhere said so");
        board.heard(1, Heard { vm, cut, part });
        assert!(words.try_recv().is_ok() && board.last_of_hold(vm).is_some());
        board.reassign(vm).await;
        assert!(at_a.try_recv().is_ok() && at_b.try_recv().is_ok());
        board.gone(1);
        board.gone(2);
        assert!(!board.may_freeze(vm) && !board.is_reached(vm));
        board.inventory(2, "b", vec![offered(1, false)], &b).await;
        while at_b.try_recv().is_ok() {}
        assert_eq!(board.order(vm, CutId::from_bytes([3; 16]), CutOrder::CallOff).await, Some(2));
        assert!(at_b.try_recv().is_ok());
        // Its agent began anew; that the old one is dead shows later.
        board.inventory(3, "b", vec![offered(1, false)], &b).await;
        assert_eq!(board.session(vm), Some(3));
        assert!(!board.is_reached(offered(2, true).vm));
    }
}
