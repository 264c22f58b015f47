//! One established connection, as the rooms above see it: who is at the other end, its streams, its numbers.
//! Promises: no quinn type gets out; dropping the last handle closes the connection.

use super::{
    control::{ControlRecv, ControlSend},
    data::{DataRecv, DataSend},
    error::{RefusalCode, TransportError},
    pki::{AgentName, Fingerprint},
    version::ProtocolVersion,
};
use crate::units::UnixMs;
use std::{fmt, net::SocketAddr, time::Duration};

/// An agent that has proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub agent: AgentName,
    /// Of the agent's certificate.
    pub fingerprint: Fingerprint,
    /// When that certificate expires. It is checked when connecting; a daemon that keeps links open for long asks again.
    pub certificate_expires: UnixMs,
}

/// A connection between an agent and a site. Clones are handles to the same one.
#[derive(Clone)]
pub struct Connection {
    inner: quinn::Connection,
    version: ProtocolVersion,
    /// The dialling side's socket, to wait until it has said goodbye.
    socket: Option<quinn::Endpoint>,
}

/// What the link measured so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkStats {
    pub rtt: Duration,
    /// Payload bytes of the datagrams now sent.
    pub current_mtu: u16,
    pub congestion_window: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub sent_packets: u64,
    pub lost_packets: u64,
}

impl Connection {
    pub(super) fn new(
        inner: quinn::Connection,
        version: ProtocolVersion,
        socket: Option<quinn::Endpoint>,
    ) -> Self {
        Self { inner, version, socket }
    }

    /// Opens the control stream. The other side sees it once something was sent on it.
    pub async fn open_control(&self) -> Result<(ControlSend, ControlRecv), TransportError> {
        let (send, recv) = self.inner.open_bi().await?;
        Ok((ControlSend::new(send), ControlRecv::new(recv)))
    }

    /// Waits for a control stream of the other side. Cancel-safe.
    pub async fn accept_control(&self) -> Result<(ControlSend, ControlRecv), TransportError> {
        let (send, recv) = self.inner.accept_bi().await?;
        Ok((ControlSend::new(send), ControlRecv::new(recv)))
    }

    /// Opens a data stream; waits while as many are open as the other side allows.
    pub async fn open_data(&self) -> Result<DataSend, TransportError> {
        Ok(DataSend::new(self.inner.open_uni().await?))
    }

    /// Waits for a data stream of the other side. Cancel-safe.
    pub async fn accept_data(&self) -> Result<DataRecv, TransportError> {
        Ok(DataRecv::new(self.inner.accept_uni().await?))
    }

    /// Ends the connection at once; what is not yet acknowledged may be lost.
    pub fn close(&self, code: RefusalCode, reason: &str) {
        self.inner.close(code.varint(), reason.as_bytes());
    }

    /// Ends the connection and waits, for a while at most, until the other side has been told.
    pub async fn close_and_wait(&self, code: RefusalCode, reason: &str) {
        self.close(code, reason);
        if let Some(socket) = &self.socket {
            // If it does not get through, the other side learns it from the silence.
            let _ = tokio::time::timeout(GOODBYE, socket.wait_idle()).await;
        }
    }

    /// Waits until the connection has ended, and says why it did.
    pub async fn closed(&self) -> TransportError {
        self.inner.closed().await.into()
    }

    /// Bytes that may be handed over here and not yet be acknowledged by the other side: what has not left yet can't be
    /// overtaken by anything. At least a few times [`LinkStats::congestion_window`], or the link is not filled.
    pub fn set_send_window(&self, bytes: u64) {
        self.inner.set_send_window(bytes);
    }

    pub fn version(&self) -> ProtocolVersion {
        self.version
    }
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }
    pub fn stats(&self) -> LinkStats {
        let stats = self.inner.stats();
        LinkStats {
            rtt: stats.path.rtt,
            current_mtu: stats.path.current_mtu,
            congestion_window: stats.path.cwnd,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({}, {})", self.remote_address(), self.version)
    }
}

pub(super) const GOODBYE: Duration = Duration::from_secs(2);
