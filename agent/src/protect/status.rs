//! How each protected VM is doing, for whoever asks: `lifeboat-agent status`, and the site through reports.
//! Promises: the RPO shown is the age of the newest point that the site has acknowledged, never of one under way; none where
//! that is of what stands on the disks of a VM that is off.

use crate::{
    capture::{memory::choose::MemoryStatus, source::Attained},
    protect::pace::Verdict,
};
use lifeboat::{
    id::{PointId, VmId},
    units::{Seq, UnixMs},
    wire::message::{VmReport, VmState},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// One VM, as `lifeboat-agent status --json` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStatus {
    pub vm: VmId,
    pub name: String,
    pub state: VmState,
    pub reason: Option<String>,
    /// The site's group that it is in.
    #[serde(default)]
    pub group: Option<String>,
    /// Memory engine, or why there is none.
    pub memory: Option<String>,
    /// The same in parts, with the last change of engine.
    #[serde(default)]
    pub memory_engine: Option<MemoryStatus>,
    /// Whether points are app-consistent, where that is wished.
    #[serde(default)]
    pub consistency: Option<Attained>,
    pub interval_ms: u64,
    /// Why points come later than the interval says, if they do.
    pub pace: Option<Verdict>,
    /// How hard pages are compressed now: a zstd level, 0 for not at all.
    pub zstd_level: i32,
    pub durable: Option<DurablePoint>,
    /// It is off; with the state `protected`, its newest point is of what stands on its disks.
    #[serde(default)]
    pub off: bool,
    /// Age of the newest durable point, milliseconds; filled in when asked. Nothing is lost of a VM that is off.
    pub rpo_ms: Option<u64>,
    /// Points that were sent and are not durable yet.
    #[serde(default)]
    pub under_way: usize,
    pub points_durable: u64,
    /// Points that were begun and given up; a guest that could not be cut at all has none.
    pub points_lost: u64,
    /// Pause of the last cut, microseconds.
    pub last_pause_us: Option<u64>,
    /// Whether this copy may run; filled in when asked.
    #[serde(default)]
    pub fence: Option<FenceStatus>,
}

/// Whether this host's copy of the VM may run, and what was done to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceStatus {
    /// `owner`, `allowed` (an operator's word), `fenced`, or `unsure`: the site has not answered.
    pub verdict: String,
    /// The hook lets the VM start.
    pub lease: bool,
    /// When this copy was fenced, or paused as the site did not answer.
    pub since: Option<UnixMs>,
    /// What was done, and what can be done.
    pub what: Option<String>,
    /// How it stands with the witness, where one is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<String>,
    /// The generation that fenced it.
    pub generation: Option<u64>,
    /// Where what only this copy knows is kept.
    pub diverged: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DurablePoint {
    pub point: PointId,
    pub seq: Option<Seq>,
    pub cut_at: UnixMs,
    pub committed_at: UnixMs,
}

/// The agent's board: one row per VM, and the state of the link.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<Rows>>);

#[derive(Debug, Default)]
struct Rows {
    link: String,
    vms: BTreeMap<String, VmStatus>,
    fences: BTreeMap<VmId, FenceStatus>,
}

/// All of the board, as the local API serves it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    pub link: String,
    pub vms: Vec<VmStatus>,
}

impl Board {
    pub fn set_link(&self, link: String) {
        self.rows(|rows| rows.link = link);
    }

    /// The VM is no longer protected here.
    pub fn forget(&self, vm: VmId) {
        self.rows(|rows| rows.vms.retain(|_, status| status.vm != vm));
    }

    /// Changes the row of `status.name`, making it first if need be.
    pub fn put(&self, status: VmStatus) {
        self.rows(|rows| rows.vms.insert(status.name.clone(), status));
    }

    /// What is shown of the VM's fence, in whichever row it has.
    pub fn put_fence(&self, vm: VmId, fence: FenceStatus) {
        self.rows(|rows| rows.fences.insert(vm, fence));
    }

    pub fn read(&self, now: UnixMs) -> AgentStatus {
        self.rows(|rows| {
            let mut vms: Vec<VmStatus> = rows.vms.values().cloned().collect();
            for vm in &mut vms {
                vm.fence = rows.fences.get(&vm.vm).cloned();
                let rests = vm.off && vm.state == VmState::Protected;
                let age = |durable: DurablePoint| now.0.saturating_sub(durable.cut_at.0);
                vm.rpo_ms = vm.durable.map(|durable| if rests { 0 } else { age(durable) });
            }
            AgentStatus { link: rows.link.clone(), vms }
        })
    }

    fn rows<T>(&self, with: impl FnOnce(&mut Rows) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl VmStatus {
    pub fn new(vm: VmId, name: String, interval_ms: u64) -> Self {
        Self {
            vm,
            name,
            state: VmState::Connecting,
            reason: None,
            group: None,
            memory: None,
            memory_engine: None,
            consistency: None,
            interval_ms,
            pace: None,
            zstd_level: 0,
            durable: None,
            off: false,
            rpo_ms: None,
            under_way: 0,
            points_durable: 0,
            points_lost: 0,
            last_pause_us: None,
            fence: None,
        }
    }

    pub fn set_memory(&mut self, memory: MemoryStatus) {
        self.memory = Some(memory.to_string());
        self.memory_engine = Some(memory);
    }

    /// Why it is in its state; or, where all is well but slow, why it is slow; or why points are not what is wished.
    pub fn why(&self) -> Option<String> {
        let slow = || self.pace.as_ref().map(Verdict::to_string);
        let lacking = || {
            let lacking = self.consistency.as_ref().filter(|kept| !kept.attained);
            lacking.map(|kept| kept.words.clone())
        };
        self.reason.clone().or_else(slow).or_else(lacking)
    }

    pub fn report(&self) -> VmReport {
        VmReport {
            state: self.state,
            reason: self.why(),
            interval_ms: self.interval_ms,
            memory: self.memory.clone(),
        }
    }
}
