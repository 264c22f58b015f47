//! A VM's journal.

use crate::catalog::PointSummary;
use lifeboat::id::VmId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/vms/{vm}/points`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PointList {
    pub vm: VmId,
    pub name: String,
    pub points: Vec<PointSummary>,
    /// Of each point, in the same order.
    pub kept: Vec<Kept>,
}

/// Why a point is still there.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Kept {
    /// The rule that keeps it longest; or `newest`, `failover`, `read`, `base` (others lie over it), `no` (it goes next).
    pub why: String,
    /// Layers that make it up.
    pub layers: u32,
}

/// `GET /v1/vms/{vm}/prune`: what no rule keeps now.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PrunePreview {
    pub vm: VmId,
    pub name: String,
    /// Points that would go now.
    pub going: Vec<PointSummary>,
    pub kept: u64,
    /// Points that no rule keeps, and that others still lie over.
    pub bases: u64,
    /// Why nothing may be pruned, if so.
    pub frozen: Option<String>,
}

/// `POST /v1/vms/{vm}/prune`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PruneReport {
    pub vm: VmId,
    pub name: String,
    pub pruned: u64,
    /// Of what was taken away: packs and records. Not a difference of totals: points come in and are folded meanwhile.
    pub pruned_bytes: u64,
    pub folds: u64,
    /// Of all that is kept, afterwards.
    pub stored_bytes: u64,
}
