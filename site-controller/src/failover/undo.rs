//! Taking a completed failover to another point, within a window: the replica is set aside, and the VM goes on from there.
//! Promises: the replica's disks are kept until the window is over, and never written over; what an undo that was
//! interrupted has not done yet is done when the failover, or the undo, is asked for again. What the replica did since it was
//! started is on those disks alone; its memory is given up. Called by `api` for one VM, by `group` for several.

use super::{
    journal::{Aside, Phase, Record},
    preflight::{self, PreflightError},
    progress::{FailoverReport, Watcher},
    runbook::{FailoverError, Runbook},
    steps::blocking,
};
use crate::store::PointSummary;
use lifeboat::{fault, hypervisor::libvirt::HypervisorError, id::VmId, units::UnixMs};
use std::{io, time::Duration};

/// For how long a failover of a VM that is in no group can be taken to another point.
pub const WINDOW: Duration = Duration::from_secs(3600);

/// Until when the failover can be taken to another point; `None` as long as it is not completed.
pub fn open_until(record: &Record, window: Duration) -> Option<UnixMs> {
    let ran = record.running_at.filter(|_| record.phase == Phase::Running)?;
    Some(ran.after(window))
}

impl Runbook {
    /// The VM's failover, which was completed, is taken to another point.
    pub async fn undo(
        &self,
        vm: VmId,
        given: &str,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError> {
        let point = self.catalog.find(vm, given).await?;
        self.rewind(&point, WINDOW, watcher).await?;
        let _claim = self.claim(vm)?;
        let mut record = self.journal.load(vm)?.ok_or(FailoverError::NotBegun)?;
        let outcome = self.carry_out(&mut record, true, watcher).await;
        if let Err(error) = &outcome {
            record.last_error = Some(error.to_string());
            self.journal.save(&record)?;
        }
        outcome
    }

    /// Sets the replica aside and names the point that it goes on from. Nothing happens where that was done before.
    pub async fn rewind(
        &self,
        point: &PointSummary,
        window: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let vm = point.vm;
        let _claim = self.claim(vm)?;
        let mut record = self.journal.load(vm)?.ok_or(FailoverError::NotBegun)?;
        let now = self.clock.now();
        match open_until(&record, window) {
            None if record.point == point.point => return Ok(()),
            None => return Err(FailoverError::Unfinished { begun: record.point }),
            Some(until) if until < now => return Err(FailoverError::TooLate { until }),
            Some(_) => {}
        }
        watcher.step("checking this site");
        let (needs, bytes) = self.needs_of(point, record.manner.clone()).await?;
        let (hypervisor, name, dir) =
            (self.hypervisor.clone(), record.vm_name.clone(), self.replica_dir.clone());
        blocking(move || {
            let (_, problems) = preflight::problems(&hypervisor, vm, &name, &needs)?;
            let in_the_way = |problem: &PreflightError| !matches!(problem, PreflightError::AlreadyRunning);
            if let Some(problem) = problems.into_iter().find(in_the_way) {
                return Err(problem.into());
            }
            Ok(preflight::room(&dir, bytes)?)
        })
        .await?;
        watcher.step("stopping the replica");
        let hypervisor = self.hypervisor.clone();
        blocking(move || match hypervisor.domain_by_uuid(vm) {
            Ok(domain) if domain.state()?.is_active() => Ok(domain.destroy()?),
            Ok(_) | Err(HypervisorError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        })
        .await?;
        fault::point("undo.stopped");
        record.aside.push(Aside { dir: self.attempt_dir(&record), until: now.after(window) });
        (record.point, record.seq, record.cut_at) = (point.point, point.seq, point.cut_at);
        (record.resumes, record.has_run, record.cold_boot) = (point.has_memory, true, None);
        record.after_resume.clear();
        (record.started_at, record.running_at) = (now, None);
        // Another attempt; this saves it all.
        self.attempt_anew(&mut record)?;
        fault::point("undo.named");
        Ok(())
    }

    /// Removes what was set aside and whose window is over. For a task of its own.
    pub async fn tidy_aside(&self) -> Result<(), FailoverError> {
        for vm in self.journal.vms()? {
            if self.journal.load(vm)?.is_none_or(|record| record.aside.is_empty()) {
                continue;
            }
            // A failover that is under way is looked at the next time.
            let Ok(_claim) = self.claim(vm) else { continue };
            let Some(mut record) = self.journal.load(vm)? else { continue };
            let now = self.clock.now();
            let (gone, kept): (Vec<_>, Vec<_>) = record.aside.drain(..).partition(|aside| aside.until < now);
            if gone.is_empty() {
                continue;
            }
            for Aside { dir, .. } in gone {
                tracing::info!(%vm, dir = %dir.display(), "what an undo had set aside is removed");
                match std::fs::remove_dir_all(&dir) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(FailoverError::File { path: dir, source });
                    }
                    _ => {}
                }
            }
            record.aside = kept;
            self.journal.save(&record)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::journal::tests::record;

    #[test]
    fn only_a_completed_failover_is_open_to_another_point_and_only_for_its_window() {
        let mut record = record();
        record.phase = Phase::Starting;
        record.running_at = None;
        assert_eq!(open_until(&record, WINDOW), None);
        record.phase = Phase::Running;
        record.running_at = Some(UnixMs(1000));
        assert_eq!(open_until(&record, Duration::from_secs(2)), Some(UnixMs(3000)));
    }
}
