//! The audit log: as it lies on disk, and as it is asked for.

use crate::api::role::Role;
use lifeboat::units::UnixMs;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuditLine {
    /// It is about to be done; or it was refused, and the end stands in it.
    Call(AuditRow),
    /// How it ended.
    End { id: String, end: AuditEnd },
}

/// A call that changes something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditRow {
    pub id: String,
    pub at: UnixMs,
    /// `uid 0` of the socket, `token NAME (ID)` of the network.
    pub who: String,
    pub role: Role,
    /// `socket`, or the address.
    pub from: String,
    pub method: String,
    /// As the API's document has it.
    pub route: String,
    /// As it was asked: with what it is about.
    pub path: String,
    /// What was asked for; of a large request its size alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<serde_json::Value>,
    /// Missing while it is under way, and for ever if the controller went away meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<AuditEnd>,
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditEnd {
    pub at: UnixMs,
    /// What was asked has been done.
    pub done: bool,
    /// The error's code otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what: Option<String>,
}

/// `GET /v1/audit`
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct AuditQuery {
    /// `2h ago` or a time; without it as far back as there is something.
    pub since: Option<String>,
    /// The newest so many; 1000 unless said otherwise, 10000 at the most.
    pub limit: Option<usize>,
}

/// The answer, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct AuditList {
    pub calls: Vec<AuditRow>,
}
