//! A daemon's port and those who come to it: with the right certificate or the wrong one, fast or slow, few or many.

use super::*;
use crate::{
    clock::SystemClock,
    local_api::{Access, Client, ClientError, ndjson},
    transport::{
        TransportError,
        https::{HttpsDialer, Trust},
        pki::{Fingerprint, SiteIdentity},
    },
};
use axum::{
    Extension, Json,
    http::HeaderMap,
    response::Response,
    routing::{get, post},
};
use std::path::Path;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{mpsc, oneshot},
};

fn identity(dir: &Path, names: &[&str]) -> SiteIdentity {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    SiteIdentity::create(dir, "dr", &names, &SystemClock).unwrap()
}

async fn who(
    Extension(ConnectInfo(origin)): Extension<ConnectInfo<Origin>>,
    headers: HeaderMap,
) -> Json<String> {
    let Origin::Network { from } = origin else { panic!("{origin:?}") };
    Json(format!("{} {}", from.ip(), headers["authorization"].to_str().unwrap()))
}

/// Never stops by itself.
async fn flood() -> Response {
    let (send, items) = mpsc::channel(1);
    tokio::spawn(async move { while send.send(Ok("x".repeat(60_000))).await.is_ok() {} });
    ndjson(items)
}

struct Port {
    address: SocketAddr,
    identity: SiteIdentity,
    dir: tempfile::TempDir,
    _stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<()>,
}

async fn port(limits: Limits) -> Port {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(&dir.path().join("site"), &["127.0.0.1"]);
    let shown = HttpsIdentity::of_site(&identity).unwrap();
    let mut listener = HttpsListener::bind("127.0.0.1:0".parse().unwrap(), shown).await.unwrap();
    listener.limits = limits;
    let address = listener.local_address().unwrap();
    let router = Router::new().route("/who", get(who)).route("/flood", post(flood));
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(listener.serve(router, async move {
        let _ = stopped.await;
    }));
    Port { address, identity, dir, _stop: stop, served }
}

impl Port {
    fn client(&self, trust: Trust) -> Client {
        let access = Access { url: format!("https://{}", self.address), token: "secret".into(), trust };
        Client::remote(&access, "the daemon").unwrap()
    }

    async fn raw(&self) -> HttpsStream {
        let trust = Trust::Fingerprint(self.identity.fingerprint());
        HttpsDialer::new(&self.address.to_string(), &trust, None).unwrap().connect().await.unwrap()
    }
}

/// What comes until the other end closes.
async fn to_the_end(stream: &mut HttpsStream) -> String {
    let mut text = Vec::new();
    let read = timeout(Duration::from_secs(30), stream.read_to_end(&mut text)).await;
    let _ = read.expect("the other end closes");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn the_token_goes_to_the_server_that_is_meant_and_to_no_other() {
    let port = port(Limits::default()).await;
    let ca = port.dir.path().join("site/ca.pem");
    let own: Fingerprint = port.identity.own_fingerprint();
    for trust in [
        Trust::Authorities(ca.clone()),
        Trust::Fingerprint(port.identity.fingerprint()),
        Trust::Fingerprint(own),
    ] {
        let said: String = port.client(trust).get("/who").await.unwrap();
        assert_eq!(said, "127.0.0.1 Bearer secret");
    }
    let other = identity(&port.dir.path().join("other"), &["127.0.0.1"]);
    for trust in
        [Trust::Authorities(port.dir.path().join("other/ca.pem")), Trust::Fingerprint(other.fingerprint())]
    {
        let refused = port.client(trust.clone()).get::<String>("/who").await.unwrap_err();
        let certificate =
            matches!(&refused, ClientError::NoLink { source: TransportError::Certificate { .. }, .. });
        assert!(certificate && refused.hint().is_some(), "{trust:?}: {refused:?}");
    }
    // Vouched for, but for another name.
    let named = Access {
        url: format!("https://localhost:{}", port.address.port()),
        token: "secret".into(),
        trust: Trust::Authorities(ca),
    };
    let refused = Client::remote(&named, "the daemon").unwrap().get::<String>("/who").await.unwrap_err();
    assert!(matches!(refused, ClientError::NoLink { .. }), "{refused:?}");
}

#[tokio::test]
async fn what_is_no_address_or_no_token_is_refused_before_anything_is_sent() {
    let client = |url: &str, token: &str| {
        Client::remote(&Access { url: url.into(), token: token.into(), trust: Trust::System }, "the daemon")
    };
    for url in ["http://dr:7444", "https://dr", "https://dr:7444/v1", "dr:7444", "https://dr:x"] {
        assert!(client(url, "t").is_err(), "{url}");
    }
    for token in ["", "two words", "a\nb", &"x".repeat(1000)] {
        assert!(matches!(client("https://dr:7444", token), Err(ClientError::BadToken { .. })), "{token}");
    }
}

#[tokio::test]
async fn a_caller_that_is_slow_to_ask_or_says_too_much_is_cut_off() {
    let port = port(Limits { head: Duration::from_millis(300), ..Limits::default() }).await;
    let mut silent = port.raw().await;
    let mut slow = port.raw().await;
    slow.write_all(b"GET /who HTTP/1.1\r\nHos").await.unwrap();
    to_the_end(&mut silent).await;
    assert!(!to_the_end(&mut slow).await.contains("200"));
    let mut long = port.raw().await;
    long.write_all(b"GET /who HTTP/1.1\r\nX: ").await.unwrap();
    // It may be cut off in the middle.
    let _ = long.write_all(&vec![b'x'; 2 * HEAD_MAX]).await;
    let said = to_the_end(&mut long).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 431"), "{said}");
}

#[tokio::test]
async fn a_caller_that_takes_nothing_is_cut_off_and_its_place_is_free_again() {
    let limits = Limits { stall: Duration::from_millis(300), of_one_address: 1, ..Limits::default() };
    let port = port(limits).await;
    let mut deaf = port.raw().await;
    deaf.write_all(b"POST /flood HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let client = port.client(Trust::Fingerprint(port.identity.fingerprint()));
    timeout(Duration::from_secs(30), async {
        // Refused as one too many, until the first was cut off.
        while client.get::<String>("/who").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn connections_of_one_address_and_of_all_are_counted() {
    let limits = Limits { connections: 3, of_one_address: 2, ..Limits::default() };
    let (open, one, other) = (Open::default(), "10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let first = open.enter(one, &limits).unwrap();
    let _second = open.enter(one, &limits).unwrap();
    assert!(open.enter(one, &limits).is_none());
    let _third = open.enter(other, &limits).unwrap();
    assert!(open.enter(other, &limits).is_none(), "three in all");
    drop(first);
    assert!(open.enter(one, &limits).is_some());
}

#[tokio::test]
async fn a_stop_ends_what_streams_after_a_while_and_closes_the_port() {
    let Port { address, identity, _stop, served, .. } = port(Limits::default()).await;
    let trust = Trust::Fingerprint(identity.fingerprint());
    let access = Access { url: format!("https://{address}"), token: "t".into(), trust };
    let client = Client::remote(&access, "the daemon").unwrap();
    let mut lines = client.post_stream::<_, String>("/flood", &()).await.unwrap();
    assert_eq!(lines.next().await.unwrap().unwrap().len(), 60_000);
    drop(_stop);
    timeout(DRAIN * 4, served).await.unwrap().unwrap();
    assert!(client.get::<String>("/who").await.is_err());
}
