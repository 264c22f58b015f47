//! The asking end: of a socket on this machine, or over TLS. Promises: a token is sent to nobody but the server that is
//! meant; answers are bounded in size; a daemon that is not there is told from
//! one that refuses, each with what to do about it.

use super::error::{Envelope, ErrorBody};
use crate::transport::{
    TransportError,
    https::{CallerFiles, HttpsDialer, Trust},
};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header, header::HeaderValue,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fmt, io,
    marker::PhantomData,
    path::{Path, PathBuf},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{daemon} does not answer on {path}; is it running? (systemctl status {daemon})", path = path.display())]
    NotRunning {
        daemon: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("you may not use {path}; run this as root or as a member of the socket's group", path = path.display())]
    Denied {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{given} is no address of an API; write https://HOST:PORT")]
    BadAddress { given: String },
    #[error("the token {why}")]
    BadToken { why: &'static str },
    #[error("{address} can't be asked")]
    NoLink {
        address: String,
        #[source]
        source: TransportError,
    },
    /// The daemon understood and would not.
    #[error("{error}")]
    Api { status: StatusCode, error: ErrorBody },
    /// The daemon went away in the middle of an answer.
    #[error("{daemon} broke off its answer; see its log (journalctl -u {daemon})")]
    BrokenOff {
        daemon: &'static str,
        #[source]
        source: hyper::Error,
    },
    #[error("{daemon} answered what this command can't read; are both of the same release?")]
    Unreadable {
        daemon: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("{daemon} answered more than {limit} bytes")]
    TooLong { daemon: &'static str, limit: usize },
    /// The command asked for something that is no request.
    #[error("can't ask for `{path}`")]
    BadRequest {
        path: String,
        #[source]
        source: hyper::http::Error,
    },
}

impl ClientError {
    /// The daemon's hint, where it gave one.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Api { error, .. } => error.what_to_do.as_deref(),
            Self::NoLink { source: TransportError::Certificate { .. }, .. } => Some(
                "what answers there is not who is meant, or --ca or --fingerprint is wrong; nothing was sent to it",
            ),
            _ => None,
        }
    }
}

/// Talks with one daemon; each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    door: Door,
    daemon: &'static str,
}

/// How a daemon is asked over the network.
#[derive(Clone)]
pub struct Access {
    /// `https://HOST:PORT`
    pub url: String,
    /// Says who asks.
    pub token: String,
    /// Says who answers.
    pub trust: Trust,
}

#[derive(Clone)]
enum Door {
    Socket(PathBuf),
    Https {
        dialer: HttpsDialer,
        bearer: Option<HeaderValue>,
    },
    /// In the clear: `HOST:PORT`.
    Http {
        address: String,
    },
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Https { dialer, .. } => write!(f, "https://{}", dialer.address()),
            Self::Http { address } => write!(f, "http://{address}"),
        }
    }
}

impl Client {
    /// `daemon` is the service's name, for error messages.
    pub fn new(path: impl Into<PathBuf>, daemon: &'static str) -> Self {
        Self { door: Door::Socket(path.into()), daemon }
    }

    /// Of a daemon elsewhere. Nothing is sent yet.
    pub fn remote(access: &Access, daemon: &'static str) -> Result<Self, ClientError> {
        let bad = || ClientError::BadAddress { given: access.url.escape_debug().take(80).collect() };
        let address = access.url.trim().strip_prefix("https://").ok_or_else(bad)?.trim_end_matches('/');
        if address.contains('/') || !address.contains(':') {
            return Err(bad());
        }
        let token = access.token.trim();
        if token.is_empty() || token.len() > TOKEN_MAX || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ClientError::BadToken { why: "is no token; it is one word" });
        }
        let bearer = HeaderValue::from_str(&format!("Bearer {token}"));
        let mut bearer = bearer.map_err(|_| ClientError::BadToken { why: "can't be sent" })?;
        bearer.set_sensitive(true);
        let dialer = HttpsDialer::new(address, &access.trust, None)
            .map_err(|source| ClientError::NoLink { address: address.to_owned(), source })?;
        Ok(Self { door: Door::Https { dialer, bearer: Some(bearer) }, daemon })
    }

    /// Of a daemon that is not ours, at `http://HOST:PORT` or `https://HOST:PORT`; `ca` says who vouches for it, and `own` what
    /// it is shown.
    pub fn of_stranger(
        url: &str,
        ca: Option<&Path>,
        own: Option<&CallerFiles>,
        daemon: &'static str,
    ) -> Result<Self, ClientError> {
        let url = url.trim().trim_end_matches('/');
        let (plain, secure) = (url.strip_prefix("http://"), url.strip_prefix("https://"));
        let door = match (plain, secure) {
            (Some(address), _) if is_address(address) => Door::Http { address: address.to_owned() },
            (_, Some(address)) if is_address(address) => {
                let trust = ca.map_or(Trust::System, |ca| Trust::Authorities(ca.to_owned()));
                let dialer = HttpsDialer::new(address, &trust, own)
                    .map_err(|source| ClientError::NoLink { address: address.to_owned(), source })?;
                Door::Https { dialer, bearer: None }
            }
            _ => return Err(ClientError::BadAddress { given: url.escape_debug().take(80).collect() }),
        };
        Ok(Self { door, daemon })
    }

    /// Asks as whoever holds `token`, which is sent as it is.
    pub async fn post_as<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        token: Option<&str>,
    ) -> Result<T, ClientError> {
        let token = token.map(HeaderValue::from_str).transpose();
        let token = token.map_err(|_| ClientError::BadToken { why: "can't be sent" })?;
        let answer = self.send_as(Method::POST, path, self.json(body)?, token).await?;
        self.read(answer).await
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = self.send(Method::GET, path, Bytes::new()).await?;
        self.read(answer).await
    }

    pub async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let answer = self.send(Method::POST, path, self.json(body)?).await?;
        self.read(answer).await
    }

    /// For requests that take long: the daemon answers line by line (see [`super::ndjson`]).
    pub async fn post_stream<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<Lines<T>, ClientError> {
        let answer = self.send(Method::POST, path, self.json(body)?).await?;
        Ok(Lines {
            daemon: self.daemon,
            body: answer.into_body(),
            pending: BytesMut::new(),
            _item: PhantomData,
        })
    }

    /// The answer, if it is not an error.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let token = if let Door::Https { bearer, .. } = &self.door { bearer.clone() } else { None };
        self.send_as(method, path, body, token).await
    }

    async fn send_as(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        token: Option<HeaderValue>,
    ) -> Result<Response<Incoming>, ClientError> {
        let broken = |source| ClientError::BrokenOff { daemon: self.daemon, source };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|source| ClientError::BadRequest { path: path.to_owned(), source })?;
        if let Some(token) = token {
            request.headers_mut().insert(header::AUTHORIZATION, token);
        }
        let mut name = |address: &str| {
            if let Ok(host) = HeaderValue::from_str(address) {
                request.headers_mut().insert(header::HOST, host);
            }
        };
        let mut sender = match &self.door {
            Door::Socket(path) => speak(self.knock(path).await?).await.map_err(broken)?,
            Door::Http { address } => {
                name(address);
                let no_link = |source| TransportError::Unreachable { address: address.clone(), source };
                let stream = TcpStream::connect(address).await.map_err(no_link);
                speak(stream.map_err(|source| ClientError::NoLink { address: address.clone(), source })?)
                    .await
                    .map_err(broken)?
            }
            Door::Https { dialer, .. } => {
                let address = dialer.address().to_owned();
                name(&address);
                let stream = dialer.connect().await;
                speak(stream.map_err(|source| ClientError::NoLink { address, source })?)
                    .await
                    .map_err(broken)?
            }
        };
        let answer = sender.send_request(request).await.map_err(broken)?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = self.collect(answer.into_body()).await?;
        let error = serde_json::from_slice::<Envelope>(&text).map_or_else(
            // Refused before a handler of ours saw it; axum says why in plain text.
            |_| ErrorBody {
                code: "http".into(),
                what: format!("{status}: {}", String::from_utf8_lossy(&text).trim()),
                why: None,
                what_to_do: None,
            },
            |envelope| envelope.error,
        );
        Err(ClientError::Api { status, error })
    }

    async fn knock(&self, path: &Path) -> Result<UnixStream, ClientError> {
        UnixStream::connect(path).await.map_err(|source| {
            let (daemon, path) = (self.daemon, path.to_owned());
            match source.kind() {
                io::ErrorKind::PermissionDenied => ClientError::Denied { path, source },
                _ => ClientError::NotRunning { daemon, path, source },
            }
        })
    }

    async fn read<T: DeserializeOwned>(&self, answer: Response<Incoming>) -> Result<T, ClientError> {
        let text = self.collect(answer.into_body()).await?;
        serde_json::from_slice(&text)
            .map_err(|source| ClientError::Unreadable { daemon: self.daemon, source })
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, ClientError> {
        let daemon = self.daemon;
        match Limited::new(body, ANSWER_MAX).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) => Err(match error.downcast::<hyper::Error>() {
                Ok(source) => ClientError::BrokenOff { daemon, source: *source },
                Err(other) => {
                    debug_assert!(other.is::<LengthLimitError>());
                    ClientError::TooLong { daemon, limit: ANSWER_MAX }
                }
            }),
        }
    }

    fn json<B: Serialize>(&self, body: &B) -> Result<Bytes, ClientError> {
        let text = serde_json::to_vec(body);
        text.map(Bytes::from).map_err(|source| ClientError::Unreadable { daemon: self.daemon, source })
    }
}

fn is_address(address: &str) -> bool {
    !address.contains('/') && address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
}

/// A connection that requests can be sent on. It ends with the request; its error shows on the request too.
async fn speak(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<http1::SendRequest<Full<Bytes>>, hyper::Error> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// An answer that comes line by line.
#[derive(Debug)]
pub struct Lines<T> {
    daemon: &'static str,
    body: Incoming,
    pending: BytesMut,
    _item: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next item; `None` when the work is done. An error that the daemon tells ends it. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        let daemon = self.daemon;
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line = self.pending.split_to(end + 1);
                return self.item(&line).map(Some);
            }
            if self.pending.len() > LINE_MAX {
                return Err(ClientError::TooLong { daemon, limit: LINE_MAX });
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.pending.extend_from_slice(&data);
                    }
                }
                Some(Err(source)) => return Err(ClientError::BrokenOff { daemon, source }),
                None => return Ok(None),
            }
        }
    }

    fn item(&self, line: &[u8]) -> Result<T, ClientError> {
        if let Ok(Envelope { error }) = serde_json::from_slice(line) {
            return Err(ClientError::Api { status: StatusCode::OK, error });
        }
        serde_json::from_slice(line).map_err(|source| ClientError::Unreadable { daemon: self.daemon, source })
    }
}

/// Bytes of one answer at the most: a list of every point of a large site.
const ANSWER_MAX: usize = 64 << 20;
const LINE_MAX: usize = 1 << 20;
/// A token is shorter.
const TOKEN_MAX: usize = 512;
