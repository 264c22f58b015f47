//! How a daemon talks with its command line: JSON over HTTP/1 on a unix socket. One home of axum's server and hyper's client.
//! Promises: who may talk is decided by the socket's file mode; a daemon never takes the socket of another that is
//! alive; every error reaches the operator with a code, words and, where there is one, a hint.
//! Called by both daemons (`serve`) and by the commands (`client`).

pub mod client;
pub mod error;
pub mod serve;

pub use client::{Client, ClientError, Lines};
pub use error::{ApiError, ErrorBody};
pub use serve::{LocalListener, ServeError, ndjson};

#[cfg(test)]
mod tests;
