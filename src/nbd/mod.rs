//! A small NBD client: reads exports of QEMU's NBD server over a unix stream, many requests in flight.
//! Owns the protocol: fixed newstyle handshake, structured replies, meta contexts. Promises: whatever the server says is
//! bounded and checked before it is believed; a read returns every byte that was asked for or an error; a server that
//! falls silent is given up after [`REPLY_WITHIN`]. Called by the agent's `capture::disk`, and for [`ImageFile`]s,
//! which bring a server of their own. The protocol is described in nbd/doc/proto.md.

mod client;
mod handshake;
mod image_file;
mod reply;
#[cfg(test)]
mod tests;

pub use client::{Client, PendingRead, Span};
pub use image_file::{Beside, ImageFile, ImageFileError, REGION};
use std::{io, sync::Arc, time::Duration};

/// Bytes of one request at the most: what every NBD server takes.
pub const REQUEST_MAX: u32 = 32 << 20;
/// Bytes of one question for block status at the most. The protocol gives them 32 bits.
pub const STATUS_SPAN_MAX: u32 = 2 << 30;
/// The context that tells what is zero.
pub const ALLOCATION: &str = "base:allocation";
/// Flag of `base:allocation`: nothing is allocated here (what is read may still come from a backing file).
pub const STATE_HOLE: u32 = 1;
/// Flag of `base:allocation`: reads as zeros.
pub const STATE_ZERO: u32 = 2;
/// Flag of `qemu:dirty-bitmap:…`: written since the bitmap was begun.
pub const STATE_DIRTY: u32 = 1;

/// The handshake must be done within this time.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Each reply must be complete within this time of being waited for.
pub const REPLY_WITHIN: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, thiserror::Error)]
pub enum NbdError {
    /// The connection ended or failed; every request in flight is lost with it.
    #[error("the NBD connection was lost while {step}")]
    Lost {
        step: &'static str,
        #[source]
        source: Arc<io::Error>,
    },
    /// The server broke the protocol; the connection can't be used any more.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server does not know the export or will not serve it as we need it.
    #[error("the NBD server refused {what}: {reason}")]
    Refused { what: String, reason: String },
    /// The server could not do one request; the connection is still good.
    #[error("the NBD server failed a request: error {errno} {message}")]
    Failed { errno: u32, message: String },
    /// No answer in time.
    #[error("the NBD server gave no answer within {} s while {step}", after.as_secs())]
    Silent { step: &'static str, after: Duration },
    /// Our own mistake: a request outside of the export, empty, or larger than [`REQUEST_MAX`] or [`STATUS_SPAN_MAX`].
    #[error("a request of {len} bytes at {offset} does not fit an export of {size} bytes")]
    OutOfRange { offset: u64, len: u32, size: u64 },
}

impl NbdError {
    /// A connection that failed while `step`.
    pub fn lost(step: &'static str, source: io::Error) -> Self {
        Self::Lost { step, source: Arc::new(source) }
    }
}
