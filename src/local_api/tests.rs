//! A daemon and its command line over a real socket.

use super::*;
use axum::{
    Json, Router,
    extract::Path as UrlPath,
    response::Response,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use std::{
    os::unix::{fs::PermissionsExt, net::UnixListener as StdListener},
    path::Path,
    time::Duration,
};
use tokio::sync::{mpsc, oneshot};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Vm {
    name: String,
    points: u32,
}

fn router() -> Router {
    async fn vm(UrlPath(name): UrlPath<String>) -> Result<Json<Vm>, ApiError> {
        if name == "db1" {
            return Ok(Json(Vm { name, points: 7 }));
        }
        Err(ApiError::not_found("unknown-vm", format!("no VM is called {name}"))
            .with_hint("see `lifeboat status`"))
    }
    async fn count(Json(to): Json<u32>) -> Response {
        let (send, items) = mpsc::channel(1);
        tokio::spawn(async move {
            for at in 0..to {
                let _ = send.send(Ok(Vm { name: "x".into(), points: at })).await;
            }
            if to > 3 {
                let _ = send.send(Err(ApiError::internal("too far"))).await;
            }
        });
        ndjson(items)
    }
    Router::new()
        .route("/vm/{name}", get(vm))
        .route("/echo", post(async |vm: Json<Vm>| vm))
        .route("/count", post(count))
}

/// A served router; dropping the sender stops it.
fn serve(path: &Path) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Result<(), ServeError>>) {
    let (stop, stopped) = oneshot::channel::<()>();
    let listener = LocalListener::bind(path, 0o600).unwrap();
    let served = tokio::spawn(listener.serve(router(), async move {
        let _ = stopped.await;
    }));
    (stop, served)
}

#[tokio::test]
async fn requests_and_typed_errors_make_the_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let (stop, served) = serve(&path);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let client = Client::new(&path, "lifeboat-agent");
    let vm = Vm { name: "db1".into(), points: 7 };
    assert_eq!(client.get::<Vm>("/vm/db1").await.unwrap(), vm);
    assert_eq!(client.post::<_, Vm>("/echo", &vm).await.unwrap(), vm);

    let error = client.get::<Vm>("/vm/db2").await.unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.hint()),
        ("no VM is called db2", Some("see `lifeboat status`"))
    );
    let code = |error| match error {
        ClientError::Api { error, .. } => error.code,
        other => panic!("{other}"),
    };
    assert_eq!(code(client.get::<Vm>("/nothing").await.unwrap_err()), "unknown-request");
    assert_eq!(code(client.post::<_, Vm>("/echo", &"no vm").await.unwrap_err()), "http");
    let error = client.get::<Vec<u8>>("/vm/db1").await.unwrap_err();
    assert!(matches!(error, ClientError::Unreadable { .. }), "{error}");
    assert!(client.get::<Vm>("no path").await.is_err());

    drop(stop);
    tokio::time::timeout(Duration::from_secs(20), served).await.unwrap().unwrap().unwrap();
    assert!(!path.exists(), "the socket's file is removed");
}

#[test]
fn an_error_says_what_and_why_and_what_to_do() {
    #[derive(Debug, thiserror::Error)]
    #[error("the group could not be written")]
    struct Outer(#[source] std::io::Error);
    let outer = Outer(std::io::Error::other("no space left"));
    let error = ApiError::conflict("conflict", Words::of(&outer)).with_hint("make room");
    assert_eq!(error.to_string(), "the group could not be written: no space left");
    let (code, what, why, to_do) =
        ("conflict", "the group could not be written", "no space left", "make room");
    assert_eq!(
        serde_json::to_value(Envelope { error: error.body }).unwrap(),
        serde_json::json!({ "error": { "code": code, "what": what, "why": why, "what_to_do": to_do } })
    );
    let plain = ApiError::internal("it broke").body;
    assert_eq!((plain.to_string().as_str(), plain.why, plain.what_to_do), ("it broke", None, None));
}

#[tokio::test]
async fn progress_arrives_line_by_line_and_an_error_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("site.sock");
    let (_stop, _served) = serve(&path);
    let client = Client::new(&path, "lifeboat-site-controller");
    let mut lines = client.post_stream::<_, Vm>("/count", &3).await.unwrap();
    for at in 0..3 {
        assert_eq!(lines.next().await.unwrap().unwrap().points, at);
    }
    assert!(lines.next().await.unwrap().is_none());
    let mut lines = client.post_stream::<_, Vm>("/count", &4).await.unwrap();
    for _ in 0..4 {
        lines.next().await.unwrap().unwrap();
    }
    assert_eq!(lines.next().await.unwrap_err().to_string(), "too far");
}

#[tokio::test]
async fn a_daemon_that_is_not_there_is_told_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::new(dir.path().join("none.sock"), "lifeboat-agent");
    let error = client.get::<Vm>("/vm/db1").await.unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }));
    assert!(error.to_string().contains("systemctl status lifeboat-agent"), "{error}");
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    drop(StdListener::bind(&path).unwrap());
    assert!(path.exists(), "a closed socket leaves its file");
    let (_stop, _served) = serve(&path);
    let second = LocalListener::bind(&path, 0o600);
    assert!(matches!(second, Err(ServeError::AlreadyRunning { .. })), "{second:?}");
    let client = Client::new(&path, "lifeboat-agent");
    assert_eq!(client.get::<Vm>("/vm/db1").await.unwrap().points, 7);

    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(LocalListener::bind(&file, 0o600), Err(ServeError::InTheWay { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
