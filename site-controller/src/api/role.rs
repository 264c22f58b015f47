//! What a caller may do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Each may do what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Look.
    Viewer,
    /// Act on VMs: fail over, prune, drill.
    Operator,
    /// Everything, what concerns other callers included.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

/// What was given is no role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is one of viewer, operator, admin")]
pub struct NoRole;

impl FromStr for Role {
    type Err = NoRole;
    fn from_str(given: &str) -> Result<Self, NoRole> {
        let all = [Self::Viewer, Self::Operator, Self::Admin];
        all.into_iter().find(|role| role.to_string() == given).ok_or(NoRole)
    }
}
