//! Verification.

use crate::verify::VerifyReport;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `POST /v1/verify`; answered by lines of [`VerifyLine`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct VerifyRequest {
    /// Name or UUID; all VMs where it is missing.
    pub vm: Option<String>,
}

/// One line of a verification.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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
