//! What a caller may do.

use serde::{Deserialize, Serialize};

/// Each may do what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Look.
    Viewer,
    /// Act on VMs: fail over, prune, drill.
    Operator,
    /// Everything, what concerns other callers included.
    Admin,
}
