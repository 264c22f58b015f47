//! Nothing of a drill is left: its domains, its network, its folder.
//! Promises: goes by the record alone, may be repeated, and touches nothing that the record does not name as the drill's
//! own. Called by `run`, and by `schedule` for drills whose controller died.

use super::{
    record::{DrillRecord, DrillState},
    run::{DrillError, Driller},
};
use crate::failover::{runbook::FailoverError, steps::blocking};
use lifeboat::{
    fault,
    hypervisor::libvirt::{Hypervisor, HypervisorError},
    id::VmId,
};
use std::{fs, io};

impl Driller {
    /// Removes what the drill made. What can't be removed now is tried again later.
    pub(super) async fn tear_down(&self, record: &mut DrillRecord) {
        let (hypervisor, all) = (self.runbook.hypervisor.clone(), record.clone());
        match blocking(move || remove(&hypervisor, &all)).await {
            Ok(()) => record.torn_down = true,
            Err(error) => {
                let why = format!("not all of it could be removed yet: {error}");
                tracing::warn!(drill = record.id, why);
                if !record.notes.contains(&why) {
                    record.notes.push(why);
                }
            }
        }
        record.ended_at = Some(self.runbook.clock.now());
        if let Err(error) = self.book.save(record) {
            tracing::warn!(drill = record.id, %error, "a drill's record could not be written");
        }
    }

    /// Ends drills that nobody leads any more: those of a controller that died, and those that could not be removed.
    pub async fn sweep(&self) {
        let Ok(_alone) = self.busy.try_lock() else { return };
        let left = self.book.list().into_iter();
        for mut record in left.filter(|record| !record.torn_down && record.state != DrillState::Kept) {
            if record.state == DrillState::Running {
                record.state = DrillState::Interrupted;
                record.errors.push(format!("the controller ended while it was at: {}", record.step));
            }
            tracing::info!(drill = record.id, name = record.name, "removing what a drill left");
            self.tear_down(&mut record).await;
        }
    }

    /// Ends the drills of this name, or id, whose replicas were to be kept.
    pub async fn end(&self, name: &str) -> Result<Vec<DrillRecord>, DrillError> {
        let _alone = self.busy.lock().await;
        let mut ended = Vec::new();
        let kept = self.book.list().into_iter().filter(|record| record.state == DrillState::Kept);
        for mut record in kept.filter(|record| record.name == name || record.id == name) {
            record.state = DrillState::Done;
            self.keep_evidence(&mut record).await;
            self.tear_down(&mut record).await;
            ended.push(record);
        }
        if ended.is_empty() { Err(DrillError::NothingKept(name.to_owned())) } else { Ok(ended) }
    }
}

fn remove(hypervisor: &Hypervisor, record: &DrillRecord) -> Result<(), FailoverError> {
    let end_all = || record.members.iter().try_for_each(|member| end(hypervisor, member.as_vm));
    end_all()?;
    fault::point("drill.ended");
    if let Some(network) = record.network.as_ref().filter(|network| network.ours) {
        hypervisor.end_network(&network.name)?;
    }
    match fs::remove_dir_all(&record.dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(FailoverError::File { path: record.dir.clone(), source });
        }
        _ => {}
    }
    // A start that a controller asked for before it died may have come through only now; without files none follows.
    end_all()
}

fn end(hypervisor: &Hypervisor, replica: VmId) -> Result<(), FailoverError> {
    let gone = |error: HypervisorError| match error {
        // It ended by itself meanwhile; nowhere defined, it is gone then.
        HypervisorError::NotFound { .. } | HypervisorError::WrongState { .. } => Ok(()),
        error => Err(error.into()),
    };
    match hypervisor.domain_by_uuid(replica) {
        Ok(domain) => domain.destroy().or_else(gone),
        Err(error) => gone(error),
    }
}
