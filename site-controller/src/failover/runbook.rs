//! Emergency failover of one VM, step by step: check, fence, restore, define, resume, confirm.
//! Promises: nothing is changed before the checks pass; the source is fenced before the replica starts; each step is in
//! the journal before the next begins, so that a controller that dies anywhere goes on when asked again; disks that a
//! replica may have run on are never written over. Called by `api`.

use super::{
    images::{self, ImageError},
    journal::{Journal, JournalError, Phase, Record},
    preflight::{self, PreflightError},
    progress::{FailoverReport, Watcher},
    replica_xml::{self, XmlError},
};
use crate::{
    catalog::{Catalog, CatalogError},
    intake::session::Intake,
    restore::{Plan, Reader, RestoreError},
    store::{Store, StoreError},
};
use lifeboat::{
    clock::Clock,
    fault,
    format::manifest::{ImageKind, blob},
    hypervisor::libvirt::{Domain, DomainState, Hypervisor, HypervisorError, StartAs},
    id::{PointId, VmId},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
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
    /// If the point's memory does not go on, leave it at that.
    pub no_cold_boot: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum FailoverError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Xml(#[from] XmlError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("a failover of this VM is under way; wait for it")]
    Busy,
    #[error(
        "a failover of this VM to point {begun} has come as far as starting the replica, whose disks may have changed \
         since; run it again with `--point {begun}` (or without --point) to finish it"
    )]
    AnotherPoint { begun: PointId },
    #[error(
        "this VM has been failed over to point {point}; another point can't be taken, for its replica may have worked \
         since. To discard the replica, destroy and undefine it, and move its failover journal away"
    )]
    RunsFromAnother { point: PointId },
    #[error(
        "this VM was failed over to point {point} and its replica is {state} now; start it with `virsh start`, or undefine \
         it and move {journal} away to fail over afresh"
    )]
    DoneBefore { point: PointId, state: String, journal: String },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the replica did not stay up: it is {state} right after its start; see libvirt's log of it")]
    DidNotRun { state: String },
    #[error("the replica {grief} right after its resume; see libvirt's log of it")]
    WentWrong { grief: &'static str },
    #[error("a task of the failover died: {0}")]
    Died(String),
}

/// Fails VMs over at this site.
pub struct Runbook {
    pub store: Store,
    pub catalog: Catalog,
    pub intake: Arc<Intake>,
    pub hypervisor: Hypervisor,
    pub journal: Journal,
    pub replica_dir: PathBuf,
    pub clock: Arc<dyn Clock>,
    /// A program, with its arguments, that is run in each resumed guest which has an agent.
    pub guest_hook: Vec<String>,
    busy: Mutex<BTreeSet<VmId>>,
}

/// A VM's failover is this one's alone while it lives.
struct Claim<'a>(&'a Runbook, VmId);

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
        hypervisor: Hypervisor,
        journal: Journal,
        replica_dir: PathBuf,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let guest_hook = Vec::new();
        let busy = Mutex::default();
        Self { store, catalog, intake, hypervisor, journal, replica_dir, clock, guest_hook, busy }
    }

    /// Runs a failover to its end, or takes up one that was interrupted.
    pub async fn emergency(
        &self,
        request: Request,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError> {
        let vm = self.catalog.which(&request.vm).await?;
        if !self.busy().insert(vm) {
            return Err(FailoverError::Busy);
        }
        let _claim = Claim(self, vm);
        let mut record = match self.journal.load(vm)? {
            Some(record) if record.phase == Phase::Running => {
                return self.done_before(&record, &request).await;
            }
            Some(record) => self.take_up(record, &request, watcher).await?,
            None => self.begin(vm, &request, watcher).await?,
        };
        record.no_cold_boot = request.no_cold_boot;
        let outcome = self.carry_out(&mut record, watcher).await;
        if let Err(error) = &outcome {
            record.last_error = Some(error.to_string());
            self.journal.save(&record)?;
        }
        outcome
    }

    /// A new failover: decided, checked, and entered in the journal.
    async fn begin(&self, vm: VmId, request: &Request, watcher: &Watcher) -> Result<Record, FailoverError> {
        watcher.step("choosing the point");
        let point = self.catalog.find(vm, &request.point).await?;
        let mut record = Record {
            version: Record::VERSION,
            vm,
            vm_name: point.name.clone(),
            kind: "emergency".into(),
            point: point.point,
            seq: point.seq,
            cut_at: point.cut_at,
            generation: self.store.generation(vm).await.next(),
            resumes: true,
            phase: Phase::Begun,
            attempt: 1,
            started_at: self.clock.now(),
            running_at: None,
            disks_done: Vec::new(),
            last_error: None,
            cold_boot: None,
            no_cold_boot: request.no_cold_boot,
            after_resume: Vec::new(),
        };
        watcher.step("checking this site");
        let reader = self.reader(&record).await?;
        record.resumes = reader.plan().manifest.meta.has_memory();
        let (xml, _) = self.replica_xml(&reader, &record).await?;
        let needed = images::bytes_needed(&reader);
        let (hypervisor, dir, name) =
            (self.hypervisor.clone(), self.replica_dir.clone(), record.vm_name.clone());
        blocking(move || {
            preflight::check(&hypervisor, vm, &name, &xml.needs, &dir, needed).map(drop).map_err(Into::into)
        })
        .await?;
        self.journal.save(&record)?;
        fault::point("failover.begun");
        Ok(record)
    }

    /// An interrupted failover. Where its replica may already have run, its disks are left alone.
    async fn take_up(
        &self,
        mut record: Record,
        request: &Request,
        watcher: &Watcher,
    ) -> Result<Record, FailoverError> {
        if self.names_another(&record, request).await? {
            return self.choose_anew(&record, request, watcher).await;
        }
        watcher.step(format!("taking up the failover that was begun at {}", record.started_at));
        if record.phase == Phase::Starting
            && !self.domain_state(record.vm).await?.is_some_and(DomainState::is_active)
        {
            record.attempt += 1;
            record.phase = Phase::Fenced;
            record.disks_done.clear();
            self.journal.save(&record)?;
        }
        Ok(record)
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
        let record = self.begin(before.vm, request, watcher).await?;
        let left = self.attempt_dir(before);
        if left != self.attempt_dir(&record)
            && let Err(error) = std::fs::remove_dir_all(&left)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %left.display(), %error, "what the other point left could not be removed");
        }
        Ok(record)
    }

    async fn carry_out(
        &self,
        record: &mut Record,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError> {
        let reader = self.reader(record).await?;
        if record.phase < Phase::Fenced {
            watcher.step("fencing the source");
            self.store.raise_to(record.vm, record.generation).await?;
            if let Some(slot) = self.intake.slots.find(record.vm) {
                slot.fence(record.generation).await;
            }
            self.intake.board.fenced(record.vm);
            self.enter(record, Phase::Fenced)?;
            fault::point("failover.fenced");
        }
        if record.phase < Phase::Restored {
            let begun = self.clock.now();
            self.restore(record, &reader, watcher).await?;
            let ms = self.clock.now().0.saturating_sub(begun.0);
            tracing::info!(bytes = images::bytes_needed(&reader), ms, "disks and memory are restored");
            self.enter(record, Phase::Restored)?;
            fault::point("failover.restored");
        }
        if record.phase < Phase::Running {
            let active = self.domain_state(record.vm).await?.is_some_and(DomainState::is_active);
            let was_started = record.phase == Phase::Starting && active;
            self.start_or_boot(record, &reader, was_started, watcher).await?;
            record.running_at = Some(self.clock.now());
            record.last_error = None;
            self.enter(record, Phase::Running)?;
            fault::point("failover.running");
            // The memory image has served; the disks are the replica's now.
            let image = self.memory_image(record);
            if let Err(error) = std::fs::remove_file(&image)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %image.display(), %error, "the memory image could not be removed");
            }
        }
        self.after_resume(record, &reader, watcher).await?;
        Ok(FailoverReport::of(record, false))
    }

    /// Disks, then memory, into this attempt's folder.
    pub(super) async fn restore(
        &self,
        record: &mut Record,
        reader: &Reader,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let dir = self.attempt_dir(record);
        std::fs::create_dir_all(&dir).map_err(|source| FailoverError::File { path: dir.clone(), source })?;
        let (xml, disks) = self.replica_xml(reader, record).await?;
        for (target, path) in &disks {
            if record.disks_done.contains(target) {
                continue;
            }
            watcher.step(format!("restoring disk {target}"));
            images::write_disk(reader, target, path, watcher).await?;
            record.disks_done.push(target.clone());
            self.journal.save(record)?;
            fault::point("failover.disk");
        }
        let meta = &reader.plan().manifest.meta;
        if record.resumes {
            watcher.step("composing the memory image");
            let image = self.memory_image(record);
            images::write_save_image(reader, xml.xml, meta.was_running, &image, watcher).await?;
        }
        Ok(())
    }

    /// Defines the replica, so that it is there after a reboot too, and lets it go on.
    pub(super) async fn start(
        &self,
        record: &mut Record,
        reader: &Reader,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let (active, disks) = self.replica_xml(reader, record).await?;
        let definition = match reader.plan().image(ImageKind::Blob, blob::DEFINITION_XML) {
            Some(_) => {
                let text = images::text_blob(reader, blob::DEFINITION_XML).await?;
                // A disk attached or detached only live makes the definition differ; then the running form is defined.
                replica_xml::rewrite(&text, &disks).unwrap_or(active)
            }
            None => active,
        };
        watcher.step("defining the replica");
        let (hypervisor, xml) = (self.hypervisor.clone(), definition.xml);
        let domain = blocking(move || Ok(hypervisor.define(&xml)?)).await?;
        fault::point("failover.defined");
        self.enter(record, Phase::Starting)?;
        fault::point("failover.starting");
        let was_running = reader.plan().manifest.meta.was_running;
        if record.resumes {
            watcher.step("resuming the replica");
            let image = self.memory_image(record).to_string_lossy().into_owned();
            let hypervisor = self.hypervisor.clone();
            let start_as = if was_running { StartAs::Running } else { StartAs::Paused };
            blocking(move || Ok(hypervisor.restore(&image, None, start_as)?)).await?;
        } else {
            watcher.step("booting the replica from the point's disks");
            blocking(move || Ok(domain.start()?)).await?;
        }
        fault::point("failover.started");
        Ok(())
    }

    pub(super) async fn confirm(&self, record: &Record, watcher: &Watcher) -> Result<(), FailoverError> {
        watcher.step("confirming that it runs");
        match self.domain_state(record.vm).await? {
            Some(state) if state.is_active() => Ok(()),
            state => Err(FailoverError::DidNotRun { state: name_of(state) }),
        }
    }

    async fn done_before(&self, record: &Record, request: &Request) -> Result<FailoverReport, FailoverError> {
        if self.names_another(record, request).await? {
            return Err(FailoverError::RunsFromAnother { point: record.point });
        }
        let state = self.domain_state(record.vm).await?;
        if state.is_some_and(DomainState::is_active) {
            return Ok(FailoverReport::of(record, true));
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

    async fn reader(&self, record: &Record) -> Result<Reader, FailoverError> {
        // Pinned, until the journal names the point.
        let plan = Plan::of(&self.store, record.vm, record.seq).await?;
        Ok(Reader::new(self.store.objects().clone(), Arc::new(plan)))
    }

    /// The replica's XML, and where this attempt's disks are.
    async fn replica_xml(
        &self,
        reader: &Reader,
        record: &Record,
    ) -> Result<(replica_xml::Rewritten, BTreeMap<String, PathBuf>), FailoverError> {
        let dir = self.attempt_dir(record);
        let disks = reader.plan().images().iter().filter(|planned| planned.image.kind == ImageKind::Disk);
        let disks: BTreeMap<String, PathBuf> =
            disks.map(|disk| (disk.image.name.clone(), dir.join(file_name(&disk.image.name)))).collect();
        let xml = images::text_blob(reader, blob::DOMAIN_XML).await?;
        Ok((replica_xml::rewrite(&xml, &disks)?, disks))
    }

    pub(super) async fn domain_state(&self, vm: VmId) -> Result<Option<DomainState>, FailoverError> {
        let hypervisor = self.hypervisor.clone();
        blocking(move || match hypervisor.domain_by_uuid(vm).and_then(|domain: Domain| domain.state()) {
            Ok(state) => Ok(Some(state)),
            Err(HypervisorError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        })
        .await
    }

    pub(super) fn enter(&self, record: &mut Record, phase: Phase) -> Result<(), FailoverError> {
        record.phase = phase;
        Ok(self.journal.save(record)?)
    }

    fn attempt_dir(&self, record: &Record) -> PathBuf {
        self.replica_dir.join(record.vm.to_string()).join(format!("{}-{}", record.generation, record.attempt))
    }

    pub(super) fn memory_image(&self, record: &Record) -> PathBuf {
        self.attempt_dir(record).join("memory.save")
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, BTreeSet<VmId>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file name for disk `target`, whose name came from a source host.
fn file_name(target: &str) -> PathBuf {
    let mut safe = String::new();
    for byte in target.bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => safe.push(char::from(byte)),
            other => safe.push_str(&format!("_{other:02x}")),
        }
    }
    Path::new(&safe).with_extension("raw")
}

fn name_of(state: Option<DomainState>) -> String {
    state.map_or_else(|| "gone".to_owned(), |state| format!("{state:?}").to_lowercase())
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FailoverError> + Send + 'static,
) -> Result<T, FailoverError> {
    tokio::task::spawn_blocking(work).await.map_err(|panic| FailoverError::Died(panic.to_string()))?
}
