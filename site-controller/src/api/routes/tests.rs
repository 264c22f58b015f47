//! Every route of the table, asked with each role, over TLS and through the socket; by handlers that only say that they were
//! asked.

use super::*;
use crate::api::{audit::AuditLog, token_book::TokenBook, types::TokenRequest};
use axum::Json;
use lifeboat::{
    clock::SystemClock,
    local_api::{Access, Client, ClientError, HttpsListener, LocalListener},
    transport::{
        https::{HttpsIdentity, Trust},
        pki::SiteIdentity,
    },
};
use serde_json::Value;

const ROLES: [Role; 3] = [Viewer, Operator, Admin];

struct Served {
    dir: tempfile::TempDir,
    gate: Arc<Gate>,
    url: String,
    trust: Trust,
}

impl Served {
    async fn stubs() -> Self {
        let dir = tempfile::tempdir().unwrap();
        SiteIdentity::create(&dir.path().join("identity"), "dr", &["127.0.0.1".into()], &SystemClock)
            .unwrap();
        Self::over(dir).await
    }

    /// As after a restart.
    async fn again(self) -> Self {
        std::fs::remove_file(self.dir.path().join("api.sock")).unwrap();
        Self::over(self.dir).await
    }

    async fn over(dir: tempfile::TempDir) -> Self {
        let identity = SiteIdentity::load(&dir.path().join("identity")).unwrap();
        let tokens = TokenBook::open(dir.path(), Arc::new(SystemClock)).unwrap();
        let audit = Arc::new(AuditLog::open(dir.path(), Arc::new(SystemClock)).unwrap());
        let gate = Arc::new(Gate { tokens, audit });
        let router = assemble(table().into_iter().map(|route| (route.rule, stub(route.rule))), &gate);
        let shown = HttpsIdentity::of_site(&identity).unwrap();
        let listener = HttpsListener::bind("127.0.0.1:0".parse().unwrap(), shown).await.unwrap();
        let url = format!("https://{}", listener.local_address().unwrap());
        let socket = LocalListener::bind(&dir.path().join("api.sock"), 0o600).unwrap();
        tokio::spawn(listener.serve(router.clone(), std::future::pending()));
        tokio::spawn(socket.serve(router, std::future::pending()));
        Self { dir, gate, url, trust: Trust::Fingerprint(identity.fingerprint()) }
    }

    fn token(&self, role: Role) -> String {
        let request = TokenRequest { name: role.to_string(), role, valid_ms: None };
        self.gate.tokens.create(request, "a test").unwrap().token
    }

    fn remote(&self, token: &str) -> Client {
        let access = Access { url: self.url.clone(), token: token.into(), trust: self.trust.clone() };
        Client::remote(&access, "lifeboat-site-controller").unwrap()
    }
}

fn stub(rule: Rule) -> MethodRouter<()> {
    let answer = async move || Json(rule.path);
    if rule.method == "GET" { axum::routing::get(answer) } else { axum::routing::post(answer) }
}

async fn ask(client: &Client, rule: Rule) -> Result<Value, ClientError> {
    let path = rule.path.replace(['{', '}'], "");
    if rule.method == "GET" { client.get(&path).await } else { client.post(&path, &()).await }
}

fn refused(answer: Result<Value, ClientError>) -> (u16, String) {
    match answer.unwrap_err() {
        ClientError::Api { status, error } => (status.as_u16(), error.code),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn each_route_lets_in_those_of_its_role_and_nobody_below() {
    let served = Served::stubs().await;
    let stranger = served.remote("lba1-0000");
    let callers = ROLES.map(|role| (role, served.remote(&served.token(role))));
    let local = Client::new(served.dir.path().join("api.sock"), "lifeboat-site-controller");
    for Route { rule, .. } in table() {
        assert_eq!(ask(&local, rule).await.unwrap(), rule.path, "the socket's users may do everything");
        assert_eq!(refused(ask(&stranger, rule).await), (401, "unauthorized".into()), "{rule:?}");
        for (role, client) in &callers {
            let answer = ask(client, rule).await;
            if *role >= rule.role {
                assert_eq!(answer.unwrap(), rule.path, "{role} {rule:?}");
            } else {
                assert_eq!(refused(answer), (403, "forbidden".into()), "{role} {rule:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_revoked_token_opens_nothing_from_then_on() {
    let served = Served::stubs().await;
    let client = served.remote(&served.token(Admin));
    let status = table()[0].rule;
    ask(&client, status).await.unwrap();
    served.gate.tokens.revoke("admin").unwrap();
    assert_eq!(refused(ask(&client, status).await).0, 401);
}

#[tokio::test]
async fn what_is_no_request_is_told_in_the_same_shape() {
    let served = Served::stubs().await;
    let client = served.remote(&served.token(Viewer));
    let code = |answer| refused(answer);
    assert_eq!(code(client.get("/v1/nothing").await), (404, "unknown-request".into()));
    assert_eq!(code(client.post("/v1/status", &()).await), (405, "unknown-request".into()));
    let large = "x".repeat(2 << 20);
    assert_eq!(code(client.post("/v1/failovers/preview", &large).await), (413, "too-large".into()));
}

/// Goal: every call that changes something is written down, done or refused, with who made it; no other is.
#[tokio::test]
async fn each_call_that_changes_something_is_written_down_with_its_end() {
    let served = Served::stubs().await;
    let (viewer, admin) = (served.remote(&served.token(Viewer)), served.remote(&served.token(Admin)));
    let mutating: Vec<Rule> =
        table().into_iter().map(|route| route.rule).filter(|rule| rule.mutating).collect();
    for Route { rule, .. } in table() {
        ask(&admin, rule).await.unwrap();
        let _ = ask(&viewer, rule).await;
    }
    let rows = served.gate.audit.read(lifeboat::units::UnixMs(0), 1000).unwrap();
    let found: Vec<(&str, bool)> = rows
        .iter()
        .map(|row| {
            let done = row.end.as_ref().unwrap().done;
            assert!(row.who.starts_with(if done { "token admin" } else { "token viewer" }), "{row:?}");
            assert!(row.from.starts_with("127.0.0.1:"), "{row:?}");
            (row.route.as_str(), done)
        })
        .collect();
    let expected: Vec<(&str, bool)> =
        mutating.iter().flat_map(|rule| [(rule.path, true), (rule.path, false)]).collect();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn a_call_that_cannot_be_written_down_is_not_made() {
    let served = Served::stubs().await;
    let log = served.dir.path().join("audit.log");
    // The log has grown to where it is rotated, and the oldest file's place is taken by a folder.
    std::fs::create_dir(served.dir.path().join("audit.log.9")).unwrap();
    std::fs::write(served.dir.path().join("audit.log.8"), "").unwrap();
    std::fs::File::options().write(true).open(&log).unwrap().set_len(8 << 20).unwrap();
    let served = served.again().await;
    let (mutating, other): (Vec<Rule>, Vec<Rule>) =
        table().into_iter().map(|route| route.rule).partition(|rule| rule.mutating);
    let client = served.remote(&served.token(Operator));
    for rule in mutating.into_iter().filter(|rule| rule.role <= Operator) {
        assert_eq!(refused(ask(&client, rule).await), (503, "audit-unavailable".into()), "{rule:?}");
    }
    for rule in other.into_iter().filter(|rule| rule.role <= Operator) {
        assert_eq!(ask(&client, rule).await.unwrap(), rule.path);
    }
}

/// Goal: nobody who may only look can change anything, and nobody but an admin concerns other callers.
#[test]
fn what_changes_something_asks_for_an_operator_at_least() {
    for Route { rule, .. } in table() {
        assert!(rule.method == "POST" || !rule.mutating, "{rule:?}");
        assert!(!rule.mutating || rule.role >= Operator, "{rule:?}");
        assert!(!rule.path.starts_with("/v1/tokens") || rule.role == Admin, "{rule:?}");
    }
}
