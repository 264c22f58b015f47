//! The agent's end: connecting to a site. Promises: a connection that is returned has been admitted by the site, which
//! was checked against the authority the agent enrolled with; every failure names its remedy by its kind.

use super::{
    connection::Connection, error::TransportError, pki::AgentIdentity, settings::TransportSettings, tls,
    version::ProtocolVersion,
};
use quinn::crypto::rustls::QuicClientConfig;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// Connects to the site at `address` (`host:port`), trying each address that the name has.
pub async fn dial(
    address: &str,
    identity: &AgentIdentity,
    settings: &TransportSettings,
) -> Result<Connection, TransportError> {
    dial_speaking(address, tls::agent(identity, tls::spoken())?, settings).await
}

/// The same with any TLS configuration.
pub(super) async fn dial_speaking(
    address: &str,
    tls: Arc<QuicClientConfig>,
    settings: &TransportSettings,
) -> Result<Connection, TransportError> {
    let (connection, socket) = connect(address, tls, settings).await?;
    let version = tls::agreed_alpn(&connection).and_then(|alpn| ProtocolVersion::from_alpn(&alpn));
    let version = version.ok_or_else(TransportError::version_mismatch)?;
    let greeted = tokio::time::timeout(settings.connect_timeout, greeting(&connection)).await;
    greeted.unwrap_or_else(|_| Err(unreachable(address, io::ErrorKind::TimedOut.into())))?;
    Ok(Connection::new(connection, version, Some(socket)))
}

/// A handshake with the first address that answers. The client's certificate may still be refused.
pub(super) async fn connect(
    address: &str,
    tls: Arc<QuicClientConfig>,
    settings: &TransportSettings,
) -> Result<(quinn::Connection, quinn::Endpoint), TransportError> {
    let name = host_of(address).ok_or_else(|| {
        let why = format!("`{address}` is no address; write HOST:PORT");
        unreachable(address, io::Error::new(io::ErrorKind::InvalidInput, why))
    })?;
    let found = tokio::net::lookup_host(address).await.map_err(|source| unreachable(address, source))?;
    let mut last = unreachable(address, io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for target in found {
        match connect_to(target, name, tls.clone(), settings).await {
            Ok(connected) => return Ok(connected),
            Err(TransportError::Lost { why }) => {
                last = unreachable(address, io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Err(TransportError::Unreachable { source, .. }) => last = unreachable(address, source),
            // Somebody answered, and would not have us: another address of the same site won't either.
            Err(other) => return Err(other),
        }
    }
    Err(last)
}

async fn connect_to(
    target: SocketAddr,
    name: &str,
    tls: Arc<QuicClientConfig>,
    settings: &TransportSettings,
) -> Result<(quinn::Connection, quinn::Endpoint), TransportError> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let local = SocketAddr::new(any, 0);
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = quinn::Endpoint::new(settings.endpoint(), None, settings.socket(local)?, runtime)
        .map_err(|source| TransportError::Listen { address: local, source })?;
    let mut config = quinn::ClientConfig::new(tls);
    config.transport_config(settings.dialling());
    let connecting = endpoint.connect_with(config, target, name).map_err(|error| {
        unreachable(&target.to_string(), io::Error::new(io::ErrorKind::InvalidInput, error))
    })?;
    match tokio::time::timeout(settings.connect_timeout, connecting).await {
        Ok(connected) => Ok((connected?, endpoint)),
        Err(_) => Err(unreachable(&target.to_string(), io::ErrorKind::TimedOut.into())),
    }
}

/// The site's first stream says that it has admitted us. Without it, a client learns that its certificate was refused
/// only from a later failure, since TLS 1.3 lets it go ahead before the server has looked.
async fn greeting(connection: &quinn::Connection) -> Result<(), TransportError> {
    let mut stream = connection.accept_uni().await?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting).await?;
    if &greeting == GREETING { Ok(()) } else { Err(TransportError::protocol("the site's greeting is none")) }
}

/// What a site sends on its first stream to a peer that it has admitted.
pub(super) const GREETING: &[u8; 4] = b"LBOK";

/// The host of `host:port`, without the brackets of an IPv6 address.
fn host_of(address: &str) -> Option<&str> {
    let (host, port) = address.rsplit_once(':')?;
    let _: u16 = port.parse().ok()?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (!bare.is_empty()).then_some(bare)
}

fn unreachable(address: &str, source: io::Error) -> TransportError {
    TransportError::Unreachable { address: address.to_owned(), source }
}
