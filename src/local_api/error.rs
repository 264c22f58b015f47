//! An error as it travels from a daemon to whoever asked it: `{"error": {"code", "what", "why", "what_to_do"}}`.

use crate::error::chain;
use axum::{
    Json,
    response::{IntoResponse, Response},
};
use hyper::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::error::Error;

/// What went wrong: `code` for programs, the rest for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{what}{}", because(why.as_deref()))]
pub struct ErrorBody {
    /// Stable, in kebab-case: `unknown-vm`.
    pub code: String,
    /// What was not done, or is not so.
    pub what: String,
    /// What that comes from, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What would help, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what_to_do: Option<String>,
}

/// What an error says, in two parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    pub what: String,
    pub why: Option<String>,
}

impl Words {
    /// An error, and what caused it.
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        let what = error.to_string();
        let why =
            chain(error).strip_prefix(&what).and_then(|rest| rest.strip_prefix(": ")).map(str::to_owned);
        Self { what, why }
    }
}

impl From<String> for Words {
    fn from(what: String) -> Self {
        Self { what, why: None }
    }
}

impl From<&str> for Words {
    fn from(what: &str) -> Self {
        what.to_owned().into()
    }
}

fn because(why: Option<&str>) -> String {
    why.map(|why| format!(": {why}")).unwrap_or_default()
}

/// What a handler answers when it can't do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{body}")]
pub struct ApiError {
    pub status: StatusCode,
    pub body: ErrorBody,
}

/// How an error looks on the wire: the body of every answer that is not 2xx, and the last line of a stream that failed.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Error")]
pub struct Envelope {
    pub error: ErrorBody,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &str, words: impl Into<Words>) -> Self {
        let Words { what, why } = words.into();
        Self { status, body: ErrorBody { code: code.into(), what, why, what_to_do: None } }
    }
    /// There is no such thing.
    pub fn not_found(code: &str, words: impl Into<Words>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, words)
    }
    /// What was asked makes no sense, whatever the state.
    pub fn bad_request(code: &str, words: impl Into<Words>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, words)
    }
    /// It makes sense, but not in the present state.
    pub fn conflict(code: &str, words: impl Into<Words>) -> Self {
        Self::new(StatusCode::CONFLICT, code, words)
    }
    pub fn internal(words: impl Into<Words>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", words)
    }
    /// What would help.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.body.what_to_do = Some(hint.into());
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Envelope { error: self.body.clone() })).into_response();
        // For whoever hands it on and wants to know.
        response.extensions_mut().insert(self.body);
        response
    }
}
