//! The witness on paper, which the simulation believes, against a real etcd: leases that run out, and who may change what.

#[path = "simulation/model_witness.rs"]
mod model_witness;

use anyhow::{Context, Result};
use lifeboat::{
    id::VmId,
    units::Generation,
    witness::{Change, Entry, LeaseId, Leasing, Revision, Witness, Word, config::WitnessConfig, etcd::Etcd},
};
use model_witness::ModelWitness;
use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

const ONE: VmId = VmId::from_bytes([1; 16]);
const TWO: VmId = VmId::from_bytes([2; 16]);
const TTL: Duration = Duration::from_secs(6);
const SOON: Duration = Duration::from_secs(30);

/// An etcd of one member, for this test alone.
struct Real {
    process: Child,
    config: WitnessConfig,
    _dir: tempfile::TempDir,
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Real {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let free = || Ok::<_, std::io::Error>(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
        let (client, peer) = (free()?, free()?);
        let [client, peer] = [client, peer].map(|port| format!("http://127.0.0.1:{port}"));
        let process = Command::new(rig::target_dir()?.join("rig/etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--unsafe-no-fsync"])
            .arg("--data-dir")
            .arg(dir.path().join("data"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting etcd; tests/setup.sh installs it")?;
        let config = WitnessConfig {
            endpoints: vec!["http://127.0.0.1:1".into(), client],
            ca: None,
            login: None,
            lease: TTL,
            keep: true,
            silent: SOON,
        };
        Ok(Self { process, config, _dir: dir })
    }
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

/// Goal: what the simulation believes of a witness is so. Method: one script for both; of two endpoints the first is dead. For
/// etcd a lease runs out in its own time, and not before.
#[tokio::test]
async fn a_real_etcd_does_what_the_model_does() -> Result<()> {
    let real = Real::start()?;
    let etcd = Etcd::new(&real.config)?;
    let end = tokio::time::Instant::now() + SOON;
    while etcd.look(&[ONE]).await.is_err() {
        anyhow::ensure!(tokio::time::Instant::now() < end, "etcd does not answer");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let real_says = script(&etcd, async || {
        while etcd.look(&[ONE]).await.is_ok_and(|entries| entries[0].leased) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await?;
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
