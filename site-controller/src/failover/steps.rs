//! What a failover does for one VM, step by step: fence, stop the source, restore, start, confirm. Each step knows by the
//! record whether it was done before, and enters in the journal that it is; so each may be asked for again after a crash,
//! and a planned failover may restore before it fences. Called by `runbook` for one VM, by `group` for several.

use super::{
    attempt::disk_files,
    cold_boot::TRIES,
    error::{FailoverError, name_of},
    images,
    journal::{Manner, Phase, Record},
    progress::Watcher,
    qemu_version::SavedBy,
    replica_xml::{self, Needs, Place},
    runbook::Runbook,
    waits,
};
use crate::{
    restore::{Plan, Reader},
    store::PointSummary,
};
use lifeboat::{
    fault,
    format::manifest::{ImageKind, blob},
    hypervisor::libvirt::{DomainState, Hypervisor, StartAs},
    id::VmId,
    units::Seq,
};
use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc};

impl Runbook {
    /// From here on the source's agent is refused.
    pub(super) async fn fence(&self, record: &mut Record, watcher: &Watcher) -> Result<(), FailoverError> {
        if record.phase >= Phase::Fenced {
            return Ok(());
        }
        watcher.step("fencing the source");
        self.store.raise_to(record.vm, record.generation).await?;
        if let Some(slot) = self.intake.slots.find(record.vm) {
            slot.fence(record.generation).await;
        }
        self.intake.board.fenced(record.vm);
        self.enter(record, Phase::Fenced)?;
        fault::point("failover.fenced");
        Ok(())
    }

    /// Before the replica starts, once for each failover that gets past it; more often only where a controller died.
    pub(super) async fn stop_source(
        &self,
        record: &mut Record,
        skip: bool,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        if record.source_stopped {
            return Ok(());
        }
        if !self.stonith.command.is_empty() && !skip {
            watcher.step("stopping the source (fence_command)");
            let owner = self.store.owner(record.vm).await.ok().flatten();
            let agent = owner.as_ref().map_or("", |owner| owner.agent());
            self.stonith.run(&record.vm_name, &record.vm.to_string(), agent).await?;
            fault::point("failover.source-stopped");
        }
        record.source_stopped = true;
        Ok(self.journal.save(record)?)
    }

    /// Disks and memory, into this attempt's folder.
    pub(super) async fn restore(&self, record: &mut Record, watcher: &Watcher) -> Result<(), FailoverError> {
        if !record.restored && record.phase < Phase::Restored {
            let reader = self.reader(record).await?;
            let begun = self.clock.now();
            self.write_images(record, &reader, watcher, |record| Ok(self.journal.save(record)?)).await?;
            let ms = self.clock.now().0.saturating_sub(begun.0);
            tracing::info!(bytes = images::bytes_needed(&reader), ms, "disks and memory are restored");
            record.restored = true;
            self.journal.save(record)?;
        }
        // Before the source is fenced, that is all that may be said.
        if record.phase == Phase::Fenced {
            self.enter(record, Phase::Restored)?;
            fault::point("failover.restored");
        }
        Ok(())
    }

    /// Starts the replica, confirms that it runs, and sees to what a resumed guest needs.
    pub(super) async fn go_on(&self, record: &mut Record, watcher: &Watcher) -> Result<(), FailoverError> {
        if record.phase < Phase::Running {
            self.start_or_boot(record, watcher).await?;
            self.is_running(record)?;
            self.hosts.release(record.vm);
        }
        self.give_addresses(record, watcher).await?;
        self.after_resume(record, watcher).await
    }

    fn is_running(&self, record: &mut Record) -> Result<(), FailoverError> {
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
        Ok(())
    }

    /// Another attempt, in a folder of its own: what a replica may have run on is not written over.
    pub(super) fn attempt_anew(&self, record: &mut Record) -> Result<(), FailoverError> {
        record.attempt += 1;
        record.phase = Phase::Fenced;
        // An earlier command was left at these; this one has its own tries.
        if record.resumes && record.refused.len() >= TRIES {
            record.refused.clear();
        }
        record.disks_done.clear();
        record.restored = false;
        record.staged = None;
        // Of a guest that is gone.
        (record.address_plan, record.addresses) = (None, Vec::new());
        Ok(self.journal.save(record)?)
    }

    /// At whichever host.
    pub(super) async fn is_active(&self, record: &Record) -> Result<bool, FailoverError> {
        let (_, state) = self.hosts.whereabouts(record.vm, Some(record)).await?;
        Ok(state.is_some_and(DomainState::is_active))
    }

    /// `note` is called with each disk that is complete.
    pub(super) async fn write_images(
        &self,
        record: &mut Record,
        reader: &Reader,
        watcher: &Watcher,
        note: impl Fn(&Record) -> Result<(), FailoverError>,
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
            note(record)?;
            fault::point("failover.disk");
        }
        let meta = &reader.plan().manifest.meta;
        if record.resumes {
            watcher.step("composing the memory image");
            let image = self.memory_image(record);
            let xml = replica_xml::labelled(&xml.xml, record.generation)?;
            images::write_save_image(reader, xml, meta.was_running, &image, watcher).await?;
        }
        Ok(())
    }

    /// Defines the replica, so that it is there after a reboot too, and lets it go on; one of a VM that was off is left
    /// at that.
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
                match replica_xml::rewrite(&text, &disks, Place::Its(&record.manner.networks)) {
                    Ok(defined) => self.with_macs(defined, &text, record)?,
                    Err(_) => active,
                }
            }
            None => active,
        };
        self.undefine_elsewhere(record).await?;
        watcher.step("defining the replica");
        let xml = replica_xml::labelled(&definition.xml, record.generation)?;
        let host = self.hosts.at(record.host.as_ref())?;
        let define =
            move |hypervisor: &Hypervisor| -> Result<_, FailoverError> { Ok(hypervisor.define(&xml)?) };
        let domain = host.work(define).await?;
        fault::point("failover.defined");
        if let Some(host) = &mut record.host {
            host.started = true;
        }
        record.console_from = waits::console_before(&definition.xml);
        self.enter(record, Phase::Starting)?;
        fault::point("failover.starting");
        if record.leaves_off() {
            watcher.step("leaving the replica off, as the VM was");
            return Ok(());
        }
        let was_running = reader.plan().manifest.meta.was_running;
        if record.resumes {
            watcher.step("resuming the replica");
            let image = self.memory_image(record).to_string_lossy().into_owned();
            let start_as = if was_running { StartAs::Running } else { StartAs::Paused };
            let restore = move |hypervisor: &Hypervisor| hypervisor.restore(&image, None, start_as);
            host.work(move |hypervisor| Ok::<_, FailoverError>(restore(hypervisor)?)).await?;
        } else {
            watcher.step("booting the replica from the point's disks");
            host.work(move |_| Ok::<_, FailoverError>(domain.start()?)).await?;
        }
        fault::point("failover.started");
        Ok(())
    }

    pub(super) async fn confirm(&self, record: &Record, watcher: &Watcher) -> Result<(), FailoverError> {
        watcher.step(if record.leaves_off() {
            "confirming that it is there"
        } else {
            "confirming that it runs"
        });
        match self.hosts.at(record.host.as_ref())?.state(record.vm).await? {
            Some(state) if state.is_active() || record.leaves_off() => Ok(()),
            state => Err(FailoverError::DidNotRun { state: name_of(state) }),
        }
    }

    pub(super) async fn reader(&self, record: &Record) -> Result<Reader, FailoverError> {
        // Pinned, until the journal names the point.
        self.reader_of(record.vm, record.seq).await
    }

    /// Reads a point, which is pinned meanwhile.
    pub async fn reader_of(&self, vm: VmId, seq: Seq) -> Result<Reader, FailoverError> {
        let plan = Plan::of(&self.store, vm, seq).await?;
        Ok(Reader::new(self.store.objects().clone(), Arc::new(plan)))
    }

    /// The replica's XML, and where this attempt's disks are.
    pub(super) async fn replica_xml(
        &self,
        reader: &Reader,
        record: &Record,
    ) -> Result<(replica_xml::Rewritten, BTreeMap<String, PathBuf>), FailoverError> {
        let disks = disk_files(reader, &self.attempt_dir(record));
        let xml = images::text_blob(reader, blob::DOMAIN_XML).await?;
        let rewritten = replica_xml::rewrite(&xml, &disks, Place::Its(&record.manner.networks))?;
        Ok((self.with_macs(rewritten, &xml, record)?, disks))
    }

    /// What the replica of a point expects of this site, and how many bytes it takes.
    pub async fn needs_of(
        &self,
        point: &PointSummary,
        manner: Manner,
    ) -> Result<(Needs, u64), FailoverError> {
        let mut record = Record::new(point, point.generation, self.clock.now());
        record.manner = manner;
        let reader = self.reader(&record).await?;
        let (xml, _) = self.replica_xml(&reader, &record).await?;
        let needs = Needs { saved_by: SavedBy::of(&reader).await, ..xml.needs };
        Ok((needs, images::bytes_needed(&reader)))
    }

    pub(super) fn enter(&self, record: &mut Record, phase: Phase) -> Result<(), FailoverError> {
        record.phase = phase;
        Ok(self.journal.save(record)?)
    }

    pub(super) fn attempt_dir(&self, record: &Record) -> PathBuf {
        self.replica_dir.join(record.vm.to_string()).join(format!("{}-{}", record.generation, record.attempt))
    }

    pub(super) fn memory_image(&self, record: &Record) -> PathBuf {
        self.attempt_dir(record).join("memory.save")
    }
}
