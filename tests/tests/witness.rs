//! The witness on paper, which the simulation believes, against a real etcd: leases that run out, and who may change what. And
//! the way to a real one: authorities, users, passwords, and tokens that end.

#[path = "simulation/model_witness.rs"]
mod model_witness;

use anyhow::{Context, Result, ensure};
use lifeboat::{
    clock::SystemClock,
    id::VmId,
    local_api::Client,
    transport::{https::CallerFiles, pki::SiteIdentity},
    units::Generation,
    witness::{
        Change, Entry, LeaseId, Leasing, Revision, Witness, Word,
        config::{RawWitness, WitnessConfig},
        etcd::Etcd,
    },
};
use model_witness::ModelWitness;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

const ONE: VmId = VmId::from_bytes([1; 16]);
const TWO: VmId = VmId::from_bytes([2; 16]);
const TTL: Duration = Duration::from_secs(6);
const SOON: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

/// An etcd of one member, for this test alone.
struct Real {
    process: Child,
    words: Vec<String>,
    url: String,
    config: WitnessConfig,
    dir: tempfile::TempDir,
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Real {
    fn start() -> Result<Self> {
        Self::start_at("http", tempfile::tempdir()?, &[])
    }

    /// `words` besides those that each has.
    fn start_at(scheme: &str, dir: tempfile::TempDir, words: &[&str]) -> Result<Self> {
        let free = || Ok::<_, std::io::Error>(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
        let (url, peer) =
            (format!("{scheme}://127.0.0.1:{}", free()?), format!("http://127.0.0.1:{}", free()?));
        let (data, cluster) = (dir.path().join("data").display().to_string(), format!("default={peer}"));
        let own = ["--listen-client-urls", &url, "--advertise-client-urls", &url, "--data-dir", &data];
        let among = ["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer];
        let first = ["--initial-cluster", &cluster, "--unsafe-no-fsync"];
        let words = [&own[..], &among, &first, words].concat();
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        let config = config(&json!({ "endpoints": ["http://127.0.0.1:1", url], "lease": "6s" }))?;
        Ok(Self { process: spawned(&words)?, words, url, config, dir })
    }

    /// With a certificate and with users, of whom `lifeboat` may no more than an agent and a site need.
    async fn secured(words: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let ca = authority(dir.path(), "pki")?;
        let file = |name: &str| ca.with_file_name(name).display().to_string();
        let (certificate, key) = (file("site.pem"), file("site.key"));
        let own = ["--cert-file", &certificate, "--key-file", &key, "--bcrypt-cost", "4"];
        let mut real = Self::start_at("https", dir, &[&own, words].concat())?;
        fs::write(real.password(), "right\n")?;
        real.config = config(&json!({
            "endpoints": real.config.endpoints, "lease": "6s", "ca": ca, "user": "lifeboat",
            "password_file": real.password(),
        }))?;
        until("etcd to answer", async || real.asks("cluster/member/list", json!({}), None).await.is_ok())
            .await?;
        for (path, body) in [
            ("user/add", json!({ "name": "root", "password": "root" })),
            ("role/add", json!({ "name": "root" })),
            ("user/grant", json!({ "user": "root", "role": "root" })),
            ("role/add", json!({ "name": "words" })),
            (
                "role/grant",
                json!({ "name": "words", "perm": { "permType": "READWRITE",
                // `lifeboat/`, and what comes after all that begins so.
                "key": "bGlmZWJvYXQv", "range_end": "bGlmZWJvYXQw" } }),
            ),
            ("user/add", json!({ "name": "lifeboat", "password": "right" })),
            ("user/grant", json!({ "user": "lifeboat", "role": "words" })),
            ("user/add", json!({ "name": "stranger", "password": "right" })),
            ("enable", json!({})),
        ] {
            real.asks(&format!("auth/{path}"), body, None).await.with_context(|| path.to_owned())?;
        }
        Ok(real)
    }

    fn password(&self) -> PathBuf {
        self.dir.path().join("password")
    }

    /// As etcd's own tools do.
    async fn asks(&self, path: &str, body: Value, token: Option<&str>) -> Result<Value> {
        let (ca, own) = (self.config.ca.as_deref(), self.config.own.as_ref());
        let client = Client::of_stranger(&self.url, ca, own, "etcd")?;
        Ok(client.post_as(&format!("/v3/{path}"), &body, token).await?)
    }

    async fn token(&self, user: &str, password: &str) -> Result<String> {
        let answer =
            self.asks("auth/authenticate", json!({ "name": user, "password": password }), None).await?;
        Ok(answer["token"].as_str().context("a token")?.to_owned())
    }

    /// Its tokens are forgotten, and what is written stays.
    fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.process = spawned(&self.words)?;
        Ok(())
    }
}

fn spawned(words: &[String]) -> Result<Child> {
    Command::new(rig::target_dir()?.join("rig/etcd"))
        .args(words)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting etcd; tests/setup.sh installs it")
}

/// As it is written in a configuration.
fn config(section: &Value) -> Result<WitnessConfig> {
    Ok(serde_json::from_value::<RawWitness>(section.clone())?.check(Path::new("agent.toml"))?)
}

/// Somebody who vouches for a server at 127.0.0.1. Returns the authority's certificate, beside which the server's lies.
fn authority(dir: &Path, name: &str) -> Result<PathBuf> {
    SiteIdentity::create(&dir.join(name), name, &["127.0.0.1".into()], &SystemClock)?;
    Ok(dir.join(name).join("ca.pem"))
}

async fn until(what: &str, done: impl AsyncFn() -> bool) -> Result<()> {
    let end = tokio::time::Instant::now() + SOON;
    while !done().await {
        ensure!(tokio::time::Instant::now() < end, "waited for {what}");
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn word(generation: u64) -> Word {
    Word::Kept { agent: "a".into(), generation: Generation(generation) }
}

fn change(vm: VmId, over: Revision, leasing: Leasing) -> Change {
    Change { vm, over, word: word(over.0), leasing }
}

/// What both must say alike: revisions are told apart by their order only.
async fn script(witness: &dyn Witness, lapse: impl AsyncFn()) -> Result<Vec<String>> {
    let mut said = Vec::new();
    let shown = |entries: Vec<Entry>| {
        entries
            .iter()
            .map(|entry| format!("{:?} {}", entry.word.is_some(), entry.leased))
            .collect::<Vec<_>>()
            .join(", ")
    };
    said.push(shown(witness.look(&[ONE, TWO]).await?));
    let lease = witness.grant(TTL).await?;
    let none = Revision(0);
    let first = witness.change(&[change(ONE, none, Leasing::Bind(lease))]).await?.context("taking it")?;
    said.push(format!(
        "over a word that is old: {}",
        witness.change(&[change(ONE, none, Leasing::Drop)]).await?.is_some()
    ));
    said.push(format!(
        "claimed while leased: {}",
        witness.change(&[change(ONE, first, Leasing::Gone)]).await?.is_some()
    ));
    said.push(shown(witness.look(&[ONE, TWO]).await?));
    said.push(format!("renewed: {}", witness.renew(lease).await?));
    // Bound anew, to another lease: the first one's end means nothing then.
    let other = witness.grant(TTL).await?;
    let second =
        witness.change(&[change(ONE, first, Leasing::Bind(other))]).await?.context("taking it again")?;
    said.push(format!("revisions rise: {}", second > first));
    // All or nothing.
    let both = [change(ONE, first, Leasing::Drop), change(TWO, none, Leasing::Drop)];
    said.push(format!("one of two is old: {}", witness.change(&both).await?.is_some()));
    said.push(shown(witness.look(&[ONE, TWO]).await?));
    lapse().await;
    said.push(shown(witness.look(&[ONE, TWO]).await?));
    said.push(format!("renewed too late: {}", witness.renew(other).await?));
    let late = witness.change(&[change(ONE, second, Leasing::Bind(other))]).await;
    said.push(format!("bound to a lease that ran out: {}", late.is_ok_and(|done| done.is_some())));
    let claim = [change(ONE, second, Leasing::Gone), change(TWO, none, Leasing::Gone)];
    said.push(format!("claimed: {}", witness.change(&claim).await?.is_some()));
    said.push(format!("claimed twice: {}", witness.change(&claim).await?.is_some()));
    let back = witness.grant(TTL).await?;
    let taken = witness.change(&[change(ONE, second, Leasing::Bind(back))]).await?;
    said.push(format!("taken back over a claim: {}", taken.is_some()));
    said.push(shown(witness.look(&[ONE, TWO]).await?));
    said.push(format!("a lease that nobody was given: {}", witness.renew(LeaseId(77)).await?));
    Ok(said)
}

async fn lapse(etcd: &Etcd) {
    while etcd.look(&[ONE]).await.is_ok_and(|entries| entries[0].leased) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Goal: what the simulation believes of a witness is so. Method: one script for both; of two endpoints the first is dead. For
/// etcd a lease runs out in its own time, and not before.
#[tokio::test]
async fn a_real_etcd_does_what_the_model_does() -> Result<()> {
    let real = Real::start()?;
    let etcd = Etcd::new(&real.config)?;
    until("etcd to answer", async || etcd.look(&[ONE]).await.is_ok()).await?;
    let real_says = script(&etcd, async || lapse(&etcd).await).await?;
    let model = ModelWitness::default();
    let model_says = script(&model, async || model.pass(TTL.as_millis() as u64)).await?;
    assert_eq!(real_says, model_says);
    // No earlier than was said.
    let (lease, asked) = (etcd.grant(TTL).await?, tokio::time::Instant::now());
    let over = etcd.look(&[TWO]).await?[0].revision;
    etcd.change(&[change(TWO, over, Leasing::Bind(lease))]).await?.context("taking it")?;
    while etcd.look(&[TWO]).await?[0].leased {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(asked.elapsed() >= TTL, "{:?}", asked.elapsed());
    Ok(())
}

/// Goal: the same over TLS, by an authority of its own, as a user who may change our keys alone.
#[tokio::test]
async fn over_tls_and_as_a_user_of_little_right_leases_are_kept_and_claims_made() -> Result<()> {
    let real = Real::secured(&[]).await?;
    let etcd = Etcd::new(&real.config)?;
    let real_says = script(&etcd, async || lapse(&etcd).await).await?;
    let model = ModelWitness::default();
    let model_says = script(&model, async || model.pass(TTL.as_millis() as u64)).await?;
    assert_eq!(real_says, model_says);
    let others = key_of_others(&real).await.unwrap_err().to_string();
    assert!(others.contains("permission denied"), "{others}");
    Ok(())
}

async fn key_of_others(real: &Real) -> Result<Value> {
    let token = real.token("lifeboat", "right").await?;
    real.asks("kv/put", json!({ "key": "b3RoZXJz", "value": "b3RoZXJz" }), Some(&token)).await
}

/// Takes a VM as an agent does. Returns the words of whoever is against it.
async fn refused(config: &WitnessConfig) -> Result<String> {
    let etcd = Etcd::new(config)?;
    let taken = match etcd.grant(TTL).await {
        Ok(lease) => etcd.change(&[change(ONE, Revision(0), Leasing::Bind(lease))]).await,
        Err(error) => Err(error),
    };
    Ok(taken.err().context("it was taken")?.to_string())
}

/// Goal: whoever is not who he should be, or asks what he may not, is told so, and nothing is taken. Method: each thing
/// that can be wrong in the configuration, one by one; then the right one.
#[tokio::test]
async fn a_wrong_authority_or_user_or_password_says_so_and_takes_nothing() -> Result<()> {
    let real = Real::secured(&[]).await?;
    let other = authority(real.dir.path(), "other")?;
    let wrong = real.dir.path().join("wrong");
    fs::write(&wrong, "wrong")?;
    let missing = real.dir.path().join("missing");
    let plain = real.url.replace("https", "http");
    let renamed = real.url.replace("127.0.0.1", "localhost");
    let second = |url: &str| vec![url.to_owned(), "http://127.0.0.1:1".into()];
    let with = |change: fn(&mut WitnessConfig, PathBuf), path: &Path| {
        let mut config = real.config.clone();
        change(&mut config, path.to_owned());
        config
    };
    // That nobody listens at another endpoint hides nothing.
    let at = |url: &str| WitnessConfig { endpoints: second(url), ..real.config.clone() };
    for (config, words) in [
        (with(|config, path| config.ca = Some(path), &other), "certificate refused"),
        (at(&renamed), "certificate refused"),
        (at(&plain), "etcd broke off its answer"),
        (
            with(|config, path| config.login = Some(("lifeboat".into(), path)), &wrong),
            "authentication failed",
        ),
        (with(|config, path| config.login = Some(("nobody".into(), path)), &wrong), "authentication failed"),
        (
            with(|config, path| config.login = Some(("lifeboat".into(), path)), &missing),
            "missing: No such file",
        ),
        (with(|config, _| config.login = None, &missing), "user name is empty"),
        (
            with(|config, path| config.login = Some(("stranger".into(), path)), &real.password()),
            "permission denied",
        ),
    ] {
        let said = refused(&config).await.with_context(|| words.to_owned())?;
        ensure!(said.contains(words), "{said}");
    }
    let unread = Etcd::new(&with(|config, path| config.ca = Some(path), &missing)).err();
    let unread = lifeboat::error::chain(&unread.context("a file that is missing vouches for nobody")?);
    ensure!(unread.contains("missing"), "{unread}");
    let etcd = Etcd::new(&real.config)?;
    assert_eq!(etcd.look(&[ONE]).await?, [Entry::default()]);
    let lease = etcd.grant(TTL).await?;
    etcd.change(&[change(ONE, Revision(0), Leasing::Bind(lease))]).await?.context("taking it")?;
    Ok(())
}

/// Somebody who vouches for servers at 127.0.0.1 and for callers, by certificates for either use: etcd's gateway shows its
/// own to etcd.
struct Voucher {
    dir: PathBuf,
    params: CertificateParams,
    key: KeyPair,
}

impl Voucher {
    fn new(dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir)?;
        let (mut params, key) = (CertificateParams::default(), KeyPair::generate()?);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        fs::write(dir.join("ca.pem"), params.self_signed(&key)?.pem())?;
        Ok(Self { dir, params, key })
    }

    fn vouch(&self, name: &str) -> Result<CallerFiles> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(["127.0.0.1".to_owned()])?;
        let signed = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key))?;
        let file = |kind: &str| self.dir.join(format!("{name}.{kind}"));
        fs::write(file("pem"), signed.pem())?;
        fs::write(file("key"), key.serialize_pem())?;
        Ok(CallerFiles { certificate: file("pem"), key: file("key") })
    }
}

/// Goal: an etcd that wants a certificate of whoever asks is shown ours; without one, or with one that nobody vouches
/// for, it is no witness, and what it wants is told; one that was renewed is taken without a restart. Method: the script
/// of the others; then the files become another authority's, and ours again.
#[tokio::test]
async fn an_etcd_that_wants_a_certificate_of_its_caller_is_shown_one_and_says_so_where_it_is_not()
-> Result<()> {
    let dir = tempfile::tempdir()?;
    let (ours, others) = (Voucher::new(dir.path().join("ours"))?, Voucher::new(dir.path().join("others"))?);
    let (server, caller) = (ours.vouch("server")?, ours.vouch("caller")?);
    let path = |path: &Path| path.display().to_string();
    let (certificate, key) = (path(&server.certificate), path(&server.key));
    let trusted = path(&ours.dir.join("ca.pem"));
    let own = ["--cert-file", &certificate, "--key-file", &key, "--trusted-ca-file", &trusted];
    let mut real = Real::start_at("https", dir, &[&own[..], &["--client-cert-auth"]].concat())?;
    real.config.ca = Some(trusted.clone().into());
    wants_a_certificate(&real.config).await?;
    real.config = config(&json!({
        "endpoints": real.config.endpoints, "lease": "6s", "ca": trusted,
        "certificate": caller.certificate, "key": caller.key,
    }))?;
    let etcd = Etcd::new(&real.config)?;
    let real_says = script(&etcd, async || lapse(&etcd).await).await?;
    let model = ModelWitness::default();
    assert_eq!(real_says, script(&model, async || model.pass(TTL.as_millis() as u64)).await?);

    let becomes = |files: &CallerFiles| -> Result<()> {
        fs::copy(&files.certificate, &caller.certificate)?;
        fs::copy(&files.key, &caller.key)?;
        Ok(())
    };
    becomes(&others.vouch("caller")?)?;
    until("a stranger's certificate to be refused", async || etcd.look(&[ONE]).await.is_err()).await?;
    wants_a_certificate(&real.config).await?;
    becomes(&ours.vouch("renewed")?)?;
    etcd.look(&[ONE]).await.context("with a certificate that was renewed")?;
    fs::remove_file(&caller.key)?;
    let unread = lifeboat::error::chain(&Etcd::new(&real.config).err().context("without its key")?);
    ensure!(unread.contains("caller.key is missing"), "{unread}");
    Ok(())
}

async fn wants_a_certificate(config: &WitnessConfig) -> Result<()> {
    // What it says may be cut off with the connection.
    until("etcd to say what it wants", async || {
        let alert = |said: String| {
            // The one of older releases, the other of newer ones; the third is for one that nobody vouches for.
            ["BadCertificate", "CertificateRequired", "UnknownCA"]
                .iter()
                .any(|name| said.contains(&format!("alert: {name}")))
        };
        refused(config).await.is_ok_and(alert)
    })
    .await
}

/// Goal: a token that has run out, or that etcd has forgotten, is replaced by logging in again, and the lease goes on;
/// so it is with a password that was changed, once the file has it. Method: tokens that last a second; then etcd is
/// restarted, then the password changed. That a token is dead is seen by another, which was given later.
#[tokio::test]
async fn a_token_that_has_ended_is_replaced_by_logging_in_again_and_the_lease_goes_on() -> Result<()> {
    let mut real = Real::secured(&["--auth-token-ttl", "1"]).await?;
    let etcd = Etcd::new(&real.config)?;
    let lease = etcd.grant(Duration::from_secs(60)).await?;
    let taken = etcd.change(&[change(ONE, Revision(0), Leasing::Bind(lease))]).await?.context("taking it")?;
    let later = real.token("lifeboat", "right").await?;
    // Each question would make it last longer: asked once in a while.
    let grants = json!({ "TTL": "6" });
    let dead = async || real.asks("lease/grant", grants.clone(), Some(&later)).await.is_err();
    until("a token to run out", async || {
        tokio::time::sleep(Duration::from_secs(3)).await;
        dead().await
    })
    .await?;
    let second = etcd
        .change(&[change(ONE, taken, Leasing::Bind(lease))])
        .await?
        .context("with a token that ran out")?;

    real.restart()?;
    until("etcd to answer again", async || matches!(etcd.renew(lease).await, Ok(true))).await?;
    assert!(etcd.look(&[ONE]).await?[0].leased);
    let third =
        etcd.change(&[change(ONE, second, Leasing::Bind(lease))]).await?.context("after a restart")?;

    let root = real.token("root", "root").await?;
    real.asks("auth/user/changepw", json!({ "name": "lifeboat", "password": "new" }), Some(&root)).await?;
    let refused = etcd.look(&[ONE]).await.unwrap_err().to_string();
    assert!(refused.contains("authentication failed"), "{refused}");
    fs::write(real.password(), "new")?;
    // Many at once: one logs in.
    let (one, other) = tokio::join!(etcd.look(&[ONE]), etcd.look(&[TWO]));
    assert!(one?[0].leased && !other?[0].leased);
    etcd.change(&[change(ONE, third, Leasing::Drop)]).await?.context("with the new password")?;
    Ok(())
}
