//! The site's end: listening, and deciding who gets in.
//! Promises: only a peer with a valid certificate of our authority is handed out as an agent; handshakes under way,
//! enrolments and admitted-but-not-yet-taken connections are bounded; a peer that is refused costs at most a log line.

use super::{
    connection::{Connection, GOODBYE, Peer},
    dial::GREETING,
    error::{RefusalCode, TransportError},
    pki::{Facts, Fingerprint, SiteIdentity},
    refusals::Refusals,
    settings::TransportSettings,
    tls,
    version::{ENROL_ALPN, ProtocolVersion},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{JoinHandle, JoinSet},
};

/// Somebody who was let in.
#[derive(Debug)]
pub enum Incoming {
    Agent {
        peer: Peer,
        connection: Connection,
    },
    /// Has no certificate and wants one; hand it to `enrol::serve`.
    Enrolment(EnrolConnection),
}

/// A connection that may do nothing but enrol.
#[derive(Debug)]
pub struct EnrolConnection {
    pub(super) inner: quinn::Connection,
    /// Bounds how many of these there are.
    _permit: OwnedSemaphorePermit,
}

impl EnrolConnection {
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }
}

/// A listening site.
#[derive(Debug)]
pub struct SiteEndpoint {
    endpoint: quinn::Endpoint,
    admitted: mpsc::Receiver<Incoming>,
    refusals: Arc<Refusals>,
    listener: JoinHandle<()>,
}

impl SiteEndpoint {
    /// Starts to listen. Must be called within a tokio runtime.
    pub fn bind(
        address: SocketAddr,
        identity: &SiteIdentity,
        settings: &TransportSettings,
    ) -> Result<Self, TransportError> {
        let mut config = quinn::ServerConfig::with_crypto(tls::site(identity)?);
        config
            .transport_config(settings.listening())
            .max_incoming(HANDSHAKES_MAX)
            .incoming_buffer_size(INCOMING_BUFFER)
            .incoming_buffer_size_total(INCOMING_BUFFER * HANDSHAKES_MAX as u64);
        let socket = settings.socket(address)?;
        let endpoint = quinn::Endpoint::new(
            settings.listening_endpoint(identity),
            Some(config),
            socket,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(|source| TransportError::Listen { address, source })?;
        let refusals = Arc::new(Refusals::default());
        let (sender, admitted) = mpsc::channel(ADMITTED_MAX);
        let door = Door {
            settings: settings.clone(),
            refusals: refusals.clone(),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            enrolments: Arc::new(Semaphore::new(ENROLMENTS_MAX)),
            admitted: sender,
        };
        let listener = tokio::spawn(listen(endpoint.clone(), Arc::new(door)));
        Ok(Self { endpoint, admitted, refusals, listener })
    }

    /// The next peer that was let in; `None` once the endpoint is closed. Cancel-safe.
    pub async fn accept(&mut self) -> Option<Incoming> {
        self.admitted.recv().await
    }

    pub fn local_address(&self) -> Result<SocketAddr, TransportError> {
        let address = SocketAddr::from(([0, 0, 0, 0], 0));
        self.endpoint.local_addr().map_err(|source| TransportError::Listen { address, source })
    }

    /// [`Self::refused`], to be asked by somebody who does not hold the endpoint.
    pub fn refusal_counter(&self) -> impl Fn() -> u64 + Send + Sync + use<> {
        let refusals = self.refusals.clone();
        move || refusals.total()
    }

    /// Peers turned away so far.
    pub fn refused(&self) -> u64 {
        self.refusals.total()
    }

    /// Connections that exist now, admitted or not.
    pub fn open_connections(&self) -> usize {
        self.endpoint.open_connections()
    }

    /// Closes every connection and waits, for a while at most, until the peers have been told.
    pub async fn close(&mut self, code: RefusalCode, reason: &str) {
        self.admitted.close();
        self.endpoint.close(code.varint(), reason.as_bytes());
        // A peer that hears nothing learns it from the silence.
        let _ = tokio::time::timeout(GOODBYE, self.endpoint.wait_idle()).await;
    }
}

impl Drop for SiteEndpoint {
    fn drop(&mut self) {
        self.listener.abort();
        self.endpoint.close(RefusalCode::STOPPING.varint(), b"the site is stopping");
    }
}

/// What every newcomer is held against.
#[derive(Debug)]
struct Door {
    settings: TransportSettings,
    refusals: Arc<Refusals>,
    handshakes: Arc<Semaphore>,
    enrolments: Arc<Semaphore>,
    admitted: mpsc::Sender<Incoming>,
}

/// Aborting this task ends the handshakes under way with it.
async fn listen(endpoint: quinn::Endpoint, door: Arc<Door>) {
    let mut handshakes = JoinSet::new();
    loop {
        let newcomer = tokio::select! {
            newcomer = endpoint.accept() => newcomer,
            Some(_) = handshakes.join_next() => continue,
        };
        let Some(newcomer) = newcomer else { break };
        if door.is_crowded() && newcomer.may_retry() {
            // Costs us nothing to remember, and an address that was made up never comes back.
            if newcomer.retry().is_err() {
                tracing::debug!("a newcomer could not be asked to prove its address");
            }
        } else if let Ok(permit) = door.handshakes.clone().try_acquire_owned() {
            let door = door.clone();
            handshakes.spawn(async move { door.receive(newcomer, permit).await });
        } else {
            door.refusals.note(newcomer.remote_address(), &"too many handshakes at once");
            newcomer.refuse();
        }
    }
}

impl Door {
    fn is_crowded(&self) -> bool {
        self.handshakes.available_permits() < HANDSHAKES_MAX / 2
    }

    async fn receive(&self, newcomer: quinn::Incoming, _permit: OwnedSemaphorePermit) {
        let from = newcomer.remote_address();
        let received = tokio::time::timeout(HANDSHAKE_TIME, self.examine(newcomer)).await;
        let why: TransportError = match received {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => TransportError::Lost { why: "it did not finish its handshake" },
        };
        self.refusals.note(from, &why);
    }

    async fn examine(&self, newcomer: quinn::Incoming) -> Result<(), TransportError> {
        let connection = newcomer.accept()?.await?;
        let alpn = tls::agreed_alpn(&connection).unwrap_or_default();
        let incoming = if alpn == ENROL_ALPN {
            let Ok(permit) = self.enrolments.clone().try_acquire_owned() else {
                return Err(turn_away(&connection, RefusalCode::BUSY, "too many enrolments at once"));
            };
            Incoming::Enrolment(EnrolConnection { inner: connection, _permit: permit })
        } else {
            let Some(version) = ProtocolVersion::from_alpn(&alpn) else {
                return Err(turn_away(&connection, RefusalCode::PROTOCOL, "no protocol agreed"));
            };
            let Some(peer) = identify(&connection) else {
                let reason = "show a certificate of this site; enrol this agent first";
                return Err(turn_away(&connection, RefusalCode::NO_CERTIFICATE, reason));
            };
            self.settings.admit(&connection);
            let mut stream = connection.open_uni().await?;
            stream.write_all(GREETING).await?;
            // It can't have ended yet: nobody else knows it.
            let _ = stream.finish();
            Incoming::Agent { peer, connection: Connection::new(connection, version, None) }
        };
        // It fails only when the endpoint is being closed, which closes this connection too.
        let _ = self.admitted.send(incoming).await;
        Ok(())
    }
}

/// Who the peer is. Its certificate was verified in the handshake, if it showed one.
fn identify(connection: &quinn::Connection) -> Option<Peer> {
    let chain = tls::peer_chain(connection)?;
    let own = chain.first()?;
    let facts = Facts::read(own)?;
    let agent = facts.common_name.parse().ok()?;
    Some(Peer { agent, fingerprint: Fingerprint::of(own), certificate_expires: facts.expires })
}

fn turn_away(connection: &quinn::Connection, code: RefusalCode, reason: &'static str) -> TransportError {
    connection.close(code.varint(), reason.as_bytes());
    TransportError::Refused { code, reason: reason.into() }
}

/// Handshakes under way at once.
pub(super) const HANDSHAKES_MAX: usize = 64;
/// Enrolments under way at once.
const ENROLMENTS_MAX: usize = 8;
/// Connections that were let in and wait to be taken.
const ADMITTED_MAX: usize = 16;
/// Bytes buffered for a newcomer before its handshake begins.
const INCOMING_BUFFER: u64 = 16 << 10;
/// A peer that takes longer is not trying.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
