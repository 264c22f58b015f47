//! The auditor's report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/report`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct ReportQuery {
    /// A group, with its VMs, or a VM; without it all there are.
    pub name: Option<String>,
    /// How far back: `30d`, which it is unless said otherwise, or a time.
    pub since: Option<String>,
}
