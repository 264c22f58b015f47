//! TLS 1.3 over TCP, under the operators' requests: the site's end and the caller's. The one home of tokio-rustls.
//! Promises: a caller sends nothing before the server has proved who it is; connecting and shaking hands end in time; a
//! peer that has gone away is noticed. Called by `local_api`.

use super::{
    error::TransportError,
    pki::{Fingerprint, PkiError, SiteIdentity, read_any_key, read_certificates},
    tls,
};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What a server shows; makes connections of those who come secure.
#[derive(Clone)]
pub struct HttpsIdentity(TlsAcceptor);

/// A connection that both ends have shaken hands on.
#[derive(Debug)]
pub struct HttpsStream(tokio_rustls::TlsStream<TcpStream>);

/// Whom a caller takes for the server that it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Whom the authorities of this machine vouch for.
    System,
    /// Whom an authority in this file (PEM) vouches for.
    Authorities(PathBuf),
    /// The server with this certificate, or one that the authority with this certificate vouches for.
    Fingerprint(Fingerprint),
}

/// What a caller shows to a server that wants a certificate: PEM files, the certificate's with its chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallerFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Connects to one server, as often as it is asked to.
#[derive(Clone)]
pub struct HttpsDialer {
    /// `HOST:PORT`
    address: String,
    name: ServerName<'static>,
    connector: TlsConnector,
    /// Read anew for each connection: it may have been renewed.
    caller: Option<(Trust, CallerFiles)>,
}

impl HttpsIdentity {
    /// The site's own certificate.
    pub fn of_site(identity: &SiteIdentity) -> Result<Self, TransportError> {
        let config = tls::https_server(identity.chain(), PrivateKeyDer::Pkcs8(identity.key()))?;
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// A certificate that somebody else made: PEM files, the certificate's with its chain.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, TransportError> {
        let chain = read_certificates(certificate, "it is what `[api]` in site.toml names")?;
        let key = read_any_key(key, "it is what `[api]` in site.toml names")?;
        Ok(Self(TlsAcceptor::from(Arc::new(tls::https_server(chain, key)?))))
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<HttpsStream> {
        let _ = notice_silence(&stream);
        let _ = stream.set_nodelay(true);
        match timeout(HANDSHAKE, self.0.accept(stream)).await {
            Ok(accepted) => Ok(HttpsStream(accepted?.into())),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl HttpsDialer {
    /// To `HOST:PORT`; `own` is shown to a server that wants a certificate.
    pub fn new(address: &str, trust: &Trust, own: Option<&CallerFiles>) -> Result<Self, TransportError> {
        let bad = || PkiError::BadName {
            given: address.escape_debug().take(80).collect(),
            why: "is no address; write HOST:PORT",
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
        let host = host.strip_prefix('[').and_then(|v6| v6.strip_suffix(']')).unwrap_or(host);
        port.parse::<u16>().map_err(|_| bad())?;
        let name = ServerName::try_from(host.to_owned()).map_err(|_| bad())?;
        let connector = connector(trust, own)?;
        let caller = own.map(|files| (trust.clone(), files.clone()));
        Ok(Self { address: address.to_owned(), name, connector, caller })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub(crate) async fn connect(&self) -> Result<HttpsStream, TransportError> {
        let unreachable = |source| TransportError::Unreachable { address: self.address.clone(), source };
        let connected = timeout(CONNECT, TcpStream::connect(&self.address)).await;
        let stream =
            connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(unreachable)?;
        notice_silence(&stream).map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let renewed = self.caller.as_ref().map(|(trust, files)| connector(trust, Some(files))).transpose()?;
        let connector = renewed.as_ref().unwrap_or(&self.connector);
        let shaken = timeout(HANDSHAKE, connector.connect(self.name.clone(), stream)).await;
        match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => Ok(HttpsStream(stream.into())),
            Err(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(refused) => Err(TransportError::Certificate { why: refused.to_string() }),
                None => Err(unreachable(error)),
            },
        }
    }
}

fn connector(trust: &Trust, files: Option<&CallerFiles>) -> Result<TlsConnector, TransportError> {
    let named = "it is what the configuration names as ours";
    let shown = files.map(|files| {
        Ok::<_, PkiError>((read_certificates(&files.certificate, named)?, read_any_key(&files.key, named)?))
    });
    let shown = shown.transpose()?;
    let config = match trust {
        Trust::System => {
            let authorities = read_certificates(Path::new(SYSTEM), "give --ca or --fingerprint")?;
            tls::https_client(authorities, shown)
        }
        Trust::Authorities(file) => {
            tls::https_client(read_certificates(file, "it was given as the authority's")?, shown)
        }
        Trust::Fingerprint(pinned) => tls::https_client_pinned(*pinned),
    }?;
    Ok(TlsConnector::from(Arc::new(config)))
}

impl std::fmt::Debug for HttpsDialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HttpsDialer({})", self.address)
    }
}

/// Asks the kernel to look whether the peer is still there: work may take long, and say nothing meanwhile.
fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &30)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &10)?;
    setsockopt(stream, sockopt::TcpKeepCount, &6)?;
    Ok(())
}

impl AsyncRead for HttpsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for HttpsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

const CONNECT: Duration = Duration::from_secs(10);
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Where Debian and others keep the authorities that a machine trusts.
const SYSTEM: &str = "/etc/ssl/certs/ca-certificates.crt";
