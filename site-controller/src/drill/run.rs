//! One drill from its beginning to its end.
//! Promises: one at a time; each step is written down before it is taken; whatever goes wrong, all that was made is removed
//! again, unless the replicas were to be kept. Called by `api` and `schedule`.

use super::record::{Check, DrillBook, DrillMember, DrillRecord, DrillState, TrialNetwork};
use crate::{
    catalog::{CatalogError, Selector},
    failover::{
        error::FailoverError,
        group::scripts,
        preflight::{self, PreflightError},
        progress::Watcher,
        runbook::Runbook,
    },
    group::{
        Group, GroupSpec, address_spec::Occasion, addresses::AddressRules, coordinator::Coordinator,
        points::GroupPointError,
    },
    store::PointSummary,
};
use futures_util::{FutureExt, StreamExt, stream};
use lifeboat::{error::chain, fault, id::VmId, units::Span};
use std::{io, sync::Arc, time::Duration};
use tokio::sync::Mutex;

/// Members that are restored side by side, as in a failover.
const SIDE_BY_SIDE: usize = 2;

#[derive(Clone, Debug)]
pub struct Request {
    /// A group, or a VM.
    pub name: String,
    pub point: String,
    /// Its replicas run on until they are ended.
    pub keep: bool,
    pub scheduled: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Points(#[from] GroupPointError),
    #[error(
        "group `{group}` has no point `{point}` that holds all its members; `lifeboat group points` lists them"
    )]
    NoPoint { group: String, point: String },
    #[error("a drill is under way at this site; wait for it (`lifeboat drills`)")]
    Busy,
    #[error("no drill of `{0}` has replicas that still run")]
    NothingKept(String),
    #[error(transparent)]
    Replica(Box<FailoverError>),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error("the drill's record: {0}")]
    Record(#[from] io::Error),
}

impl From<FailoverError> for DrillError {
    fn from(error: FailoverError) -> Self {
        Self::Replica(Box::new(error))
    }
}

/// Runs drills at this site.
pub struct Driller {
    pub runbook: Arc<Runbook>,
    pub coordinator: Arc<Coordinator>,
    pub book: DrillBook,
    pub(super) busy: Mutex<()>,
}

impl Driller {
    pub fn new(runbook: Arc<Runbook>, coordinator: Arc<Coordinator>, book: DrillBook) -> Self {
        Self { runbook, coordinator, book, busy: Mutex::default() }
    }

    /// An error where it could not begin; what goes wrong afterwards is in its record.
    pub async fn run(&self, request: &Request, watcher: &Watcher) -> Result<DrillRecord, DrillError> {
        let _alone = self.busy.try_lock().map_err(|_| DrillError::Busy)?;
        let (group, points) = self.meant(request).await?;
        let mut record = self.begin(&group, points, request).await?;
        fault::point("drill.begun");
        if let Err(error) = self.try_out(&mut record, &group.spec, watcher).await {
            record.errors.push(chain(&error));
        }
        watcher.step("keeping what they showed");
        self.keep_evidence(&mut record).await;
        record.passed = record.errors.is_empty() && record.checks.iter().all(|check| check.failed.is_none());
        if request.keep && record.members.iter().any(|member| member.running_ms.is_some()) {
            record.state = DrillState::Kept;
            self.step(&mut record, watcher, "the replicas run on")?;
            return Ok(record);
        }
        record.state = DrillState::Done;
        watcher.step("removing all of it");
        self.tear_down(&mut record).await;
        self.forget_old(&group);
        Ok(record)
    }

    /// The group, or the VM as a group of one, and the point of each member.
    async fn meant(&self, request: &Request) -> Result<(Group, Vec<PointSummary>), DrillError> {
        let (catalog, now) = (&self.runbook.catalog, self.runbook.clock.now());
        let Ok(group) = self.coordinator.book.find(&request.name) else {
            let vm = catalog.which(&request.name).await?;
            let point = catalog.find(vm, &request.point).await?;
            return Ok((self.by_itself(vm, &point), vec![point]));
        };
        let selector = Selector::parse(&request.point, now)?;
        let found = self.coordinator.points.select(&group, &selector).await?;
        let no_point =
            || DrillError::NoPoint { group: group.spec.name.clone(), point: request.point.clone() };
        let mut points = Vec::new();
        for of in found.ok_or_else(no_point)?.members.iter().filter(|of| group.has(of.vm)) {
            points.push(catalog.find(of.vm, &of.point.to_string()).await?);
        }
        Ok((group, points))
    }

    /// What its group's runbook says of a VM holds for a drill of it alone as well.
    fn by_itself(&self, vm: VmId, point: &PointSummary) -> Group {
        let now = self.runbook.clock.now();
        let Some(whole) = self.coordinator.book.group_of(vm) else {
            return Group::alone(vm, &point.name, now);
        };
        let name = whole.members.iter().find(|member| member.vm == vm).map(|member| member.name.clone());
        let name = name.unwrap_or_else(|| point.name.clone());
        let mut group = Group::alone(vm, &name, now);
        let mut steps = whole.spec.runbook.vm.get(&name).cloned().unwrap_or_default();
        steps.after.clear();
        group.spec.runbook = whole.spec.runbook;
        group.spec.runbook.vm = [(name, steps)].into();
        group
    }

    async fn begin(
        &self,
        group: &Group,
        points: Vec<PointSummary>,
        request: &Request,
    ) -> Result<DrillRecord, DrillError> {
        let now = self.runbook.clock.now();
        let id: String =
            VmId::from_bytes(*uuid::Uuid::new_v4().as_bytes()).to_string().chars().take(8).collect();
        let member = |point: &PointSummary| {
            let name = group.members.iter().find(|member| member.vm == point.vm);
            let name = name.map_or_else(|| point.name.clone(), |member| member.name.clone());
            DrillMember {
                vm: point.vm,
                as_name: format!("{}-drill-{id}", point.name),
                name,
                point: point.point,
                seq: point.seq,
                cut_at: point.cut_at,
                as_vm: VmId::from_bytes(*uuid::Uuid::new_v4().as_bytes()),
                host: None,
                resumes: point.has_memory,
                left_off: point.stays_off,
                restored_ms: None,
                running_ms: None,
                up_ms: None,
                after_resume: Vec::new(),
                address_rules: AddressRules::default(),
                addresses: Vec::new(),
                console: None,
                screen: None,
            }
        };
        let mut members: Vec<DrillMember> = points.iter().map(member).collect();
        for member in &mut members {
            // What was checked when the group was made.
            member.address_rules = group.spec.addresses(&member.name, Occasion::Drill).unwrap_or_default();
        }
        let mut has_cards = false;
        for member in &members {
            has_cards |= self.has_cards(member).await?;
        }
        let given = group.spec.runbook.drill_network.clone();
        let network = has_cards.then(|| TrialNetwork {
            ours: given.is_none(),
            name: given.unwrap_or_else(|| format!("drill-{id}")),
            missing: false,
        });
        let cut_at = members.iter().map(|member| member.cut_at).min().unwrap_or(now);
        let record = DrillRecord {
            version: DrillRecord::VERSION,
            name: group.spec.name.clone(),
            group: group.id,
            scheduled: request.scheduled,
            state: DrillState::Running,
            passed: false,
            step: "beginning".into(),
            members,
            network,
            dir: self.runbook.replica_dir.join(format!("drill-{id}")),
            id,
            cut_at,
            started_at: now,
            up_at: None,
            ended_at: None,
            rpo_ms: now.0.saturating_sub(cut_at.0),
            rto_ms: None,
            checks: Vec::new(),
            notes: Vec::new(),
            errors: Vec::new(),
            torn_down: false,
        };
        self.book.save(&record)?;
        Ok(record)
    }

    async fn try_out(
        &self,
        record: &mut DrillRecord,
        spec: &GroupSpec,
        watcher: &Watcher,
    ) -> Result<(), DrillError> {
        self.choose_hosts(record, spec, watcher).await?;
        self.make_network(record, watcher).await?;
        fault::point("drill.network");
        self.step(record, watcher, "checking this site")?;
        let (mut memory, mut bytes) = (0u64, 0u64);
        for member in &record.members {
            let (needs, takes) = self.check(record, member).await?;
            memory = memory.saturating_add(needs.memory);
            bytes = bytes.saturating_add(takes);
        }
        // What runs here must not feel it. Of several hosts each was looked at when it was chosen.
        if !self.runbook.hosts.are_several() {
            preflight::memory(memory)?;
        }
        preflight::room(&self.runbook.replica_dir, bytes)?;
        self.step(record, watcher, "restoring")?;
        self.restore_all(record, watcher).await?;
        fault::point("drill.restored");
        let rows = spec.starts().unwrap_or_else(|_| vec![spec.vms.clone()]);
        for name in rows.iter().flatten() {
            let Some(at) = record.members.iter().position(|member| member.name == *name) else { continue };
            if record.members[at].left_off {
                record.notes.push(format!(
                    "{name}: it was off, so that its disks were restored and nothing was started"
                ));
                record.members[at].up_ms = record.members[at].restored_ms;
                continue;
            }
            self.step(record, watcher, &format!("starting {name}"))?;
            self.start(record, at, spec).await?;
            self.wait(record, at, spec, watcher).await;
        }
        let now = self.runbook.clock.now();
        record.up_at = Some(now);
        record.rto_ms = Some(now.0.saturating_sub(record.started_at.0));
        for command in &spec.drill.checks {
            self.step(record, watcher, &format!("running {}", command.first().map_or("", String::as_str)))?;
            let failed = self.check_by(record, spec, command).await.err();
            record.checks.push(Check { command: command.clone(), failed });
        }
        self.step(record, watcher, "all are up and were checked")?;
        fault::point("drill.checked");
        Ok(())
    }

    /// One that leads nowhere, and nobody else is on. Where none can be made, all cables are out.
    async fn make_network(&self, record: &mut DrillRecord, watcher: &Watcher) -> Result<(), DrillError> {
        let Some(name) = record.network.as_ref().filter(|network| network.ours).map(|of| of.name.clone())
        else {
            return Ok(());
        };
        self.step(record, watcher, "making a network")?;
        // Without an address of the host's on it, the host is not on it either.
        let xml = format!(
            "<network><name>{name}</name><bridge name='lbd{}' stp='off' delay='0'/><dns enable='no'/></network>",
            record.id
        );
        for host in self.hosts_of(record).map_err(FailoverError::from)? {
            let xml = xml.clone();
            let made = host
                .work(move |hypervisor| Ok::<_, FailoverError>(hypervisor.start_transient_network(&xml)?));
            if let Err(error) = made.await {
                record.notes.push(format!("no network could be made, so that all cables are out: {error}"));
                if let Some(network) = &mut record.network {
                    network.missing = true;
                }
                return Ok(self.book.save(record)?);
            }
        }
        Ok(())
    }

    async fn restore_all(&self, record: &mut DrillRecord, watcher: &Watcher) -> Result<(), DrillError> {
        let before = record.clone();
        let mut all = Vec::new();
        for (at, member) in before.members.iter().enumerate() {
            let (watcher, before) = (watcher.of(&member.name), &before);
            all.push(async move { (at, self.restore(before, member, &watcher).await) }.boxed());
        }
        let done: Vec<_> = stream::iter(all).buffer_unordered(SIDE_BY_SIDE).collect().await;
        for (at, restored) in done {
            record.members[at].restored_ms = Some(restored?);
        }
        Ok(())
    }

    async fn check_by(
        &self,
        record: &DrillRecord,
        spec: &GroupSpec,
        command: &[String],
    ) -> Result<(), String> {
        let replicas: Vec<String> =
            record.members.iter().map(|member| format!("{}={}", member.name, member.as_name)).collect();
        let hosts = record.members.iter();
        let hosts: Vec<String> =
            hosts.filter_map(|member| Some(format!("{}={}", member.name, member.host_name()?))).collect();
        let network = record.network.as_ref().filter(|network| !network.missing);
        let env = [
            ("LIFEBOAT_GROUP", record.name.clone()),
            ("LIFEBOAT_KIND", "drill".to_owned()),
            ("LIFEBOAT_DRILL", record.id.clone()),
            ("LIFEBOAT_POINT", record.cut_at.to_string()),
            ("LIFEBOAT_REPLICAS", replicas.join(" ")),
            ("LIFEBOAT_HOSTS", hosts.join(" ")),
            ("LIFEBOAT_NETWORK", network.map(|network| network.name.clone()).unwrap_or_default()),
        ];
        let limit = spec.runbook.script_limit.parse::<Span>();
        scripts::run(command, &env, limit.map_or(Duration::from_secs(60), |span| span.0)).await
    }

    pub(super) fn step(
        &self,
        record: &mut DrillRecord,
        watcher: &Watcher,
        step: &str,
    ) -> Result<(), DrillError> {
        watcher.step(step);
        step.clone_into(&mut record.step);
        Ok(self.book.save(record)?)
    }

    /// Evidence of the group's that is older than it wants to keep.
    fn forget_old(&self, group: &Group) {
        let Some(keep_for) = group.spec.drill.keep_for.as_ref().and_then(|span| span.parse::<Span>().ok())
        else {
            return;
        };
        let now = self.runbook.clock.now();
        for record in self.book.list().iter().filter(|record| record.group == group.id && record.torn_down) {
            let age = Duration::from_millis(now.0.saturating_sub(record.started_at.0));
            if age > keep_for.0
                && let Err(error) = self.book.forget(record)
            {
                tracing::warn!(drill = record.id, %error, "old evidence could not be removed");
            }
        }
    }
}
