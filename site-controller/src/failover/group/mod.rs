//! Failover of a group: all members to points of one instant, started in the order of its runbook.
//! Promises: source and replica of a VM never run both by a planned failover: until [`Phase::Committed`] whatever goes
//! wrong is called off and the sources go on, after it the sources stay off unless it is certain that nothing runs here;
//! in between there is one synced write. A controller that dies anywhere takes it up from the record. Called by `api` and
//! the daemon.

pub mod outline;
mod prepare;
pub mod record;
pub mod scripts;
mod settle;
pub mod starts;
mod undo;
pub mod world;

use super::{
    error::FailoverError,
    journal::{Journal, JournalError, Placed},
    progress::Watcher,
    report::GroupReport,
};
use crate::group::Group;
use lifeboat::{
    clock::Clock,
    fault,
    id::{CutId, GroupId},
    units::{Span, UnixMs},
    wire::order::CutOrder,
};
use record::{GroupRecord, Kind, Phase};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use world::{Chosen, Replicas, SourceError, Sources};

/// Members that are restored side by side.
const SIDE_BY_SIDE: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    #[error(transparent)]
    Vm(Box<FailoverError>),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("a failover of this group is under way; wait for it")]
    Busy,
    #[error(
        "group `{0}` has no point that is whole: each member has points of its own, see `lifeboat points`"
    )]
    NoPoint(String),
    #[error("the sources could not be brought to stand: {0}")]
    Cut(#[from] SourceError),
    #[error("script: {0}")]
    Script(String),
    #[error(
        "the planned failover was called off ({why}); {}",
        if waiting.is_empty() { "the sources go on".to_owned() }
        else { format!("these go on as soon as their agents are reached: {}", waiting.join(", ")) }
    )]
    CalledOff { why: String, waiting: Vec<String> },
    #[error("of the group these do not run: {}. Run the command again: it goes on with them", failed.join("; "))]
    Incomplete { failed: Vec<String> },
    #[error(
        "a planned failover of this group is committed and not finished; run it again with --planned, or wait"
    )]
    Committed,
    #[error(
        "an emergency failover or an undo of this group is committed and not finished; run it again with --emergency"
    )]
    GivenUp,
    #[error(
        "the failover of group `{0}` is not completed; `lifeboat failover {0}` completes it, and then `lifeboat undo {0}` works"
    )]
    Unfinished(String),
    #[error("this group was failed over to this site already, at {0}")]
    DoneBefore(UnixMs),
}

impl From<FailoverError> for GroupError {
    fn from(error: FailoverError) -> Self {
        Self::Vm(Box::new(error))
    }
}

/// Fails groups over at this site.
pub struct Groups {
    pub replicas: Arc<dyn Replicas>,
    pub sources: Arc<dyn Sources>,
    pub journal: Journal,
    pub clock: Arc<dyn Clock>,
    busy: Mutex<BTreeSet<GroupId>>,
    settling: Mutex<BTreeSet<GroupId>>,
}

struct Claim<'a>(&'a Groups, GroupId);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Groups {
    pub fn new(
        replicas: Arc<dyn Replicas>,
        sources: Arc<dyn Sources>,
        journal: Journal,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { replicas, sources, journal, clock, busy: Mutex::default(), settling: Mutex::default() }
    }

    /// The instant of an emergency failover, or of an undo, that is committed and not finished: whoever asks again goes on with
    /// it. `newest`: he asks for the newest point. As long as no source is fenced it may be another.
    pub async fn goes_on_with(&self, id: GroupId, newest: bool) -> Result<Option<UnixMs>, GroupError> {
        let begun = |record: &GroupRecord| record.phase == Phase::Committed && record.kind == Kind::Emergency;
        let Some(record) = self.journal.load_group(id)?.filter(begun) else { return Ok(None) };
        let is_open = (record.newest || !newest) && !self.is_fenced(&record).await?;
        Ok(record.cut_at.filter(|_| !is_open))
    }

    /// The sources are given up. The point is one of the group's. `skip_command`: they are known to be off.
    pub async fn emergency(
        &self,
        group: Group,
        chosen: Chosen<'_>,
        skip_command: bool,
        watcher: &Watcher,
    ) -> Result<GroupReport, GroupError> {
        let _claim = self.claim(group.id)?;
        let mut record = match self.journal.load_group(group.id)? {
            Some(record) if self.is_here(&record).await? => {
                return Err(GroupError::DoneBefore(record.running_at.unwrap_or_default()));
            }
            Some(record) if record.phase == Phase::Committed && record.kind == Kind::Planned => {
                return Err(GroupError::Committed);
            }
            Some(record)
                if record.phase == Phase::Committed && !self.is_replaced(&record, chosen).await? =>
            {
                record
            }
            before => {
                let now = self.clock.now();
                let mut record = GroupRecord::after(before.as_ref(), Kind::Emergency, group, now);
                // Whoever still stands for a planned one that was called off is told in the end that it is off for good.
                record.cut = before.as_ref().filter(|before| !before.is_over()).and_then(|before| before.cut);
                record.skip_fence_command = skip_command;
                record.newest = chosen.newest;
                self.name(&mut record, chosen.point)?;
                let placed = self.place(&record, watcher).await;
                let prepared = match placed {
                    Ok(placed) => self.prepare(&record, placed, watcher).await,
                    Err(error) => Err(error),
                };
                if let Err(refused) = prepared {
                    // Nothing was begun: whatever is tried next is tried afresh.
                    if record.cut.is_none() {
                        self.withdraw_unfenced(&record).await?;
                        match before.filter(GroupRecord::is_over) {
                            Some(before) => self.journal.save_group(&before)?,
                            None => self.journal.remove_group(record.group.id)?,
                        }
                    }
                    return Err(refused);
                }
                self.enter(&mut record, Phase::Committed)?;
                fault::point("group.committed");
                record
            }
        };
        self.forward(&mut record, watcher).await
    }

    /// Nothing is lost: the sources stand first. What goes wrong before the replicas run is called off.
    pub async fn planned(
        &self,
        group: Group,
        cut: CutId,
        watcher: &Watcher,
    ) -> Result<GroupReport, GroupError> {
        let _claim = self.claim(group.id)?;
        let mut record = match self.journal.load_group(group.id)? {
            Some(record) if self.is_here(&record).await? => {
                return Err(GroupError::DoneBefore(record.running_at.unwrap_or_default()));
            }
            // It loses what came after its point: nobody asks for that by asking for a planned one.
            Some(record) if record.phase == Phase::Committed && record.kind == Kind::Emergency => {
                return Err(GroupError::GivenUp);
            }
            Some(mut record) if record.phase == Phase::Committed => {
                return self.forward(&mut record, watcher).await;
            }
            Some(mut record) if !record.is_over() => {
                return Err(self.call_off(&mut record, "it was interrupted".into()).await?);
            }
            before => GroupRecord::after(before.as_ref(), Kind::Planned, group, self.clock.now()),
        };
        // Before any source stands.
        let placed = self.place(&record, watcher).await?;
        record.cut = Some(cut);
        self.journal.save_group(&record)?;
        fault::point("planned.begun");
        match self.until_commit(&mut record, placed, watcher).await {
            Ok(()) => self.forward(&mut record, watcher).await,
            // Where the journal can't be written, the record on disk decides, at the next start.
            Err(GroupError::Journal(error)) => Err(error.into()),
            Err(error) => Err(self.call_off(&mut record, error.to_string()).await?),
        }
    }

    /// After a start of the controller: what was not committed is called off, what was goes on. Emergencies wait for their
    /// operator, who knows whether he still wants them.
    pub async fn take_up(&self, id: GroupId, watcher: &Watcher) -> Result<(), GroupError> {
        let _claim = self.claim(id)?;
        let Some(mut record) = self.journal.load_group(id)?.filter(|record| !record.is_over()) else {
            return Ok(());
        };
        match (record.phase, record.kind) {
            (Phase::Begun | Phase::Named | Phase::Restored | Phase::Returning, Kind::Planned) => {
                let why = record.last_error.clone().unwrap_or_else(|| "the controller was restarted".into());
                self.call_off(&mut record, why).await.map(drop)
            }
            (Phase::Committed, Kind::Planned) | (Phase::Running, _) => {
                self.forward(&mut record, watcher).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    async fn until_commit(
        &self,
        record: &mut GroupRecord,
        placed: Vec<Option<Placed>>,
        watcher: &Watcher,
    ) -> Result<(), GroupError> {
        let cut = record.cut.ok_or(SourceError("no cut is named".into()))?;
        watcher.step("bringing the sources to stand");
        let point = self.sources.final_cut(&record.group, cut).await?;
        self.name(record, &point)?;
        fault::point("planned.named");
        self.prepare(record, placed, watcher).await?;
        self.restore(record, watcher).await?;
        self.enter(record, Phase::Restored)?;
        fault::point("planned.restored");
        self.before(record, watcher).await?;
        self.enter(record, Phase::Committed)?;
        fault::point("planned.committed");
        Ok(())
    }

    /// From the commit on.
    async fn forward(&self, record: &mut GroupRecord, watcher: &Watcher) -> Result<GroupReport, GroupError> {
        if record.phase == Phase::Committed {
            self.rewind(record, watcher).await?;
            for part in &record.parts {
                self.replicas.fence(part.vm, record.skip_fence_command, &watcher.of(&part.name)).await?;
            }
            fault::point("group.fenced");
            self.restore(record, watcher).await?;
            fault::point("group.restored");
            if let Err(error) = self.before(record, watcher).await {
                self.warn(record, watcher, error.to_string());
            }
            if let Err(failed) = self.start_all(record, watcher).await? {
                record.last_error = Some(failed.join("; "));
                self.journal.save_group(record)?;
                if record.kind == Kind::Planned && self.nothing_ran(record).await {
                    return Err(self.call_off(record, failed.join("; ")).await?);
                }
                return Err(GroupError::Incomplete { failed });
            }
            record.running_at = Some(self.clock.now());
            record.last_error = None;
            self.enter(record, Phase::Running)?;
            fault::point("group.running");
        }
        let mut members = Vec::new();
        for part in &record.parts {
            members.push(self.replicas.start(part.vm, watcher).await?);
        }
        if !record.after_done {
            for command in record.group.spec.runbook.after.clone() {
                if let Err(error) = self.script(record, &command).await {
                    self.warn(record, watcher, error);
                }
            }
            record.after_done = true;
            self.journal.save_group(record)?;
        }
        let sources_left = self.end_holds(record, watcher).await?;
        if sources_left.is_empty() {
            self.enter(record, Phase::Done)?;
        }
        Ok(GroupReport::of(record, members, sources_left))
    }

    /// Before the commit, or where it is certain that nothing runs here. Gives the error that tells of it.
    async fn call_off(&self, record: &mut GroupRecord, why: String) -> Result<GroupError, GroupError> {
        let committed = record.phase == Phase::Committed;
        record.last_error = Some(why.clone());
        for part in &mut record.parts {
            let now = self.replicas.generation(part.vm).await;
            // After a commit whoever was told of the replica's generation must not take the source for older than it.
            part.back.get_or_insert(if committed { now.next() } else { now });
        }
        self.enter(record, Phase::Returning)?;
        fault::point("planned.returning");
        for part in &record.parts {
            self.replicas.withdraw(part.vm).await?;
            if let Some(back) = part.back {
                self.replicas.raise(part.vm, back).await?;
            }
        }
        let waiting = self.end_holds(record, &Watcher::nobody()).await?;
        if waiting.is_empty() {
            self.enter(record, Phase::CalledOff)?;
        }
        Ok(GroupError::CalledOff { why, waiting })
    }

    /// Tells each source that stands what becomes of it; gives the names of those that have not confirmed it.
    async fn end_holds(
        &self,
        record: &mut GroupRecord,
        watcher: &Watcher,
    ) -> Result<Vec<String>, GroupError> {
        let Some(cut) = record.cut else { return Ok(Vec::new()) };
        let mut left = Vec::new();
        for at in 0..record.parts.len() {
            let (vm, back, ended) = (record.parts[at].vm, record.parts[at].back, record.parts[at].hold_ended);
            if ended {
                continue;
            }
            let order = match (record.phase, back) {
                (Phase::Returning, Some(generation)) => CutOrder::Resume { generation },
                (Phase::Running, _) => CutOrder::ShutOff { generation: self.replicas.generation(vm).await },
                _ => continue,
            };
            watcher.step(format!("telling the source of {} what becomes of it", record.parts[at].name));
            match self.sources.end_hold(vm, cut, order).await {
                Ok(true) => {
                    record.parts[at].hold_ended = true;
                    self.journal.save_group(record)?;
                    fault::point("planned.hold-ended");
                }
                Ok(false) => left.push(record.parts[at].name.clone()),
                Err(error) => {
                    tracing::warn!(%error, vm = %record.parts[at].name, "the source could not be told");
                    left.push(record.parts[at].name.clone());
                }
            }
        }
        Ok(left)
    }

    /// The group was failed over, and its VMs have not gone home since: their journals say so.
    async fn is_here(&self, record: &GroupRecord) -> Result<bool, GroupError> {
        if !matches!(record.phase, Phase::Running | Phase::Done) {
            return Ok(false);
        }
        for part in &record.parts {
            if self.replicas.is_done(part.vm).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether it is certain that no replica of the group runs or has run.
    async fn nothing_ran(&self, record: &GroupRecord) -> bool {
        for part in &record.parts {
            let vm = part.vm;
            let idle = matches!(self.replicas.is_active(vm).await, Ok(false))
                && matches!(self.replicas.has_run(vm).await, Ok(false));
            if !idle {
                return false;
            }
        }
        true
    }

    async fn before(&self, record: &mut GroupRecord, watcher: &Watcher) -> Result<(), GroupError> {
        if record.before_done {
            return Ok(());
        }
        let commands = record.group.spec.runbook.before.clone();
        let mut wrong = None;
        for command in &commands {
            watcher.step(format!("running {}", command.first().map_or("", String::as_str)));
            if let Err(error) = self.script(record, command).await {
                wrong.get_or_insert(error);
            }
        }
        match wrong {
            Some(error) => Err(GroupError::Script(error)),
            None => {
                record.before_done = true;
                Ok(self.journal.save_group(record)?)
            }
        }
    }

    async fn script(&self, record: &GroupRecord, command: &[String]) -> Result<(), String> {
        let kind = if record.kind == Kind::Planned { "planned" } else { "emergency" };
        let point = record.cut_at.map(|at| at.to_string()).unwrap_or_default();
        let env = [
            ("LIFEBOAT_GROUP", record.group.spec.name.clone()),
            ("LIFEBOAT_POINT", point),
            ("LIFEBOAT_KIND", kind.to_owned()),
        ];
        scripts::run(command, &env, span(&record.group.spec.runbook.script_limit)).await
    }

    fn warn(&self, record: &mut GroupRecord, watcher: &Watcher, warning: String) {
        watcher.step(format!("WARNING: {warning}"));
        record.warn(warning);
    }

    fn enter(&self, record: &mut GroupRecord, phase: Phase) -> Result<(), GroupError> {
        record.phase = phase;
        Ok(self.journal.save_group(record)?)
    }

    fn claim(&self, id: GroupId) -> Result<Claim<'_>, GroupError> {
        let fresh = self.busy.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        if fresh { Ok(Claim(self, id)) } else { Err(GroupError::Busy) }
    }
}

/// Spans in a specification were checked when it was taken.
fn span(text: &str) -> Duration {
    text.parse::<Span>().map_or(Duration::from_secs(60), |span| span.0)
}

#[cfg(test)]
mod tests;
