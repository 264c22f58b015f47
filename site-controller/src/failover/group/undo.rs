//! Taking a group's completed failover to another point of the group.
//! Promises: no replica is stopped before the images of all members are complete, so that a point that is damaged changes
//! nothing. Then all members go to it, or the failover stays unfinished until they have: what is to be done is in the record
//! before the first replica is stopped. Called by `api`.

use super::{
    GroupError, Groups, Phase,
    record::{GroupRecord, Kind},
    world::WholePoint,
};
use crate::failover::{error::FailoverError, progress::Watcher, report::GroupReport};
use lifeboat::{fault, id::GroupId};
use std::time::Duration;

impl Groups {
    /// `point` is one of the group's, `window` counts from when the replicas ran.
    pub async fn undo(
        &self,
        id: GroupId,
        point: &WholePoint,
        window: Duration,
        watcher: &Watcher,
    ) -> Result<GroupReport, GroupError> {
        let _claim = self.claim(id)?;
        let nothing = || GroupError::from(FailoverError::NotBegun);
        let mut record = self.journal.load_group(id)?.ok_or_else(nothing)?;
        if record.phase == Phase::Committed && record.cut_at == Some(point.cut_at) {
            // It was interrupted.
            return self.forward(&mut record, watcher).await;
        }
        let now = self.clock.now();
        let other_of_undo = record.phase == Phase::Committed && record.undone;
        if !other_of_undo {
            if !matches!(record.phase, Phase::Running | Phase::Done) {
                return Err(GroupError::Unfinished(record.group.spec.name));
            }
            let ran = record.running_at.unwrap_or_default();
            let until = ran.after(window);
            if until < now {
                return Err(FailoverError::TooLate { until }.into());
            }
        }
        for part in &mut record.parts {
            let found = point.members.iter().find(|(vm, _)| *vm == part.vm);
            part.point = Some(found.ok_or_else(|| GroupError::NoPoint(record.group.spec.name.clone()))?.1);
        }
        let points: Vec<_> = record.parts.iter().filter_map(|part| Some((part.vm, part.point?))).collect();
        self.replicas.room_for(&points).await?;
        for part in &record.parts {
            if let Some(point) = part.point {
                self.replicas.make_ready(part.vm, point, window, &watcher.of(&part.name)).await?;
            }
        }
        fault::point("undo.ready");
        if !other_of_undo {
            record.earlier = record.history();
        }
        (record.cut_at, record.kind) = (Some(point.cut_at), Kind::Emergency);
        (record.started_at, record.running_at) = (now, None);
        (record.before_done, record.after_done) = (false, false);
        (record.rewinds, record.undone) = (Some(window.as_secs()), true);
        self.enter(&mut record, Phase::Committed)?;
        fault::point("undo.committed");
        self.forward(&mut record, watcher).await
    }

    /// Of an undo: what ran is set aside, once.
    pub(super) async fn rewind(&self, record: &mut GroupRecord, watcher: &Watcher) -> Result<(), GroupError> {
        let Some(seconds) = record.rewinds else { return Ok(()) };
        for part in &record.parts {
            if let Some(point) = part.point {
                let kept = Duration::from_secs(seconds);
                self.replicas.rewind(part.vm, point, kept, &watcher.of(&part.name)).await?;
            }
        }
        record.rewinds = None;
        Ok(self.journal.save_group(record)?)
    }
}
