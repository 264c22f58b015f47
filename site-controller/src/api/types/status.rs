//! The site and its VMs.

use super::GroupRow;
use crate::{catalog::PointSummary, failover::journal::Record, intake::board::Seen, readiness::Verdict};
use lifeboat::{
    id::VmId,
    units::{Generation, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/status`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SiteStatus {
    pub site: String,
    pub release: String,
    pub now: UnixMs,
    /// Free bytes where points are stored, and the reserve below which no more are taken.
    pub store_free_bytes: u64,
    pub store_reserve_bytes: u64,
    /// When the site's certificate expires.
    pub certificate_expires: UnixMs,
    /// Connections that were turned away since the start.
    pub refused_connections: u64,
    pub vms: Vec<VmRow>,
    pub groups: Vec<GroupRow>,
    /// What was found wrong when the store was opened, and has not been mended.
    pub findings: Vec<String>,
}

/// One VM: what the store holds, what its agent says, and whether it was failed over.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct VmRow {
    pub vm: VmId,
    pub name: String,
    pub generation: Generation,
    pub points: u64,
    pub damaged_points: u64,
    pub stored_bytes: u64,
    pub latest: Option<PointSummary>,
    /// When the oldest point was cut.
    pub oldest: Option<UnixMs>,
    /// Layers of the point that has most.
    pub layers: u32,
    /// Why nothing of the VM is folded or pruned, if so.
    pub frozen: Option<String>,
    /// Age of the newest durable point, milliseconds; 0 while the VM is off and that point is of its disks as they stand.
    pub rpo_ms: Option<u64>,
    pub agent: Option<Seen>,
    /// Whether a failover would work, as it was seen last.
    pub readiness: Option<Verdict>,
    pub failover: Option<Record>,
}

/// `POST /v1/vms/{vm}/release`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Released {
    pub vm: VmId,
    pub name: String,
    /// The agent that had it so far, if one had.
    pub agent: Option<String>,
}
