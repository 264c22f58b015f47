//! Emergency failover of one VM, step by step: check, fence, restore, define, resume, confirm.
//! Promises: nothing is changed before the checks pass; the source is fenced before the replica starts; each step is in
//! the journal before the next begins, so that a controller that dies anywhere goes on when asked again; disks that a
//! replica may have run on are never written over. Called by `api`.

use super::{
    error::{FailoverError, name_of},
    hosts::Hosts,
    images,
    journal::{Journal, Manner, Phase, Placed, Record},
    preflight,
    progress::Watcher,
    report::FailoverReport,
    stonith::Stonith,
};
use crate::{catalog::Catalog, intake::session::Intake, store::Store};
use lifeboat::{clock::Clock, fault, hypervisor::libvirt::Hypervisor, id::VmId};
use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// How an operator names the newest point; also what is meant where none is named.
pub const LATEST: &str = "latest";

/// What an operator asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name or UUID.
    pub vm: String,
    /// `latest`, the beginning of an id, or a time.
    pub point: String,
    /// The operator knows that the source is off.
    pub skip_fence_command: bool,
    pub manner: Manner,
    /// Of several hosts the one that was chosen; without one it is chosen when it begins.
    pub host: Option<Placed>,
}

/// Fails VMs over at this site.
pub struct Runbook {
    pub store: Store,
    pub catalog: Catalog,
    pub intake: Arc<Intake>,
    pub hosts: Arc<Hosts>,
    pub journal: Journal,
    pub replica_dir: PathBuf,
    /// Ends a source.
    pub stonith: Stonith,
    pub clock: Arc<dyn Clock>,
    /// A program, with its arguments, that is run in each resumed guest whose runbook names none.
    pub guest_hook: Vec<String>,
    /// What this site is called.
    pub site: String,
    busy: Mutex<BTreeSet<VmId>>,
}

/// A VM's failover is this one's alone while it lives.
pub struct Claim<'a>(&'a Runbook, VmId);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.busy().remove(&self.1);
    }
}

impl Runbook {
    pub fn new(
        store: Store,
        catalog: Catalog,
        intake: Arc<Intake>,
        hosts: Arc<Hosts>,
        journal: Journal,
        replica_dir: PathBuf,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (stonith, busy) = (Stonith::default(), Mutex::default());
        let (guest_hook, site) = (Vec::new(), String::new());
        Self { store, catalog, intake, hosts, journal, replica_dir, stonith, clock, guest_hook, site, busy }
    }

    /// Runs a failover to its end, or takes up one that was interrupted.
    pub async fn emergency(
        &self,
        request: Request,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError> {
        let vm = self.catalog.which(&request.vm).await?;
        let _claim = self.claim(vm)?;
        let mut record = match self.journal.load(vm)? {
            Some(mut record) if record.phase == Phase::Running => {
                self.done_before(&record, &request).await?;
                self.give_addresses(&mut record, watcher).await?;
                self.after_resume(&mut record, watcher).await?;
                return Ok(FailoverReport::of(&record, true));
            }
            Some(record) => self.take_up(record, &request, watcher).await?,
            None => self.begin(vm, &request, watcher).await?,
        };
        record.manner = request.manner;
        let outcome = self.carry_out(&mut record, request.skip_fence_command, watcher).await;
        if let Err(error) = &outcome {
            record.last_error = Some(error.to_string());
            self.journal.save(&record)?;
        }
        outcome
    }

    /// A VM's failover is the caller's alone while it keeps what this gives.
    pub fn claim(&self, vm: VmId) -> Result<Claim<'_>, FailoverError> {
        if self.busy().insert(vm) { Ok(Claim(self, vm)) } else { Err(FailoverError::Busy) }
    }

    /// A new failover: decided, checked, and entered in the journal.
    pub(super) async fn begin(
        &self,
        vm: VmId,
        request: &Request,
        watcher: &Watcher,
    ) -> Result<Record, FailoverError> {
        watcher.step("choosing the point");
        let point = self.catalog.find(vm, &request.point).await?;
        let generation = self.store.generation(vm).await.next();
        let mut record = Record::new(&point, generation, self.clock.now());
        record.newest = request.point == LATEST;
        record.manner = request.manner.clone();
        record.host = match &request.host {
            None => {
                self.place(&[(point, request.manner.clone())], watcher).await?.into_iter().next().flatten()
            }
            chosen => chosen.clone(),
        };
        watcher.step("checking this site");
        let reader = self.reader(&record).await?;
        record.resumes = reader.plan().manifest.meta.has_memory();
        let (xml, _) = self.replica_xml(&reader, &record).await?;
        let needed = images::bytes_needed(&reader);
        let (dir, name) = (self.replica_dir.clone(), record.vm_name.clone());
        let check = move |hypervisor: &Hypervisor| -> Result<(), FailoverError> {
            preflight::check(hypervisor, vm, &name, &xml.needs, &dir, needed).map(drop).map_err(Into::into)
        };
        self.hosts.at(record.host.as_ref())?.work(check).await?;
        self.journal.save(&record)?;
        self.hosts.confirm(vm);
        fault::point("failover.begun");
        Ok(record)
    }

    /// An interrupted failover. Where its replica may already have run, its disks are left alone.
    pub(super) async fn take_up(
        &self,
        mut record: Record,
        request: &Request,
        watcher: &Watcher,
    ) -> Result<Record, FailoverError> {
        if self.names_another(&record, request).await? {
            return self.choose_anew(&record, request, watcher).await;
        }
        if request.point == LATEST && self.is_outdated(&record).await {
            watcher.step("newer points came since this failover was begun: taking the newest");
            return self.choose_anew(&record, request, watcher).await;
        }
        watcher.step(format!("taking up the failover that was begun at {}", record.started_at));
        if record.phase == Phase::Starting && !self.is_active(&record).await? {
            self.attempt_anew(&mut record)?;
        }
        Ok(record)
    }

    /// The newest point was asked for, and is another by now: the source had not been fenced, and came back. One that can't be
    /// restored is no reason to leave what was chosen.
    pub async fn is_outdated(&self, record: &Record) -> bool {
        record.newest
            && record.phase == Phase::Begun
            && self.catalog.find(record.vm, LATEST).await.is_ok_and(|newest| newest.seq > record.seq)
    }

    /// Another point than the one that was begun with, say because that one is damaged. As long as nothing was started
    /// that is safe: all that there is are files nobody uses.
    async fn choose_anew(
        &self,
        before: &Record,
        request: &Request,
        watcher: &Watcher,
    ) -> Result<Record, FailoverError> {
        if before.phase >= Phase::Starting {
            return Err(FailoverError::AnotherPoint { begun: before.point });
        }
        let mut record = self.begin(before.vm, request, watcher).await?;
        if !before.aside.is_empty() {
            record.aside.clone_from(&before.aside);
            self.journal.save(&record)?;
        }
        let left = self.attempt_dir(before);
        if left != self.attempt_dir(&record)
            && let Err(error) = std::fs::remove_dir_all(&left)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %left.display(), %error, "what the other point left could not be removed");
        }
        Ok(record)
    }

    /// What is left of one VM's failover, whatever it has come to.
    pub(super) async fn carry_out(
        &self,
        record: &mut Record,
        skip_fence_command: bool,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError> {
        self.keep_or_place(record, watcher).await?;
        self.fence(record, watcher).await?;
        self.stop_source(record, skip_fence_command, watcher).await?;
        self.restore(record, watcher).await?;
        self.go_on(record, watcher).await?;
        Ok(FailoverReport::of(record, false))
    }

    /// Says why not, if a failover that was completed can't be what is asked for.
    async fn done_before(&self, record: &Record, request: &Request) -> Result<(), FailoverError> {
        if self.names_another(record, request).await? {
            return Err(FailoverError::RunsFromAnother { point: record.point });
        }
        let (_, state) = self.hosts.whereabouts(record.vm, Some(record)).await?;
        if state.is_some_and(|state| state.is_active() || record.leaves_off()) {
            return Ok(());
        }
        let journal = self.journal.path(record.vm).display().to_string();
        Err(FailoverError::DoneBefore { point: record.point, state: name_of(state), journal })
    }

    /// Whether a point is asked for by name that is not the failover's. `latest` is what is meant where none is named.
    async fn names_another(&self, record: &Record, request: &Request) -> Result<bool, FailoverError> {
        if request.point == LATEST {
            return Ok(false);
        }
        Ok(self.catalog.find(record.vm, &request.point).await?.point != record.point)
    }

    /// Somebody is at it now.
    pub fn is_under_way(&self, vm: VmId) -> bool {
        self.busy().contains(&vm)
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, BTreeSet<VmId>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
