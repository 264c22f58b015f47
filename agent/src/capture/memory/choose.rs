//! Choosing the memory engine of a guest by looking at the guest, its host and its QEMU, and changing it when it fails.
//! Promises: the best engine that fits is used and the reason is told, as is why a better one is not; one that fails
//! again and again is put aside for a while (`records`) and tried again by itself; each change is logged and kept.
//! A new engine goes on with the old one's digests where both have them, and otherwise sends all memory once.
//! Called by `capture::guest`. A new engine is one more [`Kind`].

mod decide;
mod pause;
mod records;

use super::{
    Fitness, MemoryEngine, MemoryError, RamImage, Staging, Target,
    snapshot::{self, Snapshot},
    soft_dirty::SoftDirty,
    stop_and_read::StopAndRead,
};
use crate::watchdog::Found;
use decide::{Decision, decide};
use lifeboat::{
    hypervisor::{domain_xml::DomainSpec, libvirt::QemuProcess},
    id::{PointId, VmId},
    page::PageGroup,
    units::UnixMs,
};
use pause::Pause;
use records::Records;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Whether memory is part of a guest's points.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryMode {
    /// Where an engine fits; otherwise disks only, with the reason in status.
    #[default]
    Auto,
    /// Always: a guest whose memory can't be captured is refused.
    On,
    /// Disks only: the replica boots.
    Off,
}

/// The engines there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    SoftDirty,
    Snapshot,
    StopAndRead,
}

impl Kind {
    /// Best first.
    pub const ORDER: [Self; 3] = [Self::SoftDirty, Self::Snapshot, Self::StopAndRead];

    pub fn name(self) -> &'static str {
        match self {
            Self::SoftDirty => "soft-dirty",
            Self::Snapshot => snapshot::NAME,
            Self::StopAndRead => "stop-and-read",
        }
    }

    /// The engine of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ORDER.into_iter().find(|kind| kind.name() == name)
    }

    fn probe(self, look: &Look, wishes: &Wishes) -> Fitness {
        match self {
            Self::SoftDirty => SoftDirty::probe(look.target, look.spec),
            Self::Snapshot => Snapshot::probe(look.target, wishes.vm, &wishes.found, look.spec),
            Self::StopAndRead => StopAndRead::probe(look.target),
        }
    }

    fn start(self, wishes: &Wishes) -> Box<dyn MemoryEngine> {
        let staging = Staging::new(wishes.staging_bytes, wishes.spool_dir.clone());
        match self {
            Self::SoftDirty => Box::new(SoftDirty::new(staging)),
            Self::Snapshot => Box::new(Snapshot::new(staging, wishes.vm, wishes.found.clone())),
            Self::StopAndRead => Box::new(StopAndRead::new(staging)),
        }
    }
}

/// What is chosen for.
pub struct Look<'a> {
    pub spec: &'a DomainSpec,
    pub target: &'a Target,
}

/// What the operator wants, and where engines may keep what they stage or must put back.
#[derive(Clone, Debug)]
pub struct Wishes {
    pub vm: VmId,
    /// The VM's name, for people.
    pub name: String,
    pub found: Found,
    pub mode: MemoryMode,
    /// This engine and no other; `None` for the best.
    pub engine: Option<Kind>,
    pub staging_bytes: usize,
    pub spool_dir: PathBuf,
}

/// How memory is captured and why so, for status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// `None`: points are of disks only.
    pub engine: Option<String>,
    pub why: String,
    /// Better engines, and why they are not used.
    pub passed_over: Vec<PassedOver>,
    pub last_change: Option<EngineChange>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    pub engine: String,
    pub why: String,
}

/// One change of engine; `None` stands for disks only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineChange {
    pub at: UnixMs,
    pub from: Option<String>,
    pub to: Option<String>,
    pub why: String,
}

impl fmt::Display for MemoryStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.engine.as_deref().unwrap_or(DISKS_ONLY), self.why)?;
        for PassedOver { engine, why } in &self.passed_over {
            write!(f, "; not {engine}: {why}")?;
        }
        Ok(())
    }
}

const DISKS_ONLY: &str = "disks only";
/// How often it is looked again whether another engine fits better.
const LOOK_AGAIN: Duration = Duration::from_secs(5 * 60);

/// Memory of this guest can't be captured.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// And its operator wants it to be.
    #[error("{0}")]
    Unfit(String),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The engine in use, and all that is known for choosing it.
pub struct Chooser {
    wishes: Wishes,
    running: Option<(Kind, Box<dyn MemoryEngine>)>,
    /// For which guest the choice was made, and when it is made again.
    chosen: Option<Chosen>,
    records: Records,
    /// How long the guest would stand for stop-and-read.
    pause: Pause,
    status: Arc<Mutex<MemoryStatus>>,
}

struct Chosen {
    process: QemuProcess,
    spec: DomainSpec,
    until: Instant,
}

impl Chooser {
    /// `status` is kept up to date.
    pub fn new(wishes: Wishes, status: Arc<Mutex<MemoryStatus>>) -> Self {
        let (records, pause) = (Records::default(), Pause::default());
        Self { wishes, running: None, chosen: None, records, pause, status }
    }

    /// Chooses if need be, and starts a round. No images: there is no engine, and points are of disks only.
    pub fn begin(
        &mut self,
        look: &Look,
        basis: Option<PointId>,
        at: UnixMs,
    ) -> Result<Vec<RamImage>, ChooseError> {
        self.choose(look, at)?;
        let Some((_, engine)) = &mut self.running else { return Ok(Vec::new()) };
        let begun = engine.begin(look.target, basis);
        Ok(self.judged(begun)?)
    }

    pub fn before(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        let pages = self.engine()?.before();
        self.judged(pages)
    }

    pub fn wants_early_pause(&self) -> bool {
        self.running.as_ref().is_some_and(|(_, engine)| engine.wants_early_pause())
    }

    pub fn early_pause(&mut self) -> Result<(), MemoryError> {
        let cleared = self.engine()?.early_pause();
        self.judged(cleared)
    }

    pub fn drain(&mut self) -> Result<(), MemoryError> {
        let began = Instant::now();
        let drained = self.engine()?.drain();
        if let (Ok(()), Some((Kind::StopAndRead, _)), Some(chosen)) =
            (&drained, &self.running, &mut self.chosen)
            && self.pause.measured(chosen.spec.memory_bytes, began.elapsed())
        {
            // What was thought of the pause was wrong: choose anew for the next point.
            chosen.until = Instant::now();
        }
        self.judged(drained)
    }

    /// The last thing in the pause; `true` if the engine has let the guest go.
    pub fn finish(&mut self, may_resume: bool) -> Result<bool, MemoryError> {
        let finished = self.engine()?.finish(may_resume);
        self.judged(finished)
    }

    pub fn after(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        let pages = self.engine()?.after();
        self.judged(pages)
    }

    pub fn machine_config(&self) -> Vec<u8> {
        self.running.as_ref().map(|(_, engine)| engine.machine_config()).unwrap_or_default()
    }

    pub fn changed_bytes(&self) -> u64 {
        self.running.as_ref().map_or(0, |(_, engine)| engine.changed_bytes())
    }

    pub fn sent(&mut self, point: PointId) {
        if let Some((_, engine)) = &mut self.running {
            engine.sent(point);
        }
    }

    pub fn settle(&mut self, point: PointId) {
        if let Some((kind, engine)) = &mut self.running {
            engine.settle(point);
            self.records.succeeded(*kind);
        }
    }

    pub fn put_back(&mut self) {
        if let Some((_, engine)) = &mut self.running {
            engine.put_back();
        }
    }

    /// Nothing is known any more of what the site holds: the next point is of all memory.
    pub fn forget(&mut self) {
        if let Some((kind, engine)) = &mut self.running {
            *engine = kind.start(&self.wishes);
        }
    }

    /// A point failed in a way that speaks against the engine, though the engine itself did not say so.
    pub fn failed(&mut self, why: String) {
        let Some((kind, _)) = &self.running else { return };
        if self.records.failed(*kind, Instant::now(), why) {
            self.chosen = None;
        }
    }

    fn engine(&mut self) -> Result<&mut dyn MemoryEngine, MemoryError> {
        match &mut self.running {
            Some((_, engine)) => Ok(engine.as_mut()),
            None => Err(MemoryError::Order("no memory engine was chosen")),
        }
    }

    fn judged<T>(&mut self, outcome: Result<T, MemoryError>) -> Result<T, MemoryError> {
        if let Err(error) = &outcome
            && error.blames_engine()
        {
            self.failed(error.to_string());
        }
        outcome
    }

    fn choose(&mut self, look: &Look, at: UnixMs) -> Result<(), ChooseError> {
        let now = Instant::now();
        let standing = self.chosen.take();
        if standing.as_ref().is_some_and(|chosen| chosen.process != look.target.process) {
            // Another QEMU: what the last one could not do says nothing.
            self.records = Records::default();
        }
        let same = |chosen: &Chosen| chosen.process == look.target.process && chosen.spec == *look.spec;
        let unchanged = standing.as_ref().is_some_and(same);
        if let Some(chosen) = standing.filter(|chosen| unchanged && now < chosen.until) {
            self.chosen = Some(chosen);
            return Ok(());
        }
        // Each look costs QEMU something; that snapshots work on this very guest is answer enough.
        let snapshots = unchanged && matches!(self.running, Some((Kind::Snapshot, _)));
        let fits = |kind: Kind| match self.records.resting(kind, now) {
            Some(why) => Fitness { usable: false, why },
            None if kind == Kind::Snapshot && snapshots => self.still(kind),
            None => kind.probe(look, &self.wishes),
        };
        let pause = self.pause.estimate(look.spec.memory_bytes);
        let obstacles = &look.spec.memory_obstacles;
        let decision = decide(self.wishes.mode, self.wishes.engine, obstacles, pause, fits);
        self.adopt(decision, at)?;
        let until = self.records.next_rested(now).map_or(now + LOOK_AGAIN, |at| at.min(now + LOOK_AGAIN));
        self.chosen = Some(Chosen { process: look.target.process, spec: look.spec.clone(), until });
        Ok(())
    }

    /// The engine at work fits, for the reason that status tells.
    fn still(&self, kind: Kind) -> Fitness {
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let why = status.why.trim_start_matches(decide::CONFIGURED).to_owned();
        debug_assert_eq!(status.engine.as_deref(), Some(kind.name()));
        Fitness { usable: true, why }
    }

    fn adopt(&mut self, decision: Decision, at: UnixMs) -> Result<(), ChooseError> {
        let (kind, why, passed_over) = match decision {
            Decision::Refuse(why) => return Err(ChooseError::Unfit(why)),
            Decision::Use(kind, why, passed_over) => (Some(kind), why, passed_over),
            Decision::DisksOnly(why) => (None, why, Vec::new()),
        };
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.running.as_ref().map(|(kind, _)| *kind);
        let first = status.why.is_empty();
        status.engine = kind.map(|kind| kind.name().to_owned());
        (status.why, status.passed_over) = (why, passed_over);
        if first {
            tracing::info!(vm = %self.wishes.name, memory = %status, "memory engine chosen");
        } else if old != kind {
            let (from, to) = (old.map(Kind::name), kind.map(Kind::name));
            let reasons = status.to_string();
            let why = reasons.split_once(": ").map_or("", |(_, why)| why).to_owned();
            status.last_change = Some(EngineChange { at, from: name(from), to: name(to), why });
            let (from, to) = (from.unwrap_or(DISKS_ONLY), to.unwrap_or(DISKS_ONLY));
            tracing::warn!(vm = %self.wishes.name, from, to, memory = %status, "memory engine changed");
        }
        if old != kind {
            let held = self.running.take().map(|(_, mut engine)| engine.hand_over());
            self.running = kind.map(|kind| (kind, kind.start(&self.wishes)));
            if let (Some((_, engine)), Some(held)) = (&mut self.running, held) {
                engine.take_over(held);
            }
        }
        Ok(())
    }
}

fn name(name: Option<&str>) -> Option<String> {
    name.map(str::to_owned)
}
