//! Tokens of the API.

use crate::api::role::Role;
use lifeboat::units::UnixMs;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `POST /v1/tokens`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct TokenRequest {
    /// 1 to 63 of `a-z 0-9 - _ .`; the audit log names its holder so.
    pub name: String,
    pub role: Role,
    /// How long it holds; without it, until it is revoked.
    pub valid_ms: Option<u64>,
}

/// The answer: the only time that the token is shown.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
pub struct TokenCreated {
    /// What goes into `Authorization: Bearer`.
    pub token: String,
    pub row: TokenRow,
}

/// A token as the site knows it; the token itself can't be had from it. Each of `GET /v1/tokens`, and the answer of
/// `POST /v1/tokens/{token}/revoke`, where `{token}` is a name or an id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenRow {
    pub name: String,
    /// The first digits of its digest: never the same for two tokens that had one name.
    pub id: String,
    pub role: Role,
    pub created_at: UnixMs,
    /// Who made it.
    pub created_by: String,
    /// After this it is good for nothing.
    pub expires_at: Option<UnixMs>,
}
