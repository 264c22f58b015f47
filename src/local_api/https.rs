//! The daemon's end of the network: the same requests over TLS. Promises: what a stranger can have the daemon hold is
//! bounded (connections, of one address and of all; bytes of a request's head), and so is the time it may take to shake
//! hands, to send a head, and to take what it was sent. Who may ask what is for the router to say; it finds the caller's
//! address as [`Origin`].

use super::{
    error::ApiError,
    serve::{DRAIN, Origin, ServeError},
};
use crate::transport::https::{HttpsIdentity, HttpsStream};
use axum::{Router, extract::ConnectInfo};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, Sleep, sleep, timeout},
};

/// What a stranger may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections of all, and of one address.
    pub connections: usize,
    pub of_one_address: usize,
    /// A request's head must have come after so long; an idle connection is closed then.
    pub head: Duration,
    /// A caller that takes nothing of what it was sent for so long is cut off.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            of_one_address: 64,
            head: Duration::from_secs(10),
            stall: Duration::from_secs(60),
        }
    }
}

/// A bound port, not serving yet.
pub struct HttpsListener {
    listener: TcpListener,
    identity: HttpsIdentity,
    pub limits: Limits,
}

impl HttpsListener {
    pub async fn bind(address: SocketAddr, identity: HttpsIdentity) -> Result<Self, ServeError> {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| ServeError::Listen { address, source })?;
        Ok(Self { listener, identity, limits: Limits::default() })
    }

    pub fn local_address(&self) -> Result<SocketAddr, ServeError> {
        let address = SocketAddr::from(([0, 0, 0, 0], 0));
        self.listener.local_addr().map_err(|source| ServeError::Listen { address, source })
    }

    /// Serves until `shutdown`, then lets requests under way finish for a few seconds.
    pub async fn serve(self, router: Router, shutdown: impl Future<Output = ()> + Send) {
        let router = router.fallback(async || ApiError::not_found("unknown-request", "no such request"));
        let (order, stop) = watch::channel(());
        let mut shutdown = std::pin::pin!(shutdown);
        let (open, mut connections) = (Open::default(), JoinSet::new());
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = &mut shutdown => break,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Too many open files, say: it passes, or it is told again.
                    tracing::warn!(%error, "the API can't take a connection");
                    sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            match open.enter(from.ip(), &self.limits) {
                Some(entered) => {
                    let (identity, router) = (self.identity.clone(), router.clone());
                    let serving = connection(identity, stream, from, router, self.limits, stop.clone());
                    connections.spawn(async move {
                        serving.await;
                        drop(entered);
                    });
                }
                None => tracing::debug!(%from, "too many connections to the API"),
            }
        }
        drop(self.listener);
        drop(order);
        let _ = timeout(DRAIN, async { while connections.join_next().await.is_some() {} }).await;
    }
}

async fn connection(
    identity: HttpsIdentity,
    stream: TcpStream,
    from: SocketAddr,
    router: Router,
    limits: Limits,
    mut stop: watch::Receiver<()>,
) {
    let stream = match identity.accept(stream).await {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(%from, %error, "no handshake with a caller of the API"),
    };
    let router = router.layer(axum::Extension(ConnectInfo(Origin::Network { from })));
    let mut serving = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX)
            .serve_connection(
                TokioIo::new(Impatient::new(stream, limits.stall)),
                TowerToHyperService::new(router)
            )
    );
    let served = tokio::select! {
        served = &mut serving => served,
        // Its sender says nothing, and is dropped.
        _ = stop.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%from, %error, "a connection to the API was broken off");
    }
}

/// Which addresses have how many connections.
#[derive(Clone, Default)]
struct Open(Arc<Mutex<HashMap<IpAddr, usize>>>);

struct Entered {
    open: Open,
    address: IpAddr,
}

impl Open {
    fn enter(&self, address: IpAddr, limits: &Limits) -> Option<Entered> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = open.values().sum();
        let own = open.get(&address).copied().unwrap_or(0);
        if all >= limits.connections || own >= limits.of_one_address {
            return None;
        }
        open.insert(address, own + 1);
        Some(Entered { open: self.clone(), address })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut open = self.open.0.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get_mut(&self.address) {
            Some(own) if *own > 1 => *own -= 1,
            _ => {
                open.remove(&self.address);
            }
        }
    }
}

/// A stream whose peer must take what it is sent: it may wait, but not for ever.
struct Impatient {
    stream: HttpsStream,
    stall: Duration,
    deadline: Pin<Box<Sleep>>,
    waiting: bool,
}

impl Impatient {
    fn new(stream: HttpsStream, stall: Duration) -> Self {
        Self { stream, stall, deadline: Box::pin(sleep(stall)), waiting: false }
    }

    fn impatiently<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = false;
            return polled;
        }
        if !self.waiting {
            self.waiting = true;
            self.deadline.as_mut().reset(Instant::now() + self.stall);
        }
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.impatiently(context, polled)
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.impatiently(context, polled)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(context);
        self.impatiently(context, polled)
    }
}

/// Of a request's head: lines, and bytes.
const HEADERS_MAX: usize = 64;
const HEAD_MAX: usize = 32 << 10;

#[cfg(test)]
mod tests;
