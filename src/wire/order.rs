//! What a site orders of its agents, and what they answer: who is protected, cuts of several VMs at one instant, and the
//! last cut of a planned failover. From protocol version 5 on. Carried by the messages in [`super::message`].
//!
//! A cut of several VMs: the site says `Prepare` to each; agents begin a point, send what can be sent while the guest
//! runs, and answer `Ready`. When all are ready the site says `Stop`; agents stop their guests, answer `Stopped`, and
//! read memory, devices and marks while the others come. When all stand the site says `Go`; only then a guest goes on.
//! So there is an instant at which all of them stood. Where file systems are to be frozen, the site says `Freeze` when
//! all are ready, and `Stop` when all have answered `Frozen` (from version 6 on). A guest never waits longer than its
//! `max_pause`: it then goes on, and its agent says `Out`.
//!
//! In a final cut nobody goes on at `Go`: the guest is held. When its point is durable the agent answers `Held`, and from
//! then on only the site decides whether it goes on (`Resume`) or is shut off for good (`ShutOff`); before that, whatever
//! goes wrong, the guest goes on by itself.
//!
//! A part in a cut lasts as long as the connection in which it was asked for: an agent that connects anew has none, and the
//! site counts it out; but for one that holds its guest, which says `Held` in each new connection.

use crate::{
    id::{PointId, VmId},
    units::{Generation, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A VM that a host has, whether or not it is protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    pub vm: VmId,
    pub name: String,
    pub running: bool,
}

/// How a group has a VM protected. What it leaves open is as the host's `agent.toml` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The group's name, for status.
    pub group: String,
    /// From the start of one point to that of the next, where the site does not say when.
    pub interval_ms: u64,
    pub memory: MemoryWish,
    pub consistency: ConsistencyWish,
    /// Points are cut when the site says so, together with the other members.
    pub together: bool,
    /// No points for now.
    pub paused: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryWish {
    #[default]
    Auto,
    On,
    Off,
}

/// What a point without memory is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ConsistencyWish {
    /// As after a power cut.
    #[default]
    Crash,
    /// File systems are frozen through the guest agent for the instant of the cut.
    App,
}

/// What a cut is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CutKind {
    /// A point of a group.
    Group,
    /// The last point before a planned failover: guests do not go on after it by themselves.
    Final,
}

/// How a VM's part in a cut stands, as its agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// Everything is done that can be done while the guest runs.
    Ready,
    /// The guest stands, since `at` by the host's clock. `ran`: it ran until then.
    Stopped { at: UnixMs, ran: bool },
    /// The point is cut. `together`: the guest stood until `Go` was heard. It stood for `pause_us`.
    Cut { point: PointId, together: bool, pause_us: u64 },
    /// The VM takes no part (any more), and goes on as it was.
    Out { why: String },
    /// Of a final cut: the point is durable, and the guest stands until the site has ended it.
    Held { point: PointId },
    /// A hold is over: the guest goes on, or (`gone`) is shut off for good.
    HoldEnded { gone: bool },
    /// Its file systems are frozen, if that is wished and can be done. From version 6 on.
    Frozen,
}

/// What the site orders of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CutOrder {
    /// Begin a point, and say when everything is done that can be done while the guest runs. Whoever has not said so after
    /// `within_ms` is left out.
    Prepare { kind: CutKind, within_ms: u64 },
    /// Stop the guest now. `at` is the instant that the points of all members bear, by the site's clock.
    Stop { at: UnixMs },
    /// Nobody is waited for any more. `together`: all that were asked stand; otherwise the point is one of this VM alone.
    Go { together: bool },
    /// The cut does not come about; whoever stands goes on. Also ends a final cut that is not held yet.
    CallOff,
    /// Ends a hold: the guest goes on, under this generation, which the agent remembers first.
    Resume { generation: Generation },
    /// Ends a hold: the replicas run. The guest is shut off, and does not start by itself again.
    ShutOff { generation: Generation },
    /// All are ready: file systems are frozen now, where that is wished, until the guest goes on. `Stop` comes when all have
    /// said `Frozen`. From version 6 on.
    Freeze,
}
