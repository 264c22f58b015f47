//! How a daemon talks with its command line: JSON over HTTP/1 on a unix socket, and over TLS ([`https`]) where a site's
//! operators or another site ask from elsewhere. One home of axum's server and hyper's client.
//! Promises: on the socket, who may talk is decided by its file mode; over TLS a caller knows the server before it sends
//! anything, and strangers are bounded; a daemon never takes the socket of another that is alive; every error reaches the
//! operator with a code, words and, where there is one, a hint.
//! Called by both daemons (`serve`, `https`) and by whoever asks them (`client`).

pub mod client;
pub mod error;
pub mod https;
pub mod serve;

pub use client::{Access, Client, ClientError, Lines};
pub use error::{ApiError, Envelope, ErrorBody, Words};
pub use https::HttpsListener;
pub use serve::{LocalListener, Origin, ServeError, ndjson, whole_body};

#[cfg(test)]
mod tests;
