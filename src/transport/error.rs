//! What can go wrong on the link, told by what to do about it, and the codes with which a side turns the other away.
//! Promises: nothing that a peer wrote reaches a log or a screen unescaped or unbounded.

use super::{pki::PkiError, version::ProtocolVersion};
use crate::format::frame::FrameError;
use quinn::{ConnectionError, ReadError, ReadExactError, WriteError};
use std::{fmt, io, net::SocketAddr};

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Nobody answers there (yet): try again, later and later.
    #[error("{address} can't be reached")]
    Unreachable {
        address: String,
        #[source]
        source: io::Error,
    },
    /// This machine would not give us the socket: an operator frees the address or gives another.
    #[error("can't listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// The other side turned us away and said why; the code tells whether trying again makes sense.
    #[error("refused by the other side ({code}): {reason}")]
    Refused { code: RefusalCode, reason: String },
    /// A certificate is expired, unknown or for another name; only an operator can mend it.
    #[error("certificate refused: {why}")]
    Certificate { why: String },
    /// No protocol version is spoken by both sides: upgrade the older one. `theirs` where it is known.
    #[error("no protocol version in common: this side speaks {ours}, the other {}", theirs.as_deref().unwrap_or("none of them"))]
    VersionMismatch { ours: String, theirs: Option<String> },
    /// The link was there and is gone: dial again.
    #[error("connection lost: {why}")]
    Lost { why: &'static str },
    /// The other side sent what no release of ours sends; the connection is of no use.
    #[error("protocol violated: {0}")]
    Protocol(String),
    #[error("protocol violated: a data stream held {0}")]
    Frame(#[from] FrameError),
    /// Our own certificates can't be used.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

impl TransportError {
    /// Whether dialling again, with back-off, may help without anybody doing something first.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Lost { .. } => true,
            Self::Refused { code, .. } => code.is_transient(),
            Self::Listen { .. }
            | Self::Certificate { .. }
            | Self::VersionMismatch { .. }
            | Self::Protocol(_)
            | Self::Frame(_)
            | Self::Pki(_) => false,
        }
    }

    pub(super) fn version_mismatch() -> Self {
        Self::VersionMismatch { ours: ProtocolVersion::spoken(), theirs: None }
    }
    pub(super) fn protocol(what: impl fmt::Display) -> Self {
        Self::Protocol(printable(what.to_string().as_bytes()))
    }
}

/// Why a connection, a stream or an enrolment was turned away. Numbers are part of the protocol and never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct RefusalCode(pub u32);

macro_rules! refusal_codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $words:literal;)*) => {
        impl RefusalCode {
            $($(#[$doc])* pub const $name: Self = Self($number);)*
        }
        impl fmt::Display for RefusalCode {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$name => f.write_str($words),)*
                    Self(number) => write!(f, "code {number}"),
                }
            }
        }
    };
}

refusal_codes! {
    /// Not a refusal: the work is done.
    DONE = 0, "done";
    NO_CERTIFICATE = 1, "no certificate";
    /// Too much at once; come again later.
    BUSY = 2, "busy";
    STOPPING = 3, "stopping";
    /// What was sent breaks the protocol.
    PROTOCOL = 4, "protocol error";
    /// The certificate is good, its holder may not do this.
    FORBIDDEN = 5, "forbidden";
    /// A newer connection of the same agent took this one's place.
    REPLACED = 6, "replaced by a newer connection";
    TOKEN_UNKNOWN = 16, "unknown token";
    TOKEN_USED = 17, "token already used";
    TOKEN_EXPIRED = 18, "token expired";
    TOKEN_OTHER_NAME = 19, "token made out to another name";
    INTERNAL = 32, "internal error";
}

impl RefusalCode {
    pub fn is_transient(self) -> bool {
        matches!(self, Self::DONE | Self::BUSY | Self::STOPPING | Self::REPLACED | Self::INTERNAL)
    }
    pub(super) fn varint(self) -> quinn::VarInt {
        quinn::VarInt::from_u32(self.0)
    }
    fn from_varint(code: quinn::VarInt) -> Self {
        Self(u32::try_from(code.into_inner()).unwrap_or(u32::MAX))
    }
}

impl fmt::Debug for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RefusalCode({}, {self})", self.0)
    }
}

/// Bytes that a peer chose, made fit for a log line.
pub(super) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(REASON_MAX)]);
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl From<ConnectionError> for TransportError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::VersionMismatch => Self::version_mismatch(),
            ConnectionError::TransportError(error) => match tls_alert(error.code) {
                Some(NO_APPLICATION_PROTOCOL) => Self::version_mismatch(),
                Some(alert) if is_about_certificates(alert) => {
                    Self::Certificate { why: printable(error.reason.as_bytes()) }
                }
                Some(_) | None => Self::protocol(error),
            },
            ConnectionError::ConnectionClosed(close) => match tls_alert(close.error_code) {
                Some(NO_APPLICATION_PROTOCOL) => Self::version_mismatch(),
                Some(alert) if is_about_certificates(alert) => {
                    Self::Certificate { why: alert_words(alert).into() }
                }
                Some(_) => Self::protocol(close),
                None if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED => Self::Refused {
                    code: RefusalCode::BUSY,
                    reason: "it takes no more connections at present".into(),
                },
                None if close.error_code == quinn::TransportErrorCode::NO_ERROR => {
                    Self::Lost { why: "closed by the other side" }
                }
                None => Self::protocol(close),
            },
            ConnectionError::ApplicationClosed(close) => match RefusalCode::from_varint(close.error_code) {
                RefusalCode::DONE => Self::Lost { why: "closed by the other side" },
                code => Self::Refused { code, reason: printable(&close.reason) },
            },
            ConnectionError::Reset => Self::Lost { why: "the other side was restarted" },
            ConnectionError::TimedOut => Self::Lost { why: "nothing heard from the other side for too long" },
            ConnectionError::LocallyClosed => Self::Lost { why: "closed on this side" },
            ConnectionError::CidsExhausted => Self::Lost { why: "out of connection ids" },
        }
    }
}

impl From<ReadError> for TransportError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Refused {
                code: RefusalCode::from_varint(code),
                reason: "it broke off the stream it was sending".into(),
            },
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                Self::Lost { why: "the stream was closed on this side" }
            }
        }
    }
}

impl From<ReadExactError> for TransportError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => {
                Self::protocol("a stream ended in the middle of what it carried")
            }
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

impl From<WriteError> for TransportError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Refused {
                code: RefusalCode::from_varint(code),
                reason: "it takes nothing more of this stream".into(),
            },
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                Self::Lost { why: "the stream was closed on this side" }
            }
        }
    }
}

/// The TLS alert within a QUIC error code (RFC 9001, 4.8).
fn tls_alert(code: quinn::TransportErrorCode) -> Option<u8> {
    u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())
}

fn is_about_certificates(alert: u8) -> bool {
    matches!(alert, 42..=46 | 48 | 49 | 51 | 116)
}

fn alert_words(alert: u8) -> &'static str {
    match alert {
        43 => "the other side says that ours is of a kind it does not take",
        44 => "the other side says that ours is revoked",
        45 => "the other side says that ours has expired (or a clock is wrong)",
        48 => {
            "the other side does not know the authority that signed ours; was this agent enrolled at this site?"
        }
        116 => "the other side wants one and we showed none",
        _ => "the other side does not accept ours",
    }
}

const NO_APPLICATION_PROTOCOL: u8 = 120;
/// Bytes of a peer's words that are kept.
const REASON_MAX: usize = 300;
