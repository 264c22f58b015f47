//! What is done for the members of a group before any of them is started: points named, hosts chosen, images restored.
//! Promises: no point that was chosen is left once a source is fenced; hosts are chosen for all members together; what can't be
//! done for one is begun for none. Called by `group`.

use super::{
    GroupError, Groups, SIDE_BY_SIDE,
    record::{GroupRecord, Part, Phase},
    world::{Chosen, ToPlace, WholePoint},
};
use crate::failover::{
    journal::{Manner, Placed},
    progress::Watcher,
};
use futures_util::{StreamExt, TryStreamExt, stream};

impl Groups {
    pub(super) fn name(&self, record: &mut GroupRecord, point: &WholePoint) -> Result<(), GroupError> {
        for part in &mut record.parts {
            let found = point.members.iter().find(|(vm, _)| *vm == part.vm);
            // A member that joined later has no part in it: an older group point is not the group's any more.
            part.point = Some(found.ok_or_else(|| GroupError::NoPoint(record.group.spec.name.clone()))?.1);
        }
        record.cut_at = Some(point.cut_at);
        self.enter(record, Phase::Named)
    }

    /// Whether a failover that is committed is to take another point: no source is fenced yet. Those that came back went
    /// on, and what they have written since is in the newest point; or another point is asked for by name.
    pub(super) async fn is_replaced(
        &self,
        record: &GroupRecord,
        chosen: Chosen<'_>,
    ) -> Result<bool, GroupError> {
        let at = Some(chosen.point.cut_at);
        let is_other = if chosen.newest { record.newest && at > record.cut_at } else { at != record.cut_at };
        Ok(is_other && !self.is_fenced(record).await?)
    }

    /// Whether any of the sources is.
    pub(super) async fn is_fenced(&self, record: &GroupRecord) -> Result<bool, GroupError> {
        for part in &record.parts {
            if self.replicas.is_fenced(part.vm).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What an earlier try, with another point or by a controller that died, has left of members that are not fenced.
    pub(super) async fn withdraw_unfenced(&self, record: &GroupRecord) -> Result<(), GroupError> {
        for part in &record.parts {
            if !self.replicas.is_fenced(part.vm).await? {
                self.replicas.withdraw(part.vm).await?;
            }
        }
        Ok(())
    }

    /// Of each member the host at which it is to run.
    pub(super) async fn place(
        &self,
        record: &GroupRecord,
        watcher: &Watcher,
    ) -> Result<Vec<Option<Placed>>, GroupError> {
        let manner = |part: &Part| Manner::of(&record.group.spec, &part.name);
        let parts = record.parts.iter();
        let all: Vec<_> =
            parts.map(|part| ToPlace { vm: part.vm, point: part.point, manner: manner(part) }).collect();
        Ok(self.replicas.place(&all, watcher).await?)
    }

    /// All members, or none: what can't be done for one is begun for none of them.
    pub(super) async fn prepare(
        &self,
        record: &GroupRecord,
        placed: Vec<Option<Placed>>,
        watcher: &Watcher,
    ) -> Result<(), GroupError> {
        let parts = record.parts.iter().zip(placed);
        let points: Vec<_> = parts.filter_map(|(part, host)| Some((part, part.point?, host))).collect();
        let all: Vec<_> = points.iter().map(|(part, point, _)| (part.vm, *point)).collect();
        self.replicas.room_for(&all).await?;
        let mut begun = Vec::new();
        for (part, point, host) in points {
            let (watcher, manner) = (watcher.of(&part.name), Manner::of(&record.group.spec, &part.name));
            match self.replicas.prepare(part.vm, point, record.kind, manner, host, &watcher).await {
                Ok(true) => begun.push(part.vm),
                Ok(false) => {}
                Err(error) => {
                    for vm in begun {
                        self.replicas.withdraw(vm).await?;
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    pub(super) async fn restore(&self, record: &GroupRecord, watcher: &Watcher) -> Result<(), GroupError> {
        let all = record.parts.clone().into_iter().map(|part| {
            let (replicas, watcher) = (self.replicas.clone(), watcher.of(&part.name));
            async move { replicas.restore(part.vm, &watcher).await }
        });
        Ok(stream::iter(all).buffer_unordered(SIDE_BY_SIDE).try_collect().await?)
    }
}
