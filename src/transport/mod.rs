//! The link between agents and a site: QUIC with mutual certificates, and how an agent gets its certificate. And TLS
//! under the operators' requests ([`https`]). Owns every use of quinn, rustls, rcgen and X.509; none of their types
//! appear in what others call.
//! Promises: bytes of a peer that has not proved who it is are bounded in number and never reach a room above; every
//! message and frame is bounded before it is allocated; what goes wrong is told by what to do about it.
//! Called by the agent's `ship`, the site's `intake`, `local_api`, and both daemons' start. See docs/wire-protocol.md.

pub mod connection;
pub mod control;
pub mod data;
pub mod dial;
pub mod endpoint;
pub mod enrol;
pub mod error;
pub mod https;
pub mod pki;
pub mod settings;
pub mod version;

mod refusals;
mod tls;

pub use connection::{Connection, LinkStats, Peer};
pub use control::{ControlRecv, ControlSend, Message};
pub use data::{DataRecv, DataSend, Landed};
pub use dial::dial;
pub use endpoint::{EnrolConnection, Incoming, SiteEndpoint};
pub use error::{RefusalCode, TransportError};
pub use settings::{Congestion, TransportSettings};

#[cfg(test)]
mod tests;
