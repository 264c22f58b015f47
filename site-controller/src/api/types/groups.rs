//! Protection groups.

use crate::drill::LastDrill;
use crate::{
    group::{Group, GroupSpec, coordinator::Progress, points::GroupPoint},
    readiness::Verdict,
};
use lifeboat::{id::VmId, units::UnixMs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/groups/{group}`, and each of `GET /v1/groups`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GroupRow {
    pub group: Group,
    pub now: UnixMs,
    pub state: GroupState,
    /// Whether a failover would work, as it was seen last; `None` as long as nobody has looked.
    pub readiness: Option<Verdict>,
    /// Why it is in this state, where there is something to say.
    pub reason: Option<String>,
    /// Age of the newest group point, milliseconds.
    pub rpo_ms: Option<u64>,
    /// What it should be at the most.
    pub rpo_target_ms: u64,
    /// Group points there are.
    pub points: u64,
    pub newest: Option<GroupPoint>,
    /// How cuts have gone since the controller was started.
    pub cuts: Progress,
    /// How the last failover for trial went.
    #[serde(default)]
    pub last_drill: Option<LastDrill>,
    /// How it stands with a failover by itself: why it is not begun, or what is being done.
    #[serde(default)]
    pub automatic: Option<String>,
}

/// How a group is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GroupState {
    /// Its newest point is younger than its RPO.
    Protected,
    /// There is no point yet.
    Seeding,
    /// There is a point, and it is older than it should be.
    Late,
    Paused,
}

/// `POST /v1/groups`, and `POST /v1/groups/{group}` to change one.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GroupRequest {
    pub spec: GroupSpec,
}

/// `GET /v1/groups/{group}/points`, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct GroupPointList {
    pub group: String,
    pub points: Vec<GroupPoint>,
}

/// `GET /v1/inventory`: the VMs that connected hosts have.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct InventoryList {
    pub vms: Vec<InventoryRow>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct InventoryRow {
    pub vm: VmId,
    pub name: String,
    pub agent: String,
    pub running: bool,
    pub group: Option<String>,
}
