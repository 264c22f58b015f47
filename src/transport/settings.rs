//! How the link is tuned: windows, datagram sizes, time-outs, socket buffers.
//! Promises: what a peer may make us hold is bounded by these windows, and is far less before it proved who it is.

use super::{error::TransportError, pki::SiteIdentity};
use aws_lc_rs::hmac;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::{
    EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt,
    congestion::{BbrConfig, CubicConfig},
};
use quinn_proto::HashedConnectionIdGenerator;
use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

/// Which congestion controller paces the sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// The default: shares a link fairly with what else runs there, and is what quinn tests best. quinn's BBR is
    /// declared experimental.
    #[default]
    Cubic,
    /// For long links that lose packets at random, where Cubic backs off without need.
    Bbr,
}

#[derive(Clone, Debug)]
pub struct TransportSettings {
    /// Bytes of one stream that a receiver lets a sender have on the way.
    pub stream_window: u32,
    /// The same, of one connection.
    pub receive_window: u32,
    /// Bytes that a sender keeps until they are acknowledged. All three must exceed bandwidth × round-trip time.
    pub send_window: u32,
    /// Wanted size of the socket's buffers, each way.
    pub socket_buffer: usize,
    /// Bytes of payload in the first datagrams: 1200 passes everywhere, more only where the operator knows the path.
    pub initial_mtu: u16,
    /// Datagrams grow up to this where the path lets them pass; capped at [`MTU_MAX`].
    pub mtu_upper_bound: u16,
    pub keep_alive: Duration,
    /// A link that is silent for so long is lost.
    pub idle_timeout: Duration,
    /// How long to wait for the other side while connecting.
    pub connect_timeout: Duration,
    pub congestion: Congestion,
}

impl Default for TransportSettings {
    fn default() -> Self {
        Self {
            stream_window: 16 << 20,
            receive_window: 32 << 20,
            send_window: 32 << 20,
            socket_buffer: 8 << 20,
            initial_mtu: 1200,
            mtu_upper_bound: MTU_MAX,
            keep_alive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(10),
            congestion: Congestion::Cubic,
        }
    }
}

/// Streams that an admitted peer may have open at once.
pub(super) const DATA_STREAMS_MAX: u32 = 64;
pub(super) const CONTROL_STREAMS_MAX: u32 = 4;

/// Largest datagram ever tried: quinn hands ten of them to the kernel in one send (GSO), which takes 64 KiB at most and
/// drops a larger send without a word.
pub const MTU_MAX: u16 = 6500;

impl TransportSettings {
    /// For the side that dials: it has checked the site's certificate before any stream is there.
    pub(super) fn dialling(&self) -> Arc<TransportConfig> {
        let mut config = self.shared();
        config.receive_window(self.receive_window.into());
        config.max_concurrent_uni_streams(DATA_STREAMS_MAX.into());
        config.max_concurrent_bidi_streams(CONTROL_STREAMS_MAX.into());
        Arc::new(config)
    }

    /// For the side that listens: little is taken from a peer until [`Self::admit`].
    pub(super) fn listening(&self) -> Arc<TransportConfig> {
        let mut config = self.shared();
        config.receive_window(STRANGER_WINDOW);
        config.max_concurrent_uni_streams(0u32.into());
        config.max_concurrent_bidi_streams(1u32.into());
        Arc::new(config)
    }

    /// Opens the windows for a peer that has proved who it is.
    pub(super) fn admit(&self, connection: &quinn::Connection) {
        connection.set_receive_window(self.receive_window.into());
        connection.set_max_concurrent_uni_streams(DATA_STREAMS_MAX.into());
        connection.set_max_concurrent_bi_streams(CONTROL_STREAMS_MAX.into());
    }

    /// For the side that dials.
    pub(super) fn endpoint(&self) -> EndpointConfig {
        self.sized(EndpointConfig::default())
    }

    /// For the side that listens. What it says of connections that it does not know (any more) is derived from its
    /// identity and not drawn anew at each start: so agents learn at their next word that the site was restarted, and
    /// dial again, rather than after the idle time-out.
    pub(super) fn listening_endpoint(&self, identity: &SiteIdentity) -> EndpointConfig {
        let reset = hmac::Key::new(hmac::HMAC_SHA256, &identity.derived(b"lifeboat/1 stateless reset"));
        let [a, b, c, d, e, f, g, h, ..] = identity.derived(b"lifeboat/1 connection ids");
        let ids = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let mut config = EndpointConfig::new(Arc::new(reset));
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        self.sized(config)
    }

    fn sized(&self, mut config: EndpointConfig) -> EndpointConfig {
        // Also told to the peer, whose search for the path's MTU ends here.
        if config.max_udp_payload_size(MTU_MAX).is_err() {
            tracing::debug!("datagrams stay at quinn's default size");
        }
        config
    }

    /// A bound socket with large buffers, as far as the kernel grants them.
    pub(super) fn socket(&self, address: SocketAddr) -> Result<UdpSocket, TransportError> {
        let socket = UdpSocket::bind(address).map_err(|source| TransportError::Listen { address, source })?;
        let wanted = self.socket_buffer;
        // The forced variants go beyond net.core.[rw]mem_max, and need CAP_NET_ADMIN.
        if setsockopt(&socket, sockopt::SndBufForce, &wanted).is_err() {
            let _ = setsockopt(&socket, sockopt::SndBuf, &wanted);
        }
        if setsockopt(&socket, sockopt::RcvBufForce, &wanted).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &wanted);
        }
        let granted = getsockopt(&socket, sockopt::RcvBuf).unwrap_or(0);
        if granted < wanted {
            tracing::info!(granted, wanted, "small receive buffer; raise net.core.rmem_max for fast links");
        }
        Ok(socket)
    }

    fn shared(&self) -> TransportConfig {
        let upper_bound = self.mtu_upper_bound.clamp(1200, MTU_MAX);
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(upper_bound);
        let mut config = TransportConfig::default();
        // A time-out that does not fit its 62 bits would be one of millions of years.
        let idle = quinn::IdleTimeout::try_from(self.idle_timeout).ok();
        config
            .stream_receive_window(self.stream_window.into())
            .send_window(self.send_window.into())
            .initial_mtu(self.initial_mtu.clamp(1200, upper_bound))
            .mtu_discovery_config(Some(mtu))
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(idle)
            .enable_segmentation_offload(true)
            .datagram_receive_buffer_size(None);
        match self.congestion {
            Congestion::Cubic => config.congestion_controller_factory(Arc::new(CubicConfig::default())),
            Congestion::Bbr => config.congestion_controller_factory(Arc::new(BbrConfig::default())),
        };
        config
    }
}

/// Bytes taken from a peer that has not proved who it is; an enrolment needs less than 4 KiB.
const STRANGER_WINDOW: VarInt = VarInt::from_u32(32 << 10);
