//! Failovers.

use crate::{
    catalog::PointSummary,
    failover::{journal::Record, placing::Foreseen},
};
use lifeboat::{id::VmId, units::UnixMs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `POST /v1/failovers`; answered by lines of `failover::progress::Progress`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct FailoverRequest {
    /// Name or UUID.
    pub vm: String,
    /// `latest`, the beginning of a point's id, or a time.
    pub point: String,
    /// Do not run `fence_command`: the source is known to be off.
    #[serde(default)]
    pub skip_fence_command: bool,
    /// A replica whose memory does not go on is not booted instead.
    #[serde(default)]
    pub no_cold_boot: bool,
    /// The replica of a VM that was off is started all the same.
    #[serde(default)]
    pub start: bool,
}

/// `POST /v1/failovers/preview`: what a failover now would mean.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct FailoverPreview {
    pub vm: VmId,
    pub name: String,
    pub point: PointSummary,
    /// Age of the point: everything since then is lost. 0 where the VM is off and the point is of its disks as they stand.
    pub lost_ms: u64,
    /// The VM was off: its replica is defined, and not started.
    #[serde(default)]
    pub left_off: bool,
    /// The source's agent is connected now: the source may well be alive.
    pub source_connected: bool,
    pub source_agent: Option<String>,
    /// A failover that was begun and not finished; asking again goes on with it.
    pub unfinished: Option<Record>,
    /// What the runbook says of its addresses here.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Where the site has several hosts, which is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Foreseen>,
}

/// `POST /v1/undos`; answered by lines of `failover::progress::Progress`. `POST /v1/undos/preview`: what it would mean.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct UndoRequest {
    /// A group, or a VM that is in none.
    pub name: String,
    /// `latest`, the beginning of an id, or a time.
    pub point: String,
}

/// `POST /v1/undos/preview`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct UndoPreview {
    pub name: String,
    pub members: Vec<String>,
    /// The point that it goes on from.
    pub cut_at: UnixMs,
    /// For how long the replicas have run: what they did is set aside. `None`: they don't.
    pub ran_ms: Option<u64>,
    /// When it is too late.
    pub open_until: Option<UnixMs>,
    /// Until when the replicas' disks are kept.
    pub kept_until: UnixMs,
}

/// `POST /v1/group-failovers`; answered by lines of `failover::progress::Progress`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GroupFailoverRequest {
    /// A group's name or id; of a planned one also a VM's that is in no group.
    pub name: String,
    /// The sources stand first, and nothing is lost; otherwise they are given up.
    pub planned: bool,
    /// Of an emergency: `latest`, the beginning of a group point's id, or a time.
    pub point: String,
    /// Do not run `fence_command`: the sources are known to be off.
    #[serde(default)]
    pub skip_fence_command: bool,
}

/// `POST /v1/group-failovers/preview`: what it would mean.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GroupFailoverPreview {
    pub name: String,
    pub planned: bool,
    pub members: Vec<String>,
    /// In the order in which they start: each row once all rows before it are up.
    pub starts: Vec<Vec<String>>,
    /// Of an emergency.
    pub cut_at: Option<UnixMs>,
    /// Age of the point: everything since then is lost. A planned one loses nothing.
    pub lost_ms: u64,
    /// Of an emergency: members that were off, whose replicas are defined and not started.
    #[serde(default)]
    pub left_off: Vec<String>,
    /// Members whose hosts are connected now: of an emergency, sources that may well be alive; a planned one needs all.
    pub reached: Vec<String>,
    /// What the runbook says of addresses here, by member.
    #[serde(default)]
    pub addresses: BTreeMap<String, Vec<String>>,
    /// Where the site has several hosts, which are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Foreseen>,
    /// All that the runbook does, in its order, in words.
    #[serde(default)]
    pub steps: Vec<String>,
}

/// `POST /v1/drills`; answered by lines of `failover::progress::Progress`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct DrillRequest {
    /// A group, or a VM.
    pub name: String,
    /// `latest`, the beginning of a point's id, or a time.
    pub point: String,
    /// The replicas run on until `POST /v1/drills/{drill}/end`.
    #[serde(default)]
    pub keep: bool,
}
