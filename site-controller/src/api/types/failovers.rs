//! Failovers.

use crate::{catalog::PointSummary, failover::journal::Record};
use lifeboat::id::VmId;
use serde::{Deserialize, Serialize};

/// `POST /v1/failovers`; answered by lines of `failover::progress::Progress`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailoverRequest {
    /// Name or UUID.
    pub vm: String,
    /// `latest`, the beginning of a point's id, or a time.
    pub point: String,
    /// A replica whose memory does not go on is not booted instead.
    #[serde(default)]
    pub no_cold_boot: bool,
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
