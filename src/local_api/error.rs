//! An error as it travels from a daemon to its command line: `{"error": {"code", "message", "hint"}}`.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use hyper::StatusCode;
use serde::{Deserialize, Serialize};

/// What went wrong: `code` for programs, `message` and `hint` for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    /// Stable, in kebab-case: `unknown-vm`.
    pub code: String,
    pub message: String,
    /// What would help, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// What a handler answers when it can't do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{body}")]
pub struct ApiError {
    pub status: StatusCode,
    pub body: ErrorBody,
}

/// How an error looks on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Envelope {
    pub error: ErrorBody,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self { status, body: ErrorBody { code: code.into(), message: message.into(), hint: None } }
    }
    /// There is no such thing.
    pub fn not_found(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }
    /// What was asked makes no sense, whatever the state.
    pub fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }
    /// It makes sense, but not in the present state.
    pub fn conflict(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
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
