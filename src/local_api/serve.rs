//! The daemon's end of the socket. Promises: the socket appears with its final mode, never wider; a file left by a
//! daemon that died is replaced, one of a daemon that lives is not.

use super::error::{ApiError, Envelope};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::connect_info::Connected,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
    serve::IncomingStream,
};
use futures_util::stream;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::StatusCode;
use serde::Serialize;
use std::{
    fs::{self, Permissions},
    io,
    net::SocketAddr,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{net::UnixListener, sync::mpsc};

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another daemon is alive; two must not do the same work.
    #[error("another daemon answers on {path} already; stop it first", path = path.display())]
    AlreadyRunning { path: PathBuf },
    /// Not ours to remove.
    #[error("{path} exists and is no socket; remove it or give another path", path = path.display())]
    InTheWay { path: PathBuf },
    #[error("{path}: {step} failed", path = path.display())]
    Socket {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// Where a request comes from; every request bears it, as `ConnectInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Through the daemon's socket, from a process of this user.
    Local { uid: Option<u32> },
    /// Over the network. Nothing is known of whoever it is.
    Network { from: SocketAddr },
}

impl Connected<IncomingStream<'_, UnixListener>> for Origin {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::Local { uid: stream.io().peer_cred().ok().map(|peer| peer.uid()) }
    }
}

/// A bound socket, not serving yet. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct LocalListener {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl LocalListener {
    /// Takes the socket at `path`; `mode` says who may use it (`0o600`: the owner, `0o660`: the group too).
    /// Must be called within a tokio runtime.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, ServeError> {
        let failed = |step| move |source| ServeError::Socket { path: path.to_owned(), step, source };
        check_free(path)?;
        // Made under another name and moved into place, so that nobody gets in before the mode is set.
        let mut draft = path.as_os_str().to_owned();
        draft.push(format!(".{}", std::process::id()));
        let draft = SocketFile(draft.into());
        let _ = fs::remove_file(&draft.0);
        let listener = UnixListener::bind(&draft.0).map_err(failed("bind"))?;
        fs::set_permissions(&draft.0, Permissions::from_mode(mode)).map_err(failed("set the mode"))?;
        fs::rename(&draft.0, path).map_err(failed("move into place"))?;
        Ok(Self { listener, file: SocketFile(path.to_owned()) })
    }

    /// Serves until `shutdown`, then lets requests under way finish for a few seconds.
    pub async fn serve(
        self,
        router: Router,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServeError> {
        let Self { listener, file } = self;
        let router = router.fallback(async || ApiError::not_found("unknown-request", "no such request"));
        let (asked, stop) = tokio::sync::oneshot::channel::<()>();
        let shutdown = async move {
            shutdown.await;
            // Nobody waits for it any more only if serving has ended already.
            let _ = asked.send(());
        };
        let service = router.into_make_service_with_connect_info::<Origin>();
        let served = axum::serve(listener, service).with_graceful_shutdown(shutdown);
        let deadline = async move {
            if stop.await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(DRAIN).await;
        };
        tokio::select! {
            served = served.into_future() => {
                served.map_err(|source| ServeError::Socket { path: file.0.clone(), step: "serve", source })
            }
            () = deadline => Ok(()),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A draft has been moved away by then; a socket that is gone already is no loss.
        let _ = fs::remove_file(&self.0);
    }
}

/// A request's body, which must not be larger than `max` and must have come `within` that time.
pub async fn whole_body(body: Body, max: usize, within: Duration) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(within, Limited::new(body, max).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too-large",
            format!("the request has more than {max} bytes"),
        )),
        Ok(Err(error)) => {
            Err(ApiError::bad_request("bad-request", format!("the request broke off: {error}")))
        }
        Err(_) => {
            let message = format!("the request was not whole after {} s", within.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "too-slow", message))
        }
    }
}

/// Progress as it happens: each item is a line of JSON, an error is the last one.
pub fn ndjson<T: Serialize + Send + 'static>(items: mpsc::Receiver<Result<T, ApiError>>) -> Response {
    let lines = stream::unfold(items, |mut items| async move {
        let line = match items.recv().await? {
            Ok(item) => serde_json::to_vec(&item),
            Err(error) => serde_json::to_vec(&Envelope { error: error.body }),
        };
        let line = line.map_err(io::Error::from).map(|mut line| {
            line.push(b'\n');
            Bytes::from(line)
        });
        Some((line, items))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// Refuses a path at which somebody answers, or where something other than a socket lies.
fn check_free(path: &Path) -> Result<(), ServeError> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ServeError::Socket { path: path.to_owned(), step: "look", source }),
    };
    if !there.file_type().is_socket() {
        return Err(ServeError::InTheWay { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(ServeError::AlreadyRunning { path: path.to_owned() }),
        Err(source) => Err(ServeError::Socket { path: path.to_owned(), step: "ask who answers", source }),
    }
}

/// How long requests under way may go on after a stop was asked for.
pub(super) const DRAIN: Duration = Duration::from_secs(5);
