//! TLS 1.3 with mutual certificates. The one home of rustls' configuration.
//! Promises: a handshake always checks certificates afresh (no resumption, no early data), so that an expired one never
//! gets in; a client's certificate may be absent, since enrolment has none, but never wrong.

use super::{
    error::TransportError,
    pki::{AgentIdentity, Fingerprint, SiteIdentity},
    version::{ENROL_ALPN, ProtocolVersion},
};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use std::sync::Arc;

/// What a site shows and takes: agents with a certificate, and strangers who come to enrol.
pub fn site(identity: &SiteIdentity) -> Result<Arc<QuicServerConfig>, TransportError> {
    let provider = provider();
    let roots = Arc::new(trusting(identity.authority())?);
    let agents = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(unusable)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(agents)
        .with_single_cert(identity.chain(), PrivateKeyDer::Pkcs8(identity.key()))
        .map_err(unusable)?;
    config.alpn_protocols = spoken();
    config.alpn_protocols.push(ENROL_ALPN.to_vec());
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    QuicServerConfig::try_from(config).map(Arc::new).map_err(unusable)
}

/// What an enrolled agent shows and takes: only the site whose authority it enrolled with.
pub fn agent(identity: &AgentIdentity, alpn: Vec<Vec<u8>>) -> Result<Arc<QuicClientConfig>, TransportError> {
    let config = client()?
        .with_root_certificates(trusting(identity.authority())?)
        .with_client_auth_cert(identity.chain(), PrivateKeyDer::Pkcs8(identity.key()))
        .map_err(unusable)?;
    finish(config, alpn)
}

/// What an agent that is not enrolled yet takes: the site whose authority has this fingerprint.
pub fn newcomer(authority: Fingerprint) -> Result<Arc<QuicClientConfig>, TransportError> {
    let config = client()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority { authority, provider: provider() }))
        .with_no_client_auth();
    finish(config, vec![ENROL_ALPN.to_vec()])
}

/// What a site shows to operators: its own certificate, or the one that they have for it. Callers show none.
pub fn https_server(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, TransportError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![HTTP_ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A certificate with its chain, and the key to it.
pub type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// What an operator's command takes: a server that one of these authorities vouches for. What is `shown` to a server that asks
/// for a certificate: nothing, by an operator.
pub fn https_client(
    authorities: Vec<CertificateDer<'static>>,
    shown: Option<Shown>,
) -> Result<ClientConfig, TransportError> {
    let mut roots = RootCertStore::empty();
    // A system's list may hold some of a kind that is not understood; those vouch for nobody.
    if roots.add_parsable_certificates(authorities).0 == 0 {
        return Err(TransportError::Certificate { why: "none of the authorities can be used".into() });
    }
    let config = client()?.with_root_certificates(roots);
    let config = match shown {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).map_err(unusable)?,
        None => config.with_no_client_auth(),
    };
    Ok(speaking_http(config))
}

/// What an operator's command takes that was told a fingerprint: the server's own certificate, or its authority's.
pub fn https_client_pinned(pinned: Fingerprint) -> Result<ClientConfig, TransportError> {
    let verifier =
        PinnedServer { pinned, authority: PinnedAuthority { authority: pinned, provider: provider() } };
    let config =
        client()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
    Ok(speaking_http(config))
}

/// A peer that has neither a certificate nor a wish to enrol; for tests of what a site does with it.
#[cfg(test)]
pub fn stranger(authority: &CertificateDer<'static>, alpn: Vec<Vec<u8>>) -> Arc<QuicClientConfig> {
    let config = client().unwrap().with_root_certificates(trusting(authority).unwrap()).with_no_client_auth();
    finish(config, alpn).unwrap()
}

/// The replication protocols of this release, newest first.
pub fn spoken() -> Vec<Vec<u8>> {
    ProtocolVersion::SPOKEN.iter().map(|version| version.alpn()).collect()
}

/// The protocol that both sides settled on.
pub fn agreed_alpn(connection: &quinn::Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// The certificates that the peer showed, its own first.
pub fn peer_chain(connection: &quinn::Connection) -> Option<Vec<CertificateDer<'static>>> {
    connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok().map(|chain| *chain)
}

/// Checks that `own` was issued by `authority` for a client; what an agent does before it keeps a certificate.
pub fn check_issued(
    authority: &CertificateDer<'static>,
    own: &CertificateDer<'_>,
) -> Result<(), TransportError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(trusting(authority)?), provider());
    let verifier = verifier.build().map_err(unusable)?;
    verifier.verify_client_cert(own, &[], UnixTime::now()).map(|_| ()).map_err(unusable)
}

/// Trusts a chain if it holds the authority with the pinned fingerprint, and then only what that authority signed.
#[derive(Debug)]
struct PinnedAuthority {
    authority: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let pinned = others.iter().find(|other| Fingerprint::of(other) == self.authority);
        let pinned = pinned.ok_or(TlsError::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| TlsError::General(error.to_string()))?
            .verify_server_cert(own, &[], name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _own: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, own, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Trusts the certificate with the pinned fingerprint, whatever name it is for; else what the pinned authority signed.
#[derive(Debug)]
struct PinnedServer {
    pinned: Fingerprint,
    authority: PinnedAuthority,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        if Fingerprint::of(own) == self.pinned {
            return Ok(ServerCertVerified::assertion());
        }
        self.authority.verify_server_cert(own, others, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.authority.verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.authority.verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.supported_verify_schemes()
    }
}

fn speaking_http(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![HTTP_ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config
}

fn client() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TransportError> {
    ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).map_err(unusable)
}

fn finish(mut config: ClientConfig, alpn: Vec<Vec<u8>>) -> Result<Arc<QuicClientConfig>, TransportError> {
    config.alpn_protocols = alpn;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map(Arc::new).map_err(unusable)
}

fn trusting(authority: &CertificateDer<'static>) -> Result<RootCertStore, TransportError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).map_err(unusable)?;
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn unusable(error: impl std::error::Error) -> TransportError {
    TransportError::Certificate { why: error.to_string() }
}

const HTTP_ALPN: &[u8] = b"http/1.1";
