//! The API of a site controller that runs as a daemon, as operators elsewhere use it: roles, certificates, tokens, limits.
//! No guest is needed.

use anyhow::{Context, Result, ensure};
use lifeboat::{
    local_api::{Access, Client},
    transport::https::Trust,
};
use rig::{Output, Rig, Site, binary, product::Controller};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, time::Duration};

const PORT: u16 = 7444;

/// A controller with a port for operators, and what they need to come in.
struct Elsewhere {
    /// Another machine, from which it is asked.
    from: Site,
    controller: Controller,
    url: String,
}

impl Elsewhere {
    fn running(site: &Site, from: &Site) -> Result<Self> {
        let mut controller = Controller::install(site)?;
        controller.configure(&format!("[api]\nlisten = \"{}:{PORT}\"\n", site.address()))?;
        controller.start()?;
        let url = format!("https://{}:{PORT}", site.address());
        Ok(Self { from: from.clone(), controller, url })
    }

    fn ca(&self) -> PathBuf {
        self.controller.data_dir().join("identity/ca.pem")
    }

    /// A file with a new token.
    fn token(&self, role: &str) -> Result<PathBuf> {
        let said = self.controller.cli(&["token", "create", role, "--role", role])?.success()?;
        let file = self.from.dir("tokens")?.join(role);
        fs::write(&file, said)?;
        Ok(file)
    }

    /// A program elsewhere that shows this token.
    fn client(&self, token: String) -> Result<Client> {
        let access = Access { url: self.url.clone(), token, trust: Trust::Authorities(self.ca()) };
        Ok(Client::remote(&access, "lifeboat-site-controller")?)
    }

    /// `lifeboat` as somebody elsewhere types it.
    fn ask(&self, token: &PathBuf, arguments: &[&str]) -> Result<Output> {
        let asked = self.from.command(binary("lifeboat")?).args(["--api", &self.url]);
        asked.arg("--token-file").arg(token).arg("--ca").arg(self.ca()).args(arguments).output()
    }
}

/// Goal: a program finds the API's document where it finds the API, with any token, and it tells all there is. Method: it is
/// fetched over the network, and held against the one in docs.
#[test]
fn the_api_s_document_is_served_to_whoever_may_look() -> Result<()> {
    let rig = Rig::new("api-document")?;
    let (from, site, _link) = rig.pair()?;
    let there = Elsewhere::running(&site, &from)?;
    let token = fs::read_to_string(there.token("viewer")?)?.trim().to_owned();
    let fetch = |token: String| -> Result<Value> {
        let client = there.client(token)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        from.in_network(|| runtime.block_on(client.get::<Value>("/openapi.json")))?.context("the document")
    };
    let served = fetch(token)?;
    assert_eq!(served, *lifeboat_site_controller::api::routes::document());
    assert!(served["paths"]["/v1/group-failovers"]["post"]["x-mutating"] == true, "{}", served["paths"]);
    ensure!(fetch("lba1-0000".into()).is_err(), "strangers get nothing");
    Ok(())
}

/// Goal: what the CLI would not send is refused all the same. Method: a planned failover to a point that is named.
#[test]
fn a_planned_failover_by_the_api_takes_no_point() -> Result<()> {
    let rig = Rig::new("api-planned")?;
    let (from, site, _link) = rig.pair()?;
    let there = Elsewhere::running(&site, &from)?;
    let token = fs::read_to_string(there.token("operator")?)?.trim().to_owned();
    let client = there.client(token)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asked = json!({ "name": "shop", "planned": true, "point": "1h" });
    for path in ["/v1/group-failovers/preview", "/v1/group-failovers"] {
        let answer = from.in_network(|| runtime.block_on(client.post::<Value, Value>(path, &asked)))?;
        let refused = answer.err().context("it is refused")?;
        ensure!(refused.to_string().contains("takes no point"), "{path}: {refused}");
    }
    Ok(())
}

fn refused(output: Output, why: &str) -> Result<()> {
    ensure!(!output.status.success(), "it was let in: {output:?}");
    ensure!(output.stderr.contains(why), "{output:?} does not say {why:?}");
    Ok(())
}

/// Goal: over the network a token's role says what may be done, the server is checked, and a revoked token opens nothing.
#[test]
fn operators_elsewhere_may_do_what_their_tokens_say_and_nothing_once_revoked() -> Result<()> {
    let rig = Rig::new("api-roles")?;
    let (from, site, _link) = rig.pair()?;
    let there = Elsewhere::running(&site, &from)?;
    let [viewer, operator, admin] = ["viewer", "operator", "admin"].map(|role| there.token(role));
    let (viewer, operator, admin) = (viewer?, operator?, admin?);
    let status: Value = serde_json::from_str(&there.ask(&viewer, &["status", "--json"])?.success()?)?;
    assert_eq!(status["site"], "B");
    refused(there.ask(&viewer, &["verify"])?, "role viewer")?;
    refused(there.ask(&operator, &["token", "list"])?, "role operator")?;
    // Progress comes over the network line by line, as it does through the socket.
    let report: Value = serde_json::from_str(&there.ask(&operator, &["verify", "--json"])?.success()?)?;
    assert_eq!(report["findings"], json!([]));
    let group = ["group", "create", "shop", "--vm", "00000000-0000-0000-0000-000000000001"];
    refused(there.ask(&viewer, &group)?, "role viewer")?;
    there.ask(&operator, &group)?.success()?;
    let tokens = there.ask(&admin, &["token", "list"])?.success()?;
    ensure!(tokens.contains("operator") && tokens.contains("uid 0"), "{tokens}");

    // The wrong authority: the token is not sent at all.
    let other = from.dir("other")?;
    fs::write(other.join("site.toml"), format!("data_dir = \"{}\"\n", other.display()))?;
    let init = from.command(binary("lifeboat-site-controller")?).arg("--config").arg(other.join("site.toml"));
    init.args(["init", "--address", "127.0.0.1"]).run()?;
    let asked = from.command(binary("lifeboat")?).args(["--api", &there.url]).arg("--token-file").arg(&admin);
    refused(
        asked.arg("--ca").arg(other.join("identity/ca.pem")).arg("status").output()?,
        "certificate refused",
    )?;

    there.ask(&admin, &["token", "revoke", "operator"])?.success()?;
    refused(there.ask(&operator, &["status"])?, "no such token")?;
    let text = fs::read_to_string(there.controller.data_dir().join("api-tokens.json"))?;
    let secret = fs::read_to_string(&admin)?;
    let secret = secret.trim().strip_prefix("lba1-").context("a token's beginning")?;
    ensure!(secret.len() == 64 && !text.contains(secret), "the token itself is stored");
    Ok(())
}

/// Goal: whatever is done can be told from the audit log, also after the worst moment. Method: the controller dies when a
/// call was written down and not yet made, and again by kill -9 once one was.
#[test]
fn the_audit_log_tells_of_a_call_that_a_crash_cut_short_and_of_one_that_was_done() -> Result<()> {
    let rig = Rig::new("api-audit")?;
    let mut controller = Controller::install(&rig.site("A")?)?;
    controller.env = vec![("LIFEBOAT_KILL_AT".into(), "api.written-down".into())];
    controller.start()?;
    let group = ["group", "create", "shop", "--vm", "00000000-0000-0000-0000-000000000001"];
    refused(controller.cli(&group)?, "broke off")?;
    controller.process()?.wait(Duration::from_secs(10))?;
    controller.start()?;
    assert_eq!(controller.json(&["group", "list"])?, json!([]), "what was not made has no effect");
    controller.cli(&group)?.success()?;
    refused(controller.cli(&group)?, "shop")?;
    controller.kill9()?;
    controller.start()?;
    let told = controller.json(&["audit", "--since", "1h ago"])?;
    let calls = told["calls"].as_array().context("a list")?;
    let ends: Vec<_> = calls.iter().map(|call| (&call["end"]["done"], &call["end"]["code"])).collect();
    let (none, done, not) = (Value::Null, json!(true), json!(false));
    assert_eq!(ends, [(&none, &none), (&done, &none), (&not, &json!("conflict"))]);
    for call in calls {
        assert_eq!((&call["who"], &call["from"]), (&json!("uid 0"), &json!("socket")));
        assert_eq!((&call["path"], &call["request"]["spec"]["name"]), (&json!("/v1/groups"), &json!("shop")));
    }
    Ok(())
}
