//! One replica for trial: its images, its start, and when it counts as up.
//! Promises: the same images, made by the same hands, as those of a failover. Called by `run`.

use super::{
    record::{DrillMember, DrillRecord},
    run::Driller,
};
use crate::{
    failover::{
        attempt::disk_files,
        error::FailoverError,
        group::starts,
        images,
        journal::Manner,
        preflight,
        progress::Watcher,
        qemu_version::SavedBy,
        replica_xml::{self, Needs, Place, Rewritten},
    },
    group::{GroupSpec, spec::WaitFor},
    restore::Reader,
};
use lifeboat::{
    fault,
    format::manifest::blob,
    hypervisor::libvirt::{Hypervisor, StartAs},
};
use std::{collections::BTreeMap, path::PathBuf};

struct Staged {
    reader: Reader,
    /// The point's own.
    before: String,
    xml: Rewritten,
    disks: BTreeMap<String, PathBuf>,
}

impl Driller {
    async fn stage(&self, record: &DrillRecord, member: &DrillMember) -> Result<Staged, FailoverError> {
        let reader = self.runbook.reader_of(member.vm, member.seq).await?;
        let place = record.isolated(member);
        let disks = disk_files(&reader, &place.dir);
        let before = images::text_blob(&reader, blob::DOMAIN_XML).await?;
        let mut xml = replica_xml::rewrite(&before, &disks, Place::Nobodys(&place))?;
        let cards = self.runbook.cards(&member.address_rules, &before, member.as_vm, member.resumes)?;
        xml.xml = replica_xml::with_macs(&xml.xml, &cards.macs)?;
        Ok(Staged { reader, before, xml, disks })
    }

    /// Whether it has network cards.
    pub(super) async fn has_cards(&self, member: &DrillMember) -> Result<bool, FailoverError> {
        let reader = self.runbook.reader_of(member.vm, member.seq).await?;
        Ok(images::text_blob(&reader, blob::DOMAIN_XML).await?.contains("<interface"))
    }

    /// What it needs here, and bytes.
    pub(super) async fn needs(
        &self,
        record: &DrillRecord,
        member: &DrillMember,
    ) -> Result<(Needs, u64), FailoverError> {
        let staged = self.stage(record, member).await?;
        let needs = Needs { saved_by: SavedBy::of(&staged.reader).await, ..staged.xml.needs };
        Ok((needs, images::bytes_needed(&staged.reader)))
    }

    pub(super) async fn check(
        &self,
        record: &DrillRecord,
        member: &DrillMember,
    ) -> Result<(Needs, u64), FailoverError> {
        let (needs, bytes) = self.needs(record, member).await?;
        let (replica, name) = (member.as_vm, member.as_name.clone());
        let dir = self.runbook.replica_dir.clone();
        let check = move |hypervisor: &Hypervisor| -> Result<_, FailoverError> {
            preflight::check(hypervisor, replica, &name, &needs, &dir, bytes)?;
            Ok((needs, bytes))
        };
        self.runbook.hosts.at(member.host.as_ref())?.work(check).await
    }

    /// Disks and memory, into a folder of its own.
    pub(super) async fn restore(
        &self,
        record: &DrillRecord,
        member: &DrillMember,
        watcher: &Watcher,
    ) -> Result<u64, FailoverError> {
        let staged = self.stage(record, member).await?;
        let dir = record.isolated(member).dir;
        std::fs::create_dir_all(&dir).map_err(|source| FailoverError::File { path: dir.clone(), source })?;
        for (target, file) in &staged.disks {
            images::write_disk(&staged.reader, target, file, watcher).await?;
            fault::point("drill.disk");
        }
        if member.resumes {
            let was_running = staged.reader.plan().manifest.meta.was_running;
            let image = dir.join(MEMORY);
            images::write_save_image(&staged.reader, staged.xml.xml, was_running, &image, watcher).await?;
        }
        Ok(self.since(record))
    }

    /// Starts it as a failover would, sees it run, and gives it what a resumed guest needs.
    pub(super) async fn start(
        &self,
        record: &mut DrillRecord,
        at: usize,
        spec: &GroupSpec,
    ) -> Result<(), FailoverError> {
        let member = record.members[at].clone();
        let staged = self.stage(record, &member).await?;
        let image = record.isolated(&member).dir.join(MEMORY);
        let was_running = staged.reader.plan().manifest.meta.was_running;
        let host = self.runbook.hosts.at(member.host.as_ref())?;
        let (xml, from, resumes) = (staged.xml.xml, image.clone(), member.resumes);
        let start = move |hypervisor: &Hypervisor| -> Result<(), FailoverError> {
            if resumes {
                let start_as = if was_running { StartAs::Running } else { StartAs::Paused };
                Ok(hypervisor.restore(&from.to_string_lossy(), None, start_as)?)
            } else {
                Ok(hypervisor.start_transient(&xml)?)
            }
        };
        host.work(start).await?;
        fault::point("drill.started");
        record.members[at].running_ms = Some(self.since(record));
        // It has served.
        let _ = std::fs::remove_file(image);
        if member.resumes && was_running {
            self.runbook.watch_for_grief(member.as_vm, member.host.as_ref(), 0).await?;
        }
        if was_running || !member.resumes {
            self.give_addresses(record, at, &staged.before).await?;
        }
        if member.resumes && was_running {
            let (replica, place) = (member.as_vm, member.host.as_ref());
            let manner = Manner::of(spec, &member.name);
            let done = self.runbook.settle_replica(replica, place, staged.before, &manner).await?;
            record.members[at].after_resume = done;
        }
        Ok(())
    }

    /// As a failover would, with what the runbook says of drills. What can't be done here can't be done there: the drill does
    /// not pass.
    async fn give_addresses(
        &self,
        record: &mut DrillRecord,
        at: usize,
        before: &str,
    ) -> Result<(), FailoverError> {
        let member = &record.members[at];
        let cards = self.runbook.cards(&member.address_rules, before, member.as_vm, member.resumes)?;
        if cards.rules.is_empty() {
            return Ok(());
        }
        let (replica, name) = ((member.as_vm, member.host.as_ref()), member.name.clone());
        let done = self.runbook.settle_addresses(replica, &cards, None, |_| Ok(())).await?;
        record.errors.extend(done.iter().filter(|step| !step.done).map(|step| format!("{name}: {step}")));
        record.members[at].addresses = done;
        Ok(())
    }

    /// Waits as the runbook says; gives what did not come, and what was not tried.
    pub(super) async fn wait(
        &self,
        record: &mut DrillRecord,
        at: usize,
        spec: &GroupSpec,
        watcher: &Watcher,
    ) {
        let member = record.members[at].clone();
        let Ok((waits, at_most)) = spec.waits(&member.name) else { return };
        let apart = record.network.as_ref().is_none_or(|network| network.ours);
        for wait in waits {
            if apart && matches!(wait, WaitFor::Tcp { .. }) {
                // From here that address leads to the VM itself, or to nobody.
                let note = format!("{}: not tried, as its network is isolated: {wait}", member.name);
                record.notes.push(note);
                continue;
            }
            watcher.step(format!("{}: waiting for {wait}", member.name));
            let replica = (member.as_vm, member.host.as_ref());
            if let Err(missed) = starts::wait_for(&*self.runbook, replica, &wait, at_most).await {
                record.errors.push(format!("{}: {}", member.name, missed.why));
            }
        }
        record.members[at].up_ms = Some(self.since(record));
    }

    fn since(&self, record: &DrillRecord) -> u64 {
        self.runbook.clock.now().0.saturating_sub(record.started_at.0)
    }
}

const MEMORY: &str = "memory.save";
