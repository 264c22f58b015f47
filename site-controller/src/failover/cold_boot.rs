//! A resume that goes wrong: the replica is booted from the same point's disks instead.
//! Promises: what is wrong was seen, never guessed: QEMU refused the state, or the replica ended or was stopped within
//! moments. A guest that stands because its operator wants it so is not touched. The disks of the failed attempt, to
//! which the replica may have written, are left alone: another attempt has its own.
//! Called by `steps`.

use super::{
    journal::{Phase, Record},
    progress::Watcher,
    runbook::{FailoverError, Runbook},
    steps::blocking,
};
use crate::restore::Reader;
use lifeboat::{fault, hypervisor::libvirt::HypervisorError, id::VmId};
use std::time::Duration;

impl Runbook {
    /// Starts the replica, unless it was started before, and sees it run.
    pub(super) async fn start_or_boot(
        &self,
        record: &mut Record,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let reader = self.reader(record).await?;
        let Err(error) = self.start_and_see(record, &reader, watcher).await else { return Ok(()) };
        if !record.resumes || record.manner.no_cold_boot || !is_of_the_state(record, &error) {
            return Err(error);
        }
        record.has_run |= matches!(error, FailoverError::WentWrong { .. } | FailoverError::DidNotRun { .. });
        let why = error.to_string();
        tracing::warn!(vm = record.vm_name, why, "the resume went wrong; booting from the point's disks");
        watcher.step(format!("the resume went wrong ({why}); booting from the point's disks instead"));
        self.end(record).await?;
        let image = self.memory_image(record);
        record.resumes = false;
        record.cold_boot = Some(why);
        self.attempt_anew(record)?;
        fault::point("failover.cold-boot");
        // The point still has it.
        let _ = std::fs::remove_file(image);
        self.restore(record, watcher).await?;
        self.start(record, &reader, watcher).await?;
        self.confirm(record, watcher).await
    }

    async fn start_and_see(
        &self,
        record: &mut Record,
        reader: &Reader,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        if !(record.phase == Phase::Starting && self.is_active(record.vm).await?) {
            self.start(record, reader, watcher).await?;
        }
        self.confirm(record, watcher).await?;
        self.keeps_running(record, reader).await
    }

    /// A resumed replica is watched for a moment: what comes of a state that does not fit shows at once, if at all.
    async fn keeps_running(&self, record: &Record, reader: &Reader) -> Result<(), FailoverError> {
        if !record.resumes || !reader.plan().manifest.meta.was_running {
            return Ok(());
        }
        self.watch_for_grief(record.vm).await
    }

    /// An error if the resumed replica ends, or is stopped, within a moment.
    pub async fn watch_for_grief(&self, replica: VmId) -> Result<(), FailoverError> {
        for _ in 0..LOOKS {
            let hypervisor = self.hypervisor.clone();
            let grief = blocking(move || Ok(hypervisor.domain_by_uuid(replica)?.came_to_grief()?));
            if let Some(grief) = grief.await? {
                return Err(FailoverError::WentWrong { grief });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// What is left of the failed resume must not run beside the other.
    async fn end(&self, record: &Record) -> Result<(), FailoverError> {
        if self.is_active(record.vm).await? {
            let (hypervisor, vm) = (self.hypervisor.clone(), record.vm);
            blocking(move || Ok(hypervisor.domain_by_uuid(vm)?.destroy()?)).await?;
        }
        Ok(())
    }
}

/// Whether another start, without the memory, may end otherwise. A libvirt that can't be reached is asked again later:
/// the replica may run.
fn is_of_the_state(record: &Record, error: &FailoverError) -> bool {
    let refused = matches!(
        error,
        FailoverError::Hypervisor(HypervisorError::Refused { .. } | HypervisorError::WrongState { .. })
            | FailoverError::DidNotRun { .. }
            | FailoverError::WentWrong { .. }
    );
    record.phase == Phase::Starting && refused
}

const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOKS: u32 = 5;
