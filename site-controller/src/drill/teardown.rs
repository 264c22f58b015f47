//! Nothing of a drill is left: its domains, its network, its folder.
//! Promises: goes by the record alone, may be repeated, and touches nothing that the record does not name as the drill's
//! own. Called by `run`, and by `schedule` for drills whose controller died.

use super::{
    record::{DrillRecord, DrillState},
    run::{DrillError, Driller},
};
use crate::failover::{
    attempt::{blocking, remove_dir},
    error::FailoverError,
};
use lifeboat::fault;

impl Driller {
    /// Removes what the drill made. What can't be removed now is tried again later.
    pub(super) async fn tear_down(&self, record: &mut DrillRecord) {
        match self.remove(record).await {
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

    /// Ends the drills of this group or VM, or of this id, whose replicas were to be kept.
    pub async fn end(&self, name: &str) -> Result<Vec<DrillRecord>, DrillError> {
        let _alone = self.busy.lock().await;
        // It may have had another name then.
        let group = self.coordinator.book.find(name).ok().map(|group| group.id);
        let mut ended = Vec::new();
        let kept = self.book.list().into_iter().filter(|record| record.state == DrillState::Kept);
        let meant = |record: &DrillRecord| {
            record.name == name || record.id == name || group.is_some_and(|group| record.group == group)
        };
        for mut record in kept.filter(meant) {
            record.state = DrillState::Done;
            self.keep_evidence(&mut record).await;
            self.tear_down(&mut record).await;
            ended.push(record);
        }
        if ended.is_empty() { Err(DrillError::NothingKept(name.to_owned())) } else { Ok(ended) }
    }
}

impl Driller {
    async fn remove(&self, record: &DrillRecord) -> Result<(), FailoverError> {
        let hosts = self.hosts_of(record)?;
        self.end_replicas(record, &hosts).await?;
        fault::point("drill.ended");
        for host in hosts.iter().filter(|host| !self.runbook.hosts.are_several() || record.is_at(&host.name))
        {
            let Some(network) = record.network.as_ref().filter(|network| network.ours) else { break };
            let name = network.name.clone();
            host.work(move |hypervisor| Ok::<_, FailoverError>(hypervisor.end_network(&name)?)).await?;
        }
        let dir = record.dir.clone();
        blocking(move || remove_dir(&dir)).await?;
        // A start that a controller asked for before it died may have come through only now; without files none follows.
        self.end_replicas(record, &hosts).await?;
        record.members.iter().for_each(|member| self.runbook.hosts.release(member.as_vm));
        Ok(())
    }
}
