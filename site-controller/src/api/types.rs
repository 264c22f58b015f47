//! What the local API takes and gives. Times are milliseconds since 1970 UTC; sizes are bytes.

use crate::{catalog::PointSummary, failover::journal::Record, intake::board::Seen, verify::VerifyReport};
use lifeboat::{
    id::VmId,
    units::{Generation, UnixMs},
};
use serde::{Deserialize, Serialize};

/// `GET /v1/status`
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    /// What was found wrong when the store was opened, and has not been mended.
    pub findings: Vec<String>,
}

/// One VM: what the store holds, what its agent says, and whether it was failed over.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    /// Age of the newest durable point, milliseconds.
    pub rpo_ms: Option<u64>,
    pub agent: Option<Seen>,
    pub failover: Option<Record>,
}

/// `GET /v1/vms/{vm}/points`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointList {
    pub vm: VmId,
    pub name: String,
    pub points: Vec<PointSummary>,
    /// Of each point, in the same order.
    pub kept: Vec<Kept>,
}

/// Why a point is still there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// The rule that keeps it longest; or `newest`, `failover`, `read`, `base` (others lie over it), `no` (it goes next).
    pub why: String,
    /// Layers that make it up.
    pub layers: u32,
}

/// `GET /v1/vms/{vm}/prune`: what no rule keeps now.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PruneReport {
    pub vm: VmId,
    pub name: String,
    pub pruned: u64,
    pub folds: u64,
    pub stored_bytes_before: u64,
    pub stored_bytes: u64,
}

/// `POST /v1/vms/{vm}/release`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Released {
    pub vm: VmId,
    pub name: String,
    /// The agent that had it so far, if one had.
    pub agent: Option<String>,
}

/// `POST /v1/failovers`; answered by lines of `failover::progress::Progress`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailoverRequest {
    /// Name or UUID.
    pub vm: String,
    /// `latest`, the beginning of a point's id, or a time.
    pub point: String,
}

/// `POST /v1/failovers/preview`: what a failover now would mean.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailoverPreview {
    pub vm: VmId,
    pub name: String,
    pub point: PointSummary,
    /// Age of the point: everything since then is lost.
    pub lost_ms: u64,
    /// The source's agent is connected now: the source may well be alive.
    pub source_connected: bool,
    pub source_agent: Option<String>,
    /// A failover that was begun and not finished; asking again goes on with it.
    pub unfinished: Option<Record>,
}

/// `POST /v1/verify`; answered by lines of [`VerifyLine`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VerifyRequest {
    /// Name or UUID; all VMs where it is missing.
    pub vm: Option<String>,
}

/// One line of a verification.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum VerifyLine {
    Progress {
        done_bytes: u64,
        total_bytes: u64,
    },
    /// The last line.
    Done {
        report: VerifyReport,
    },
}
