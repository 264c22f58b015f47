//! Taking a completed failover to another point, within a window: the replica is set aside, and the VM goes on from there.
//! Promises: the replica runs until the other point's images are complete, each byte of them checked: a point that is damaged
//! changes nothing. The replica's disks are kept until the window is over, and never written over; what an undo that was
//! interrupted has not done yet is done when the failover, or the undo, is asked for again; or it is taken to one more point.
//! What the replica did since it was started is on those disks alone; its memory is given up. Called by `api` for one VM, by
//! `group` for several.

use super::{
    attempt::remove_dir,
    error::FailoverError,
    images::ImageError,
    journal::{Aside, Earlier, Phase, Record, Staged},
    preflight::{self, PreflightError},
    progress::Watcher,
    report::FailoverReport,
    runbook::Runbook,
};
use crate::{restore::RestoreError, store::PointSummary};
use lifeboat::{
    fault,
    hypervisor::libvirt::HypervisorError,
    id::{PointId, VmId},
    units::UnixMs,
};
use std::time::Duration;

/// For how long a failover of a VM that is in no group can be taken to another point.
pub const WINDOW: Duration = Duration::from_secs(3600);

/// Until when the failover can be taken to another point; `None` as long as it is not completed.
pub fn open_until(record: &Record, window: Duration) -> Option<UnixMs> {
    let ran = record.running_at.filter(|_| record.phase == Phase::Running)?;
    Some(ran.after(window))
}

/// Whether anything is to be done to take it to `point`. An undo that did not come to its end, because its replica does not
/// start, say, is not bound to its point: what ran before it is aside already.
fn is_to_do(record: &Record, point: PointId, window: Duration, now: UnixMs) -> Result<bool, FailoverError> {
    match open_until(record, window) {
        Some(until) if until < now => Err(FailoverError::TooLate { until }),
        Some(_) => Ok(true),
        None if record.point == point => Ok(false),
        None if record.has_run => Ok(true),
        None => Err(FailoverError::Unfinished { begun: record.point }),
    }
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
        if !is_to_do(&record, point.point, window, now)? {
            return Ok(());
        }
        self.stage(&mut record, point, window, watcher).await?;
        watcher.step("stopping the replica");
        let (host, _) = self.hosts.whereabouts(vm, Some(&record)).await?;
        host.work(move |hypervisor| match hypervisor.domain_by_uuid(vm) {
            Ok(domain) if domain.state()?.is_active() => Ok(domain.destroy()?),
            Ok(_) | Err(HypervisorError::NotFound { .. }) => Ok(()),
            Err(error) => Err(FailoverError::from(error)),
        })
        .await?;
        fault::point("undo.stopped");
        record.aside.push(Aside { dir: self.attempt_dir(&record), until: now.after(window) });
        record = next_from(&record, point);
        (record.started_at, record.running_at) = (now, None);
        // What was staged is this attempt's.
        record.restored = true;
        self.journal.save(&record)?;
        fault::point("undo.named");
        Ok(())
    }

    /// Whether it can be taken to this point: the images are made, in the folder of the attempt to come. Nothing that anybody
    /// would notice is changed.
    pub async fn make_ready(
        &self,
        point: &PointSummary,
        window: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let _claim = self.claim(point.vm)?;
        let mut record = self.journal.load(point.vm)?.ok_or(FailoverError::NotBegun)?;
        if is_to_do(&record, point.point, window, self.clock.now())? {
            self.stage(&mut record, point, window, watcher).await?;
        }
        Ok(())
    }

    async fn stage(
        &self,
        record: &mut Record,
        point: &PointSummary,
        window: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let mut next = next_from(record, point);
        let dir = self.attempt_dir(&next);
        if record.staged.as_ref().is_some_and(|staged| staged.point == point.point) && dir.exists() {
            return Ok(());
        }
        watcher.step("checking this site");
        record.staged = None;
        self.journal.save(record)?;
        // Of an undo that was interrupted, or another point's: nothing has run on them.
        remove_dir(&dir)?;
        self.fits(point, record, watcher).await?;
        let written = match self.reader(&next).await {
            Ok(reader) => self.write_images(&mut next, &reader, watcher, |_| Ok(())).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            remove_dir(&dir)?;
            return Err(if_damaged(error, point.point));
        }
        fault::point("undo.staged");
        record.staged = Some(Staged { point: point.point, until: self.clock.now().after(window) });
        Ok(self.journal.save(record)?)
    }

    /// Whether this site has what the replica needs, besides what the one that runs has now.
    async fn fits(
        &self,
        point: &PointSummary,
        record: &Record,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        watcher.step("checking the point");
        let needs = self.needs_of(point, record.manner.clone()).await;
        let (needs, bytes) = needs.map_err(|error| if_damaged(error, point.point))?;
        let (vm, name, dir) = (record.vm, record.vm_name.clone(), self.replica_dir.clone());
        let (host, _) = self.hosts.whereabouts(vm, Some(record)).await?;
        host.work(move |hypervisor| {
            let (_, problems) = preflight::problems(hypervisor, vm, &name, &needs)?;
            let in_the_way = |problem: &PreflightError| !matches!(problem, PreflightError::AlreadyRunning);
            if let Some(problem) = problems.into_iter().find(in_the_way) {
                return Err(FailoverError::from(problem));
            }
            Ok(preflight::room(&dir, bytes)?)
        })
        .await
    }

    /// The images that an undo made and nobody has gone on from yet.
    pub(super) fn staged_aside(&self, record: &Record) -> Option<Aside> {
        let until = record.staged.as_ref()?.until;
        let dir = self.attempt_dir(&Record { attempt: record.attempt + 1, ..record.clone() });
        Some(Aside { dir, until })
    }

    /// Removes what was set aside and whose window is over. For a task of its own.
    pub async fn tidy_aside(&self) -> Result<(), FailoverError> {
        for vm in self.journal.vms()? {
            let left = |record: &Record| !record.aside.is_empty() || record.staged.is_some();
            if !self.journal.load(vm)?.as_ref().is_some_and(left) {
                continue;
            }
            // A failover that is under way is looked at the next time.
            let Ok(_claim) = self.claim(vm) else { continue };
            let Some(mut record) = self.journal.load(vm)? else { continue };
            let now = self.clock.now();
            let (mut gone, kept): (Vec<_>, Vec<_>) =
                record.aside.drain(..).partition(|aside| aside.until < now);
            if let Some(staged) = self.staged_aside(&record).filter(|aside| aside.until < now) {
                record.staged = None;
                gone.push(staged);
            }
            if gone.is_empty() {
                continue;
            }
            for Aside { dir, .. } in gone {
                tracing::info!(%vm, dir = %dir.display(), "what an undo had set aside is removed");
                remove_dir(&dir)?;
            }
            record.aside = kept;
            self.journal.save(&record)?;
        }
        Ok(())
    }
}

/// The attempt after this one, from another point.
fn next_from(record: &Record, point: &PointSummary) -> Record {
    let ran = record.running_at.filter(|_| record.phase == Phase::Running);
    let ran = ran.map(|running_at| Earlier {
        point: record.point,
        cut_at: record.cut_at,
        started_at: record.started_at,
        running_at,
        resumed: record.resumes,
        cold_boot: record.cold_boot.clone(),
    });
    Record {
        earlier: record.earlier.iter().cloned().chain(ran).collect(),
        point: point.point,
        seq: point.seq,
        cut_at: point.cut_at,
        resumes: point.has_memory,
        was_off: point.stays_off,
        phase: Phase::Fenced,
        attempt: record.attempt + 1,
        disks_done: Vec::new(),
        restored: false,
        staged: None,
        cold_boot: None,
        refused: Vec::new(),
        has_run: true,
        after_resume: Vec::new(),
        address_plan: None,
        addresses: Vec::new(),
        ..record.clone()
    }
}

fn if_damaged(error: FailoverError, point: PointId) -> FailoverError {
    match &error {
        FailoverError::Restore(restore) | FailoverError::Image(ImageError::Restore(restore)) => match restore
        {
            RestoreError::Broken { .. } | RestoreError::Damaged { .. } | RestoreError::NoImage(_) => {
                FailoverError::PointDamaged { point, why: restore.to_string() }
            }
            RestoreError::TooLarge { .. } | RestoreError::Store(_) | RestoreError::File { .. } => error,
        },
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::journal::tests::record;
    use std::io;

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

    #[test]
    fn an_undo_that_did_not_come_to_its_end_is_not_bound_to_its_point_and_a_first_failover_is_told_what_to_do()
     {
        let (own, other) = (record().point, PointId::from_bytes([9; 16]));
        let of = |record: &Record, point| is_to_do(record, point, WINDOW, UnixMs(5));
        let first = record();
        assert!(!of(&first, own).unwrap(), "it goes on");
        let refused = of(&first, other).unwrap_err().to_string();
        assert!(
            refused.contains("lifeboat failover --emergency") && refused.contains("--point"),
            "{refused}"
        );
        let undone = Record { has_run: true, phase: Phase::Starting, ..record() };
        assert!(of(&undone, other).unwrap() && !of(&undone, own).unwrap());
        let ran = Record { phase: Phase::Running, running_at: Some(UnixMs(4)), ..record() };
        assert!(of(&ran, own).unwrap() && of(&ran, other).unwrap());
        assert!(matches!(
            is_to_do(&ran, other, Duration::ZERO, UnixMs(5)),
            Err(FailoverError::TooLate { until: UnixMs(4) })
        ));
    }

    #[test]
    fn a_point_that_is_damaged_is_told_from_a_disk_that_fails_here() {
        let point = PointId::from_bytes([9; 16]);
        let of = crate::store::PointRef { point, seq: lifeboat::units::Seq(3) };
        let damaged = if_damaged(RestoreError::Broken { point: of, what: "a hole".into() }.into(), point);
        assert!(matches!(&damaged, FailoverError::PointDamaged { why, .. } if why.contains("a hole")));
        let source = io::Error::from(io::ErrorKind::StorageFull);
        let full = RestoreError::File { path: "/x".into(), step: "writing", source };
        assert!(matches!(if_damaged(full.into(), point), FailoverError::Restore(RestoreError::File { .. })));
    }
}
