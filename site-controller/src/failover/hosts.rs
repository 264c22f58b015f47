//! The KVM hosts of this site: how each is asked, and at which of them a VM is.
//! Promises: of several hosts, one that hangs or is gone holds nobody up for longer than a limit; a VM that may run at a host
//! which does not answer is never taken for one that runs nowhere. A host that is the only one is asked without a limit.
//! Called by whatever looks up a domain at this site.

use super::{
    journal::{JournalError, Phase, Placed, Record},
    placement::Promise,
};
use crate::config::HostConfig;
use futures_util::future::join_all;
use lifeboat::{
    hypervisor::libvirt::{DomainState, Hypervisor, HypervisorError},
    id::VmId,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, oneshot};

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("host {host} does not answer ({why})")]
    Away { host: String, why: String },
    #[error(
        "host {host} does not answer ({why}), and the replica of this VM may run there: it is started nowhere else. Bring the \
         host back and run the same command again; if it is off for good, see docs/operations.md, \"Several hosts\""
    )]
    MayRunThere { host: String, why: String },
    #[error(
        "host {host} ({uri}), at which this VM's replica was placed, is not in site.toml; write it there again"
    )]
    NotConfigured { host: String, uri: String },
    #[error("for this VM's replica no host was chosen yet")]
    NotPlaced,
    #[error("a task died: {0}")]
    Died(String),
}

/// One of them.
pub struct Host {
    pub name: String,
    /// Bytes of memory that no replica is given.
    pub(super) reserve: u64,
    hypervisor: Hypervisor,
    alone: bool,
    /// One question at a time; since when the one that is not answered yet was asked.
    turn: Arc<Semaphore>,
    asked: Arc<Mutex<Option<Instant>>>,
}

impl Host {
    fn new(config: &HostConfig, hypervisor: Hypervisor, alone: bool) -> Self {
        let (turn, asked) = (Arc::new(Semaphore::new(1)), Arc::default());
        let reserve = config.memory_reserve.0;
        Self { name: config.name.clone(), reserve, hypervisor, alone, turn, asked }
    }

    pub fn is_local(&self) -> bool {
        self.hypervisor.is_local()
    }

    pub fn uri(&self) -> &str {
        self.hypervisor.uri()
    }

    /// A question that is answered at once where all is well.
    pub async fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Hypervisor) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, HostError> {
        let hypervisor = self.hypervisor.clone();
        if self.alone {
            let answered = tokio::task::spawn_blocking(move || ask(&hypervisor)).await;
            return Ok(answered.map_err(|panic| HostError::Died(panic.to_string()))??);
        }
        let away = |why: String| HostError::Away { host: self.name.clone(), why };
        let asked = *lock(&self.asked);
        if let Some(silent) = asked.map(|at| at.elapsed()).filter(|silent| *silent > ANSWERS_WITHIN) {
            return Err(away(format!("it has been silent for {} s", silent.as_secs())));
        }
        match tokio::time::timeout(ANSWERS_WITHIN, self.by_a_thread(move || ask(&hypervisor))).await {
            Ok(Ok(Err(HypervisorError::ConnectionLost { words, .. }))) => Err(away(words)),
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(why)) => Err(HostError::Died(why)),
            Err(_) => Err(away(format!("it said nothing for {} s", ANSWERS_WITHIN.as_secs()))),
        }
    }

    /// In a thread of its own: one that hangs holds up neither those of others nor the daemon's end.
    async fn by_a_thread<T: Send + 'static>(
        &self,
        ask: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let turn = self.turn.clone().acquire_owned().await.map_err(|error| error.to_string())?;
        let (say, answer) = oneshot::channel();
        let asked = self.asked.clone();
        *lock(&asked) = Some(Instant::now());
        let thread = std::thread::Builder::new().name("host".into()).spawn(move || {
            let said = ask();
            *lock(&asked) = None;
            drop(turn);
            let _ = say.send(said);
        });
        if let Err(error) = thread {
            *lock(&self.asked) = None;
            return Err(error.to_string());
        }
        answer.await.map_err(|error| error.to_string())
    }

    /// Work that takes as long as it takes. Of several hosts, one that does not answer is not begun with.
    pub async fn work<T, E>(
        &self,
        work: impl FnOnce(&Hypervisor) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<HostError> + Send + 'static,
    {
        if !self.alone {
            self.ask(|hypervisor| hypervisor.version().map(drop)).await?;
        }
        let hypervisor = self.hypervisor.clone();
        let done = tokio::task::spawn_blocking(move || work(&hypervisor)).await;
        done.map_err(|panic| HostError::Died(panic.to_string()))?
    }

    /// `None`: it has no such domain.
    pub async fn state(&self, vm: VmId) -> Result<Option<DomainState>, HostError> {
        let state = move |hypervisor: &Hypervisor| hypervisor.domain_by_uuid(vm)?.state();
        self.ask(move |hypervisor| match state(hypervisor) {
            Ok(state) => Ok(Some(state)),
            Err(HypervisorError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }
}

/// All of them, in the order of site.toml; never none.
pub struct Hosts {
    all: Vec<Host>,
    /// One places at a time.
    pub(super) placing: tokio::sync::Mutex<()>,
    /// What was given to replicas that do not run yet.
    promised: Mutex<BTreeMap<VmId, Promise>>,
}

impl Hosts {
    /// Blocks. The only one must answer; of several, whichever is there is used.
    pub fn connect(configured: &[HostConfig]) -> Result<Self, HypervisorError> {
        let all = match configured {
            [only] => vec![Host::new(only, Hypervisor::connect(&only.uri)?, true)],
            several => {
                several.iter().map(|host| Host::new(host, Hypervisor::lazy(&host.uri), false)).collect()
            }
        };
        Ok(Self { all, placing: tokio::sync::Mutex::default(), promised: Mutex::default() })
    }

    pub fn all(&self) -> &[Host] {
        &self.all
    }

    pub fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// The host of a replica.
    pub fn at(&self, placed: Option<&Placed>) -> Result<&Host, HostError> {
        match (placed, self.all.as_slice()) {
            (Some(placed), _) => Ok(&self.all[self.index(placed)?]),
            (None, [only]) => Ok(only),
            (None, _) => Err(HostError::NotPlaced),
        }
    }

    /// By its URI, which is the host; or else by its name, where the way to it has changed.
    pub(super) fn index(&self, placed: &Placed) -> Result<usize, HostError> {
        let by_uri = self.all.iter().position(|host| host.uri() == placed.uri);
        let found = by_uri.or_else(|| self.all.iter().position(|host| host.name == placed.name));
        let (host, uri) = (placed.name.clone(), placed.uri.clone());
        found.ok_or(HostError::NotConfigured { host, uri })
    }

    /// Where the VM is, and how it stands there: where it runs, or else where it was placed, or else wherever it is defined.
    /// An error if it may run at a host that does not answer. `record` is that of its failover, if there is one.
    pub async fn whereabouts(
        &self,
        vm: VmId,
        record: Option<&Record>,
    ) -> Result<(&Host, Option<DomainState>), HostError> {
        let placed = record.and_then(|record| record.host.as_ref());
        let own = placed.map(|placed| self.index(placed)).transpose()?;
        if let Some(at) = own.or((!self.are_several()).then_some(0)) {
            let host = &self.all[at];
            match host.state(vm).await {
                Err(HostError::Away { .. }) => {}
                Err(error) => return Err(error),
                Ok(state) if host.alone || state.is_some_and(DomainState::is_active) => {
                    return Ok((host, state));
                }
                Ok(_) => {}
            }
        }
        let states: Vec<_> = join_all(self.all.iter().map(|host| host.state(vm))).await;
        let mut known = Vec::new();
        for (at, state) in states.into_iter().enumerate() {
            match state {
                Ok(Some(state)) if state.is_active() => return Ok((&self.all[at], Some(state))),
                Ok(state) => known.push((at, Ok(state))),
                Err(HostError::Away { host, why }) => known.push((at, Err((host, why)))),
                Err(error) => return Err(error),
            }
        }
        let may_run = |at: usize| match placed {
            Some(placed) => placed.started && own == Some(at),
            None => record.is_some_and(|record| record.phase >= Phase::Starting),
        };
        let mut best = (own.unwrap_or_default(), None);
        for (at, state) in known {
            match state {
                Err((host, why)) if may_run(at) => return Err(HostError::MayRunThere { host, why }),
                Err(_) => {}
                Ok(state) if own == Some(at) && state.is_some() => best = (at, state),
                Ok(state) if best.1.is_none() && state.is_some() => best = (at, state),
                Ok(_) => {}
            }
        }
        Ok((&self.all[best.0], best.1))
    }

    /// Ends what looks of a controller that died have left at hosts elsewhere; a host that is away keeps it until the
    /// next start. What is there for longer than a host may take to answer is nobody's any more.
    pub async fn sweep_looks(&self) {
        let sweep = async |host: &Host| {
            let left = host.ask(Hypervisor::looks).await?;
            if left.is_empty() {
                return Ok(0);
            }
            tokio::time::sleep(ANSWERS_WITHIN).await;
            host.ask(move |hypervisor| {
                let still = hypervisor.looks()?;
                let ours: Vec<&String> = left.iter().filter(|name| still.contains(name)).collect();
                ours.iter().try_for_each(|name| hypervisor.end_look(name))?;
                Ok(ours.len())
            })
            .await
        };
        let elsewhere = self.all.iter().filter(|host| !host.is_local());
        join_all(elsewhere.map(async |host| match sweep(host).await {
            Ok(0) => {}
            Ok(ended) => tracing::info!(host = host.name, ended, "ended storage pools that were made to look"),
            Err(HostError::Away { .. }) => {}
            Err(error) => {
                tracing::warn!(host = host.name, %error, "storage pools that were made to look may be left there")
            }
        }))
        .await;
    }

    /// What a replica was given is written down: it stays so until it runs.
    pub fn confirm(&self, vm: VmId) {
        if let Some(promise) = self.promised().get_mut(&vm) {
            promise.until = None;
        }
    }

    /// A replica that was given room runs, or will not.
    pub fn release(&self, vm: VmId) {
        self.promised().remove(&vm);
    }

    pub(super) fn promised(&self) -> MutexGuard<'_, BTreeMap<VmId, Promise>> {
        lock(&self.promised)
    }
}

/// A panic elsewhere leaves what these hold sound: each change of it is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::journal::tests::record;
    use lifeboat::units::ByteSize;

    fn config(name: &str, socket: &str) -> HostConfig {
        let uri = format!("qemu+unix:///system?socket={socket}");
        HostConfig { name: name.into(), uri, memory_reserve: ByteSize(0) }
    }

    fn placed(name: &str, socket: &str, started: bool) -> Placed {
        let HostConfig { name, uri, .. } = config(name, socket);
        Placed { name, uri, memory: 1, vcpus: 1, started }
    }

    /// Nobody listens at either.
    fn two() -> Hosts {
        Hosts::connect(&[config("one", "/nobody/1"), config("two", "/nobody/2")]).unwrap()
    }

    #[tokio::test]
    async fn what_may_run_at_a_host_that_does_not_answer_is_not_taken_for_gone_and_what_was_never_started_is()
    {
        let (hosts, mut record) = (two(), record());
        let of = async |record: Option<&Record>| hosts.whereabouts(VmId::from_bytes([4; 16]), record).await;
        assert!(matches!(of(None).await, Ok((_, None))));
        record.host = Some(placed("two", "/nobody/2", false));
        assert!(matches!(of(Some(&record)).await, Ok((_, None))));
        record.host = Some(placed("two", "/nobody/2", true));
        match of(Some(&record)).await {
            Err(HostError::MayRunThere { host, .. }) => assert_eq!(host, "two"),
            other => panic!("{:?}", other.map(|(host, state)| (host.name.clone(), state))),
        }
        // Of a release that wrote down no host: at any.
        (record.host, record.phase) = (None, Phase::Fenced);
        assert!(of(Some(&record)).await.is_ok());
        record.phase = Phase::Starting;
        assert!(matches!(of(Some(&record)).await, Err(HostError::MayRunThere { .. })));
    }

    #[tokio::test]
    async fn a_host_is_known_by_its_uri_or_else_by_its_name_and_one_that_is_neither_is_named() {
        let hosts = two();
        let name = |placed: &Placed| hosts.at(Some(placed)).map(|host| host.name.clone());
        assert_eq!(name(&placed("old-name", "/nobody/1", true)).unwrap(), "one");
        assert_eq!(name(&placed("two", "/moved", true)).unwrap(), "two");
        let gone = name(&placed("three", "/nobody/3", true)).unwrap_err().to_string();
        assert!(gone.contains("three") && gone.contains("site.toml"), "{gone}");
        assert!(matches!(hosts.at(None), Err(HostError::NotPlaced)));
        assert_eq!(hosts.strangers(&["one".into(), "kvm9".into(), config("", "/nobody/2").uri]), ["kvm9"]);
    }

    /// Method: the first question hangs for longer than the test waits.
    #[tokio::test(start_paused = true)]
    async fn a_host_that_hangs_is_waited_for_once_and_others_not_at_all() {
        let hosts = two();
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let hangs = hosts.all()[0].ask(move |_| {
            let _ = held.recv();
            Ok(())
        });
        let said = hangs.await.unwrap_err().to_string();
        assert!(said.contains("one") && said.contains("does not answer"), "{said}");
        let again = hosts.all()[0].ask(|_| Ok(())).await;
        assert!(matches!(again, Err(HostError::Away { .. })));
        tokio::time::resume();
        assert_eq!(hosts.all()[1].ask(|_| Ok(7)).await.unwrap(), 7);
        drop(let_go);
    }

    #[tokio::test]
    async fn where_no_host_can_take_a_replica_each_says_why() {
        use crate::failover::{error::FailoverError, placing::Wanted, replica_xml::Needs};
        let dir = tempfile::tempdir().unwrap();
        let wanted = Wanted {
            vm: VmId::from_bytes([4; 16]),
            name: "web".into(),
            needs: Needs::default(),
            hosts: vec!["two".into()],
            before: None,
            own_network: None,
        };
        let refused = two().place(&[wanted], dir.path(), true).await.unwrap_err();
        let FailoverError::NoHost { name, why } = refused else { panic!("{refused}") };
        assert!(name == "web" && why.contains("one: is not among `hosts`"), "{why}");
        assert!(why.contains("two: it does not answer"), "{why}");
    }
}
