//! Looks at the hosts of this site and decides which replica runs at which: all of one failover together, before anything is
//! stopped.
//! Promises: what a failover has decided it goes on with, wherever its controller died, as long as the host answers or the
//! replica may have been started there; room that was given to one is not given to another before it runs. Where there is
//! one host there is nothing to decide, and nothing is asked. Called by `runbook`, `group` through its trait, `drill`,
//! `readiness` and `api`.

use super::{
    error::FailoverError,
    hosts::{Host, HostError, Hosts},
    journal::{Manner, Phase, Placed, Record},
    placement::{self, Offer, Promise, Wish},
    preflight::{self, PreflightError},
    probe::{self, Probe},
    progress::Watcher,
    qemu_version::Takes,
    replica_xml::Needs,
    runbook::Runbook,
};
use crate::store::PointSummary;
use futures_util::future::join_all;
use lifeboat::{
    hypervisor::libvirt::{Hypervisor, HypervisorError, Load, XmlView},
    id::VmId,
    units::ByteSize,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A replica that is to run somewhere.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub vm: VmId,
    /// What its domain is called.
    pub name: String,
    pub needs: Needs,
    /// The runbook's `hosts`.
    pub hosts: Vec<String>,
    /// What its failover has decided before.
    pub before: Option<Placed>,
    /// A network that is made once the host is known.
    pub own_network: Option<String>,
}

/// A host that is not used now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PassedOver {
    pub host: String,
    pub why: String,
}

/// Where replicas run, or are to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// One for each that is wanted, in their order; all `None` where there is one host.
    pub placed: Vec<Option<Placed>>,
    pub passed_over: Vec<PassedOver>,
    /// Hosts that can't take one of them, by its number.
    pub unfit: Vec<(usize, PassedOver)>,
    /// Hosts that may take them, and whose libvirt can't say whether they see the folder.
    pub unchecked: Vec<String>,
    /// Of those whose memory the QEMU of their host may not take: their number, the host, and why.
    pub doubts: Vec<(usize, String, Takes)>,
}

/// What would be decided now, for whoever asks before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Foreseen {
    pub placed: Vec<ForeseenHost>,
    pub passed_over: Vec<PassedOver>,
    /// Why it would be refused.
    pub problem: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ForeseenHost {
    pub vm: String,
    pub host: String,
}

/// What is seen of a host: what it has, and for each replica what it lacks.
struct Seen {
    load: Load,
    /// It does not say whether it sees the replicas' folder.
    unchecked: bool,
    lacks: Vec<Option<String>>,
    takes: Vec<Takes>,
}

impl Placement {
    fn of_one_host(wanted: usize) -> Self {
        Self { placed: vec![None; wanted], ..Self::default() }
    }
}

impl Hosts {
    /// `folder` is where the replicas' disks are: each host must see it. What is decided is promised, if it is to be done.
    pub async fn place(
        &self,
        wanted: &[Wanted],
        folder: &Path,
        to_be_done: bool,
    ) -> Result<Placement, FailoverError> {
        if !self.are_several() {
            return Ok(Placement::of_one_host(wanted.len()));
        }
        let _alone = self.placing.lock().await;
        let seen = self.look(wanted, folder).await;
        let mut promised = self.promised();
        promised.retain(|_, promise| promise.until.is_none_or(|until| until > Instant::now()));
        for (at, seen) in seen.iter().enumerate() {
            let Ok(seen) = seen else { continue };
            promised.retain(|vm, promise| promise.host != at || !seen.load.guests.contains(vm));
            if wanted.iter().any(|of| of.before.is_none() && seen.load.guests.contains(&of.vm)) {
                return Err(PreflightError::AlreadyRunning.into());
            }
        }
        let (mut hosts, mut open) = (vec![None; wanted.len()], Vec::new());
        for (at, of) in wanted.iter().enumerate() {
            let before = of.before.as_ref().map(|before| Ok::<_, HostError>((self.index(before)?, before)));
            match before.transpose()? {
                Some((host, before)) if before.started || seen[host].is_ok() => {
                    hosts[at] = Some(host);
                    let runs = seen[host].as_ref().is_ok_and(|seen| seen.load.guests.contains(&of.vm));
                    if !runs {
                        promised.insert(of.vm, promise(host, &of.needs, None));
                    }
                }
                _ => open.push(at),
            }
        }
        let offers = self
            .offers(&seen, promised.iter().filter(|(vm, _)| !open.iter().any(|at| wanted[*at].vm == **vm)));
        let wishes = |surely| -> Vec<Wish> {
            open.iter().map(|at| self.wish(&wanted[*at], *at, &seen, surely)).collect()
        };
        // One that may go on is better than none.
        let given = placement::place(&offers, &wishes(true));
        let given = given.or_else(|_| placement::place(&offers, &wishes(false))).map_err(|stuck| {
            let at = open[stuck.wish];
            self.no_room(&wanted[at], at, &seen, &stuck.left)
        })?;
        for (at, host) in open.iter().zip(given) {
            hosts[*at] = Some(host);
            if to_be_done {
                let until = Instant::now() + BEGINS_WITHIN;
                promised.insert(wanted[*at].vm, promise(host, &wanted[*at].needs, Some(until)));
            }
        }
        let doubts = self.doubts(&hosts, &seen);
        let placed = wanted.iter().zip(hosts).map(|(of, host)| Some(self.placed(of, host?))).collect();
        let (passed_over, unfit) = (self.passed_over(&seen), self.unfit(wanted, &seen));
        Ok(Placement { placed, passed_over, unfit, unchecked: self.unchecked(&seen), doubts })
    }

    async fn look(&self, wanted: &[Wanted], folder: &Path) -> Vec<Result<Seen, String>> {
        let probe = self.all().iter().any(|host| !host.is_local()).then(|| Probe::put(folder)).transpose();
        let file = probe.as_ref().map(|probe| probe.as_ref().map(|probe| probe.file.clone()));
        let file = file.map_err(|error| format!("{}: {error}", folder.display()));
        join_all(self.all().iter().map(|host| async {
            let file = match (host.is_local(), &file) {
                (true, _) => None,
                (false, Ok(file)) => file.clone(),
                (false, Err(error)) => return Err(error.clone()),
            };
            look_at(host, wanted, file).await.map_err(|error| match error {
                FailoverError::Host(HostError::Away { why, .. }) => format!("it does not answer: {why}"),
                error => error.to_string(),
            })
        }))
        .await
    }

    fn offers<'a>(
        &self,
        seen: &[Result<Seen, String>],
        promised: impl Iterator<Item = (&'a VmId, &'a Promise)>,
    ) -> Vec<Offer> {
        let offer = |(host, seen): (&Host, &Result<Seen, String>)| match seen {
            Ok(Seen { load, .. }) => Offer {
                memory: load.memory.0.saturating_sub(host.reserve),
                cores: load.cores,
                vcpus: load.vcpus,
            },
            Err(_) => Offer { memory: 0, cores: 1, vcpus: 0 },
        };
        let mut offers: Vec<Offer> = self.all().iter().zip(seen).map(offer).collect();
        for (_, promise) in promised {
            if let Some(offer) = offers.get_mut(promise.host) {
                offer.memory = offer.memory.saturating_sub(promise.memory);
                offer.vcpus = offer.vcpus.saturating_add(promise.vcpus);
            }
        }
        offers
    }

    /// `surely`: not where QEMU is older than the one that saved its memory.
    fn wish(&self, of: &Wanted, at: usize, seen: &[Result<Seen, String>], surely: bool) -> Wish {
        let may = self.all().iter().zip(seen).map(|(host, seen)| {
            let fits = |seen: &Seen| seen.lacks[at].is_none() && !(surely && seen.takes[at].is_doubtful());
            seen.as_ref().is_ok_and(fits) && allows(&of.hosts, host)
        });
        Wish { memory: of.needs.memory, vcpus: of.needs.vcpus, may: may.collect() }
    }

    /// Says of each host why it can't take it.
    fn no_room(&self, of: &Wanted, at: usize, seen: &[Result<Seen, String>], left: &[u64]) -> FailoverError {
        let why = |(no, host): (usize, &Host)| {
            let why = match &seen[no] {
                _ if !allows(&of.hosts, host) => "is not among `hosts` of its runbook".to_owned(),
                Err(why) => why.clone(),
                Ok(Seen { lacks, .. }) if lacks[at].is_some() => lacks[at].clone().unwrap_or_default(),
                Ok(_) => format!(
                    "it takes {} of memory, and {} are left for replicas (what is free, without `memory_reserve`, {}, and what other \
                     replicas were given)",
                    ByteSize(of.needs.memory),
                    ByteSize(left.get(no).copied().unwrap_or_default()),
                    ByteSize(host.reserve)
                ),
            };
            format!("{}: {why}", host.name)
        };
        let why: Vec<String> = self.all().iter().enumerate().map(why).collect();
        FailoverError::NoHost { name: of.name.clone(), why: why.join("; ") }
    }

    fn placed(&self, of: &Wanted, at: usize) -> Placed {
        let host = &self.all()[at];
        let (name, uri) = (host.name.clone(), host.uri().to_owned());
        let started = of.before.as_ref().is_some_and(|before| before.started);
        Placed { name, uri, memory: of.needs.memory, vcpus: of.needs.vcpus, started }
    }

    fn passed_over(&self, seen: &[Result<Seen, String>]) -> Vec<PassedOver> {
        let pairs = self.all().iter().zip(seen);
        let over = |(host, seen): (&Host, &Result<Seen, String>)| {
            Some(PassedOver { host: host.name.clone(), why: seen.as_ref().err()?.clone() })
        };
        pairs.filter_map(over).collect()
    }

    fn unchecked(&self, seen: &[Result<Seen, String>]) -> Vec<String> {
        let pairs = self.all().iter().zip(seen);
        let doubtful = pairs.filter(|(_, seen)| seen.as_ref().is_ok_and(|seen| seen.unchecked));
        doubtful.map(|(host, _)| host.name.clone()).collect()
    }

    fn doubts(&self, hosts: &[Option<usize>], seen: &[Result<Seen, String>]) -> Vec<(usize, String, Takes)> {
        let doubt = |(at, host): (usize, &Option<usize>)| {
            let no = (*host)?;
            let takes = &seen[no].as_ref().ok()?.takes[at];
            (*takes != Takes::Yes).then(|| (at, self.all()[no].name.clone(), takes.clone()))
        };
        hosts.iter().enumerate().filter_map(doubt).collect()
    }

    fn unfit(&self, wanted: &[Wanted], seen: &[Result<Seen, String>]) -> Vec<(usize, PassedOver)> {
        let mut unfit = Vec::new();
        for (host, seen) in self.all().iter().zip(seen) {
            let Ok(seen) = seen else { continue };
            for (at, why) in seen.lacks.iter().enumerate().filter(|(at, _)| allows(&wanted[*at].hosts, host))
            {
                let over = why.clone().map(|why| PassedOver { host: host.name.clone(), why });
                unfit.extend(over.map(|over| (at, over)));
            }
        }
        unfit
    }

    /// Names in a runbook's `hosts` that are none of this site's.
    pub fn strangers<'a>(&self, hosts: &'a [String]) -> Vec<&'a str> {
        let known = |given: &&String| self.all().iter().any(|host| is_called(host, given));
        hosts.iter().filter(|given| !known(given)).map(String::as_str).collect()
    }
}

fn promise(host: usize, needs: &Needs, until: Option<Instant>) -> Promise {
    Promise { host, memory: needs.memory, vcpus: needs.vcpus, until }
}

/// Between the choice and what is written down of it stands, in a planned failover, the last cut.
const BEGINS_WITHIN: Duration = Duration::from_secs(600);

fn allows(hosts: &[String], host: &Host) -> bool {
    hosts.is_empty() || hosts.iter().any(|given| is_called(host, given))
}

fn is_called(host: &Host, given: &str) -> bool {
    host.name == given || host.uri() == given
}

async fn look_at(host: &Host, wanted: &[Wanted], probe: Option<PathBuf>) -> Result<Seen, FailoverError> {
    let wanted: Vec<Wanted> = wanted.to_vec();
    host.work(move |hypervisor| {
        let mut unchecked = false;
        if let Some(probe) = probe {
            match hypervisor.sees_file(&probe) {
                Ok(Some(true)) => {}
                Ok(None) => unchecked = true,
                Ok(Some(false)) => return Err(FailoverError::NotShared { why: String::new() }),
                Err(error @ HypervisorError::ConnectionLost { .. }) => return Err(error.into()),
                Err(error) => return Err(FailoverError::NotShared { why: format!(" ({error})") }),
            }
        }
        let load = hypervisor.load()?;
        let lacks = wanted.iter().map(|of| lack(hypervisor, of)).collect::<Result<_, _>>()?;
        let takes =
            wanted.iter().map(|of| Takes::of(hypervisor, &of.needs.machine, of.needs.saved_by)).collect();
        Ok(Seen { load, unchecked, lacks, takes })
    })
    .await
}

/// What this host does not have that the replica needs; of what it has, its memory is not looked at.
fn lack(hypervisor: &Hypervisor, of: &Wanted) -> Result<Option<String>, FailoverError> {
    let (_, problems) = preflight::problems(hypervisor, of.vm, &of.name, &of.needs)?;
    let problem = problems.into_iter().find(|problem| match problem {
        PreflightError::AlreadyRunning => false,
        PreflightError::NetworkMissing { name, .. } => of.own_network.as_ref() != Some(name),
        _ => true,
    });
    if let Some(problem) = problem {
        return Ok(Some(problem.to_string()));
    }
    let Some(cpu) = &of.needs.machine.cpu else { return Ok(None) };
    // Where it can't be told, QEMU says.
    let lacks = matches!(hypervisor.has_processor(cpu), Ok(false));
    Ok(lacks.then(|| "its processor lacks something that the guest was started with".into()))
}

impl Runbook {
    /// What a failover of the VM to this point asks of a host.
    pub async fn wanted(&self, point: &PointSummary, manner: &Manner) -> Result<Wanted, FailoverError> {
        let (needs, _) = self.needs_of(point, manner.clone()).await?;
        let needs = if point.stays_off && !manner.start_off { needs.idle() } else { needs };
        let before = self.journal.load(point.vm)?.filter(|record| record.phase < Phase::Running);
        let before = before.and_then(|record| record.host);
        let (vm, name, hosts) = (point.vm, point.name.clone(), manner.hosts.clone());
        Ok(Wanted { vm, name, needs, hosts, before, own_network: None })
    }

    /// Where replicas of these points are to run.
    pub async fn placement(
        &self,
        points: &[(PointSummary, Manner)],
        to_be_done: bool,
    ) -> Result<Placement, FailoverError> {
        if !self.hosts.are_several() {
            return Ok(Placement::of_one_host(points.len()));
        }
        let mut wanted = Vec::new();
        for (point, manner) in points {
            wanted.push(self.wanted(point, manner).await?);
        }
        self.hosts.place(&wanted, &self.replica_dir, to_be_done).await
    }

    /// The same, for whoever asks before; `None` where there is one host.
    pub async fn foresee(&self, points: &[(PointSummary, Manner)]) -> Option<Foreseen> {
        if !self.hosts.are_several() {
            return None;
        }
        Some(match self.placement(points, false).await {
            Ok(Placement { placed, passed_over, .. }) => {
                let pairs = points.iter().zip(placed);
                let host = |((point, _), placed): (&(PointSummary, Manner), Option<Placed>)| {
                    Some(ForeseenHost { vm: point.name.clone(), host: placed?.name })
                };
                Foreseen { placed: pairs.filter_map(host).collect(), passed_over, problem: None }
            }
            Err(error) => {
                Foreseen { placed: Vec::new(), passed_over: Vec::new(), problem: Some(error.to_string()) }
            }
        })
    }

    /// The same, to be done and told.
    pub(super) async fn place(
        &self,
        points: &[(PointSummary, Manner)],
        watcher: &Watcher,
    ) -> Result<Vec<Option<Placed>>, FailoverError> {
        if !self.hosts.are_several() {
            return Ok(vec![None; points.len()]);
        }
        watcher.step("choosing hosts");
        let Placement { placed, passed_over, unchecked, .. } = self.placement(points, true).await?;
        for PassedOver { host, why } in passed_over {
            watcher.step(format!("WARNING: host {host} is passed over: {why}"));
        }
        for host in unchecked {
            watcher.step(format!(
                "WARNING: the libvirt of host {host} can't say whether it sees the replicas' folder"
            ));
        }
        for ((point, _), placed) in points.iter().zip(&placed) {
            if let Some(placed) = placed {
                watcher.step(format!("{} goes to host {}", point.name, placed.name));
            }
        }
        Ok(placed)
    }

    /// Sees to it that a failover has a host: it keeps the one it has, unless that does not answer and nothing was started
    /// there. Where a release before this one, or a site of one host, began it, that is looked for.
    pub(super) async fn keep_or_place(
        &self,
        record: &mut Record,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        if !self.hosts.are_several() || record.phase == Phase::Running {
            return Ok(());
        }
        if record.host.is_none() && record.phase >= Phase::Starting {
            let (host, state) = self.hosts.whereabouts(record.vm, Some(record)).await?;
            if state.is_some() {
                let (name, uri) = (host.name.clone(), host.uri().to_owned());
                record.host = Some(Placed { name, uri, memory: 0, vcpus: 0, started: true });
                return Ok(self.journal.save(record)?);
            }
        }
        if let Some(placed) = &record.host {
            let answers = self.hosts.at(Some(placed))?.state(record.vm).await;
            match answers {
                Err(HostError::Away { host, why }) if placed.started => {
                    return Err(HostError::MayRunThere { host, why }.into());
                }
                Err(HostError::Away { .. }) => {}
                answer => return Ok(answer.map(drop)?),
            }
        }
        let point = self.catalog.find(record.vm, &record.point.to_string()).await?;
        let placed = self.place(&[(point, record.manner.clone())], watcher).await?;
        record.host = placed.into_iter().next().flatten();
        self.journal.save(record)?;
        self.hosts.confirm(record.vm);
        Ok(())
    }

    /// Definitions that earlier failovers of the VM left at other hosts: nobody is to start one beside the replica. Those of
    /// an operator's stay.
    pub(super) async fn undefine_elsewhere(&self, record: &Record) -> Result<(), FailoverError> {
        let Some(placed) = &record.host else { return Ok(()) };
        let (own, vm) = (self.hosts.index(placed)?, record.vm);
        let ours = self.replica_dir.join(vm.to_string()).to_string_lossy().into_owned();
        for (at, host) in self.hosts.all().iter().enumerate() {
            if at == own {
                continue;
            }
            let ours = ours.clone();
            let gone = host.ask(move |hypervisor| match hypervisor.domain_by_uuid(vm) {
                Ok(domain) if domain.state()?.is_active() => Ok(false),
                Ok(domain) if domain.xml(XmlView::Inactive)?.contains(&ours) => {
                    domain.undefine().map(|()| true)
                }
                Ok(_) | Err(HypervisorError::NotFound { .. }) => Ok(true),
                Err(error) => Err(error),
            });
            match gone.await {
                Ok(true) => {}
                Ok(false) => return Err(PreflightError::AlreadyRunning.into()),
                Err(error) => {
                    tracing::warn!(host = host.name, %error, "what an earlier failover defined there may be left")
                }
            }
        }
        Ok(())
    }

    /// What failovers that are not completed were promised, before the controller was started. Before any host is asked.
    pub fn recall_promises(&self) -> Result<(), FailoverError> {
        if !self.hosts.are_several() {
            return Ok(());
        }
        probe::sweep(&self.replica_dir);
        for vm in self.journal.vms()? {
            let Some(record) = self.journal.load(vm)?.filter(|record| record.phase < Phase::Running) else {
                continue;
            };
            let Some(placed) = &record.host else { continue };
            if let Ok(host) = self.hosts.index(placed) {
                self.hosts
                    .promised()
                    .insert(vm, Promise { host, memory: placed.memory, vcpus: placed.vcpus, until: None });
            }
        }
        Ok(())
    }
}
