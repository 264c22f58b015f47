//! etcd as the witness, over the JSON gateway that each of its members has (`/v3/…`).
//! Promises: a question ends in [`PATIENCE`] for each endpoint; the next endpoint is asked only where nothing can have been
//! done at the one before, or asking twice does no harm; reads and transactions are etcd's linearizable ones. A token that etcd
//! has forgotten, or that has run out, is replaced by logging in again, by one of those who wait for it.

use super::{Change, Entry, LeaseId, Leasing, Revision, Witness, WitnessError, Word, config::WitnessConfig};
use crate::{
    id::VmId,
    local_api::{Client, ClientError},
    transport::TransportError,
};
use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use tokio::sync::Mutex;

/// How long one endpoint may take.
pub const PATIENCE: Duration = Duration::from_millis(1500);

const LOGIN: &str = "/v3/auth/authenticate";

pub struct Etcd {
    clients: Vec<Client>,
    login: Option<(String, std::path::PathBuf)>,
    token: Mutex<Option<String>>,
    /// The endpoint that answered last.
    good: AtomicUsize,
}

impl Etcd {
    pub fn new(config: &WitnessConfig) -> Result<Self, WitnessError> {
        let (ca, own) = (config.ca.as_deref(), config.own.as_ref());
        let clients = config.endpoints.iter().map(|url| Client::of_stranger(url, ca, own, "etcd"));
        let clients: Vec<Client> = clients.collect::<Result<_, _>>()?;
        if clients.is_empty() {
            return Err(WitnessError::NoEndpoint);
        }
        Ok(Self { clients, login: config.login.clone(), token: Mutex::default(), good: AtomicUsize::new(0) })
    }

    /// `again`: it may be asked of another endpoint although the one before may have done it.
    async fn ask(&self, path: &str, body: Value, again: bool) -> Result<Value, WitnessError> {
        let token = self.token(None).await?;
        match self.ask_all(path, &body, again, token.as_deref()).await {
            Err(error) if token.is_some() && is_stale(&error) => {
                let token = self.token(token.as_deref()).await?;
                self.ask_all(path, &body, again, token.as_deref()).await
            }
            answer => answer,
        }
    }

    /// One that is not `stale`; `None`: etcd is asked as nobody. One logs in at a time, and the others take what it was given.
    async fn token(&self, stale: Option<&str>) -> Result<Option<String>, WitnessError> {
        let Some((user, file)) = &self.login else { return Ok(None) };
        let mut token = self.token.lock().await;
        if token.is_none() || token.as_deref() == stale {
            let password = std::fs::read_to_string(file);
            let password = password.map_err(|source| WitnessError::File { path: file.clone(), source })?;
            let asked = json!({ "name": user, "password": password.trim_end() });
            *token = None;
            let answer = self.ask_all(LOGIN, &asked, true, None).await?;
            let given = answer["token"].as_str();
            let given = given.ok_or_else(|| WitnessError::Malformed("a log-in without a token".into()))?;
            *token = Some(given.to_owned());
        }
        Ok(token.clone())
    }

    async fn ask_all(
        &self,
        path: &str,
        body: &Value,
        again: bool,
        token: Option<&str>,
    ) -> Result<Value, WitnessError> {
        let first = self.good.load(Ordering::Relaxed);
        let mut told = WitnessError::NoEndpoint;
        for at in (0..self.clients.len()).map(|at| (first + at) % self.clients.len()) {
            let asked = self.clients[at].post_as::<_, Value>(path, body, token);
            let error = match tokio::time::timeout(PATIENCE, asked).await {
                Ok(Ok(answer)) => {
                    self.good.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(error)) => said(error),
                Err(_) => WitnessError::Late,
            };
            let untouched = matches!(error, WitnessError::Unreachable(ClientError::NoLink { .. }));
            // What one member refuses the others refuse.
            let last = error.is_refusal() || (!again && !untouched);
            // Nobody at home at one endpoint is no news where another has answered.
            if last || !is_nobody(&error) || is_nobody(&told) {
                told = error;
            }
            if last {
                break;
            }
        }
        Err(told)
    }
}

#[async_trait]
impl Witness for Etcd {
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, WitnessError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let answer = self.ask("/v3/lease/grant", json!({ "TTL": seconds.to_string() }), true).await?;
        if number(&answer["TTL"])? < seconds {
            return Err(WitnessError::Malformed(format!("a lease that is shorter than asked for: {answer}")));
        }
        Ok(LeaseId(number(&answer["ID"])?))
    }

    async fn renew(&self, lease: LeaseId) -> Result<bool, WitnessError> {
        let answer = self.ask("/v3/lease/keepalive", json!({ "ID": lease.0.to_string() }), true).await?;
        let result = &answer["result"];
        if number(&result["ID"])? != lease.0 {
            return Err(WitnessError::Malformed(format!("another lease's answer: {answer}")));
        }
        Ok(!result["TTL"].is_null() && number(&result["TTL"])? > 0)
    }

    async fn look(&self, vms: &[VmId]) -> Result<Vec<Entry>, WitnessError> {
        let mut found = Vec::with_capacity(vms.len());
        // Both keys of a VM, and all VMs, of one instant.
        let ranges = vms.iter().flat_map(|vm| [word_key(*vm), lease_key(*vm)]);
        let reads: Vec<Value> = ranges.map(|key| json!({ "request_range": { "key": key } })).collect();
        let answer = self.ask("/v3/kv/txn", json!({ "compare": [], "success": reads }), true).await?;
        let answer: Answer = read(answer)?;
        if answer.responses.len() != 2 * vms.len() {
            return Err(WitnessError::Malformed("not as many answers as questions".into()));
        }
        for pair in answer.responses.chunks(2) {
            let leased = !pair[1].response_range.kvs.is_empty();
            let Some(row) = pair[0].response_range.kvs.first() else {
                found.push(Entry { word: None, revision: Revision(0), leased });
                continue;
            };
            let text = BASE64_STANDARD.decode(&row.value).unwrap_or_default();
            let word: Word =
                serde_json::from_slice(&text).map_err(|error| WitnessError::Malformed(error.to_string()))?;
            let revision =
                row.mod_revision.parse().map_err(|_| WitnessError::Malformed("a revision".into()))?;
            found.push(Entry { word: Some(word), revision: Revision(revision), leased });
        }
        Ok(found)
    }

    async fn change(&self, changes: &[Change]) -> Result<Option<Revision>, WitnessError> {
        let (mut compare, mut success) = (Vec::new(), Vec::new());
        for change in changes {
            let (word, lease) = (word_key(change.vm), lease_key(change.vm));
            let over = change.over.0.to_string();
            compare.push(json!({ "key": word, "target": "MOD", "result": "EQUAL", "mod_revision": over }));
            let text = serde_json::to_vec(&change.word);
            let text = text.map_err(|error| WitnessError::Malformed(error.to_string()))?;
            success.push(json!({ "request_put": { "key": word, "value": BASE64_STANDARD.encode(&text) } }));
            match change.leasing {
                Leasing::Bind(id) => {
                    let (value, id) = (BASE64_STANDARD.encode(b"alive"), id.0.to_string());
                    success.push(json!({ "request_put": { "key": lease, "value": value, "lease": id } }));
                }
                Leasing::Drop => success.push(json!({ "request_delete_range": { "key": lease } })),
                Leasing::Gone => {
                    let gone = json!({ "key": lease, "target": "CREATE", "result": "EQUAL", "create_revision": "0" });
                    compare.push(gone);
                }
            }
        }
        let answer = self.ask("/v3/kv/txn", json!({ "compare": compare, "success": success }), false).await?;
        let answer: Answer = read(answer)?;
        let revision = answer.header.revision.parse();
        let revision =
            revision.map_err(|_| WitnessError::Malformed("a transaction without a revision".into()))?;
        Ok(answer.succeeded.then_some(Revision(revision)))
    }
}

/// etcd's own words, where it has some: `{"code": 16, "message": "etcdserver: invalid auth token", ...}`.
fn said(error: ClientError) -> WitnessError {
    let ClientError::Api { error: body, .. } = &error else { return error.into() };
    let json = body.what.find('{').and_then(|at| serde_json::from_str::<Value>(&body.what[at..]).ok());
    let json = json.unwrap_or_default();
    let message = json["message"].as_str().or_else(|| json["error"].as_str()).unwrap_or(&body.what);
    WitnessError::Said {
        code: json["code"].as_u64(),
        words: message.escape_debug().take(WORDS_MAX).collect::<String>(),
    }
}

/// Nobody listens there.
fn is_nobody(error: &WitnessError) -> bool {
    use TransportError::Unreachable;
    match error {
        WitnessError::NoEndpoint => true,
        WitnessError::Unreachable(ClientError::NoLink { source, .. }) => matches!(source, Unreachable { .. }),
        _ => false,
    }
}

/// The token is no longer good: it has run out, or etcd was started again, or its users have changed.
fn is_stale(error: &WitnessError) -> bool {
    let WitnessError::Said { code, words } = error else { return false };
    *code == Some(UNAUTHENTICATED) || words.contains("auth store is old")
}

const WORDS_MAX: usize = 200;
/// gRPC's number for it.
const UNAUTHENTICATED: u64 = 16;

/// Of what a transaction answers, what is read.
#[derive(Deserialize)]
struct Answer {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Deserialize)]
struct Header {
    revision: String,
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    response_range: Range,
}

#[derive(Default, Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    #[serde(default)]
    value: String,
    mod_revision: String,
}

fn read(answer: Value) -> Result<Answer, WitnessError> {
    serde_json::from_value(answer).map_err(|error| WitnessError::Malformed(error.to_string()))
}

fn word_key(vm: VmId) -> String {
    BASE64_STANDARD.encode(format!("lifeboat/{vm}/word").as_bytes())
}

fn lease_key(vm: VmId) -> String {
    BASE64_STANDARD.encode(format!("lifeboat/{vm}/lease").as_bytes())
}

/// The gateway writes 64-bit numbers as strings.
fn number(value: &Value) -> Result<u64, WitnessError> {
    let read = value.as_str().and_then(|text| text.parse().ok()).or_else(|| value.as_u64());
    read.ok_or_else(|| WitnessError::Malformed(format!("{value} where a number should be")))
}
