//! Control messages of protocol version 1. Encoded with postcard inside the transport's `tag, length` framing.
//! Promises: a variant's place in its enum is its number on the wire: variants are appended, never moved or reused.
//! Golden bytes of every variant are kept in the tests.

use crate::{
    chunk::digest::Digest,
    format::manifest::{PointMeta, v1},
    id::{CutId, PointId, VmId},
    units::{Generation, Seq, UnixMs},
    wire::{
        compare::{Answer, Question},
        order::{Assignment, CutOrder, Offered, Part},
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Frames named in one [`SiteMessage::Taken`] or [`SiteMessage::Opened`], as ranges.
pub type FrameRanges = Vec<FrameRange>;

/// Frames `first..end` of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameRange {
    pub first: u32,
    pub end: u32,
}

/// Agent → site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// First message of a session. Answer: `Welcome`.
    Hello { host: String, release: String },
    /// "I protect this VM." Once per VM and session, before anything else of it. Answer: `Vm`, or `VmRefused`.
    Watch { vm: VmId, name: String, generation: Option<Generation> },
    /// Opens a point, or takes it up again after a lost link. `parent` is the point it is a delta over.
    /// Answer: `Opened`, or `PointRefused`.
    Begin { vm: VmId, generation: Generation, point: PointId, parent: Option<PointId> },
    /// `End` as it is said in versions 1 to 4.
    EndV1 { vm: VmId, point: PointId, frames: u32, meta: Box<v1::PointMeta> },
    /// Forget the open point; no answer.
    Abort { vm: VmId, point: PointId },
    /// How the VM's protection is doing, for whoever looks at the site; no answer.
    Report { vm: VmId, report: VmReport },
    /// How the site's copy of an image differs from ours. Answer: `Compared`, once or (while the site reads) more often.
    Compare { vm: VmId, question: Question },
    /// Where the guest is, from version 4 on: said before the first point of a session, and when it changes. `Here` asks
    /// for the right to write the VM's history; answer: `Vm`, or `VmRefused`. To the others there is none.
    Place { vm: VmId, place: Place },
    /// The VMs that this host has; after the greeting, and whenever that changes. From version 5 on. Answer: `Assign` for
    /// each that a group of the site protects.
    Inventory { vms: Vec<Offered> },
    /// How the VM's part in a cut stands; answers a `Cut`. From version 5 on.
    Part { vm: VmId, cut: CutId, part: Part },
    /// All frames (numbers `0..frames`) are on their way; commit once they are there. From version 5 on.
    /// Answer: `Durable`, or `PointRefused`.
    End { vm: VmId, point: PointId, frames: u32, meta: Box<PointMeta> },
    /// "I am here, and write the VM's history under this generation." `no` is echoed. From version 7 on. Answer: `Alive`, or
    /// none where the site promises nothing.
    Alive { vm: VmId, generation: Generation, no: u64 },
}

impl AgentMessage {
    /// The same in words that a site understands which speaks version 4 or older.
    pub fn before_version_5(self) -> Self {
        match self {
            Self::End { vm, point, frames, meta } => {
                Self::EndV1 { vm, point, frames, meta: Box::new((*meta).into()) }
            }
            other => other,
        }
    }
}

/// Where a guest is, as the agent of a host says that is told to protect it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// It runs on this host; `migrated`: it came in by a live migration, so it runs nowhere else.
    Here { migrated: bool },
    /// It does not run on this host.
    NotHere,
    /// It was migrated away from this host, and runs on another one.
    Left,
}

/// Site → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SiteMessage {
    /// `window`: bytes of frames of one VM that may be on their way, untaken.
    Welcome {
        site: String,
        release: String,
        window: u64,
    },
    /// What the site holds of a VM.
    Vm {
        vm: VmId,
        generation: Generation,
        latest: Option<Latest>,
    },
    VmRefused {
        vm: VmId,
        refusal: Refusal,
    },
    /// The point is open; these frames of it are there already.
    Opened {
        vm: VmId,
        point: PointId,
        have: FrameRanges,
    },
    /// These frames have been verified and written (not yet synced): their room in the window is free again.
    Taken {
        vm: VmId,
        point: PointId,
        frames: FrameRanges,
    },
    /// The point is committed and synced: it survives a power cut from here on.
    Durable {
        vm: VmId,
        point: PointId,
        seq: Seq,
        committed_at: UnixMs,
        manifest: Digest,
    },
    PointRefused {
        vm: VmId,
        point: PointId,
        refusal: Refusal,
    },
    Compared {
        vm: VmId,
        answer: Answer,
    },
    /// A group protects the VM so; `None`: no group does (any more). To agents that have the VM. From version 5 on.
    Assign {
        vm: VmId,
        assignment: Option<Assignment>,
    },
    /// An order of a cut of several VMs, or of the last one before a planned failover. From version 5 on.
    Cut {
        vm: VmId,
        cut: CutId,
        order: CutOrder,
    },
    /// The VM was handed over to this agent, which may go on under this generation although it has seen an older one: it
    /// remembers it and says `Watch` again. From version 5 on.
    Adopt {
        vm: VmId,
        generation: Generation,
    },
    /// The site will not fail the VM over by itself for so long, counted from when `Alive` with this number was heard. From
    /// version 7 on.
    Alive {
        vm: VmId,
        no: u64,
        for_ms: u32,
    },
}

/// What a site promises each time that it hears an agent; never changed by configuration.
pub const PROMISE_MS: u32 = 15_000;

impl SiteMessage {
    /// The same in words that an agent understands which speaks version 4 or older.
    pub fn before_version_5(self) -> Self {
        match self {
            Self::Adopt { vm, generation } => {
                Self::VmRefused { vm, refusal: Refusal::Fenced { current: generation } }
            }
            other => other,
        }
    }

    /// The same in words that an agent understands which speaks version 3 or older.
    pub fn before_version_4(self) -> Self {
        match self {
            Self::VmRefused { vm, refusal } => Self::VmRefused { vm, refusal: refusal.before_version_4() },
            Self::PointRefused { vm, point, refusal } => {
                Self::PointRefused { vm, point, refusal: refusal.before_version_4() }
            }
            other => other,
        }
    }

    /// The VM that it is about, if it is about one.
    pub fn vm(&self) -> Option<VmId> {
        match self {
            Self::Welcome { .. } => None,
            Self::Vm { vm, .. }
            | Self::VmRefused { vm, .. }
            | Self::Opened { vm, .. }
            | Self::Taken { vm, .. }
            | Self::Durable { vm, .. }
            | Self::PointRefused { vm, .. }
            | Self::Compared { vm, .. }
            | Self::Assign { vm, .. }
            | Self::Cut { vm, .. }
            | Self::Adopt { vm, .. }
            | Self::Alive { vm, .. } => Some(*vm),
        }
    }
}

/// The newest durable point of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latest {
    pub point: PointId,
    pub seq: Seq,
    pub cut_at: UnixMs,
    pub committed_at: UnixMs,
}

/// Why the site will not, told to be acted on and to be shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The VM was failed over: another generation writes its history now.
    #[error(
        "this VM was failed over at the site (generation {current}); this copy must not run on as the primary"
    )]
    Fenced { current: Generation },
    #[error("the site's store is full: {detail}")]
    SiteFull { detail: String },
    /// The site's newest point is another than the point's parent: start again from what the site holds.
    #[error("the site's newest point is not the one this delta was made over")]
    WrongParent { latest: Option<PointId> },
    /// The point was not open, or the site has lost what it had of it (it was restarted).
    #[error("the site does not know this point (any more)")]
    UnknownPoint,
    /// What was sent is not what the protocol allows.
    #[error("the site could not accept what was sent: {detail}")]
    Invalid { detail: String },
    #[error("the site could not store it: {detail}")]
    Internal { detail: String },
    /// Another agent writes this VM's history, and nothing shows that the guest moved here. From version 4 on.
    #[error("{why}")]
    HeldElsewhere { why: String },
}

impl Refusal {
    fn before_version_4(self) -> Self {
        match self {
            Self::HeldElsewhere { why } => Self::Invalid { detail: why },
            other => other,
        }
    }
}

/// How the protection of one VM is doing, as its agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmReport {
    pub state: VmState,
    /// Why it is in this state, in words, where there is something to say.
    pub reason: Option<String>,
    pub interval_ms: u64,
    /// The memory engine at work and why it was chosen; `None` while unknown.
    pub memory: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Waiting for the link, or for the site's answer.
    Connecting,
    /// The first point is on its way.
    Seeding,
    Protected,
    /// Points are missed or late; `reason` says why.
    Degraded,
    /// The VM is not running; nothing changes.
    NotRunning,
    /// The VM can't be protected as it is configured.
    Refused,
    /// The site was failed over; this copy is no longer the primary.
    Fenced,
    /// What the site holds is being compared with the guest, so that only differences travel.
    Comparing,
    /// Somebody else needs the guest's QEMU, or asked the agent to keep aside; `reason` says who.
    Yielding,
    /// The guest was migrated to another host, whose agent protects it. From version 4 on.
    Moved,
}

impl VmState {
    /// What a site is told that does not know the state.
    pub fn before_version_4(self) -> Self {
        if self == Self::Moved { Self::NotRunning } else { self }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Seeding => "seeding",
            Self::Protected => "protected",
            Self::Degraded => "degraded",
            Self::NotRunning => "not-running",
            Self::Refused => "refused",
            Self::Fenced => "fenced",
            Self::Comparing => "comparing",
            Self::Yielding => "yielding",
            Self::Moved => "moved",
        }
    }
}

#[cfg(test)]
mod tests;
