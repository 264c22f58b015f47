//! Asks the store, the groups, the journals, the drills and the judge for what a report tells. Changes nothing. Called by
//! `api`.

use super::{
    Report, Subject,
    age::{Asked, Moment},
    history,
    log::{Of, SlotLog, SlotLogError},
    points, rpo,
};
use crate::{
    catalog::{Catalog, CatalogError, PointSummary},
    drill::{DrillBook, DrillRecord},
    failover::journal::{Journal, JournalError, Phase, Record},
    group::{
        Group,
        coordinator::Coordinator,
        points::{GroupPoint, GroupPointError},
    },
    intake::board::Board,
    readiness::watch::Watch,
};
use lifeboat::{
    clock::Clock,
    id::{PointId, VmId},
    units::UnixMs,
};
use std::{collections::BTreeMap, time::Duration};

#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Points(#[from] GroupPointError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("what is recorded of ages")]
    Slots(#[from] SlotLogError),
    #[error("what is recorded of ages could not be waited for")]
    Task(#[from] tokio::task::JoinError),
}

/// What is asked.
pub struct Sources<'a> {
    pub site: &'a str,
    pub catalog: &'a Catalog,
    pub coordinator: &'a Coordinator,
    pub journal: &'a Journal,
    pub board: &'a Board,
    pub drills: &'a DrillBook,
    pub readiness: &'a Watch,
    pub slots: &'a SlotLog,
    pub clock: &'a dyn Clock,
}

/// What the age of a subject's newest point is known by, and the points themselves.
pub(super) struct Ages<P> {
    pub points: P,
    pub moments: Vec<Moment>,
    /// Until when the age says something.
    pub until: UnixMs,
    pub target_ms: Option<u64>,
}

impl<P> Ages<P> {
    pub fn since(&self, since: UnixMs) -> Asked {
        Asked { since, until: self.until, target_ms: self.target_ms }
    }
}

/// A group's points, and those of its members.
pub(super) type OfGroup = (Vec<GroupPoint>, points::Members);

/// The time of the report.
#[derive(Clone, Copy)]
pub struct Period {
    pub since: UnixMs,
    pub now: UnixMs,
}

impl Sources<'_> {
    /// Of a group and its VMs, of a VM, or of all there are.
    pub async fn report(&self, of: Option<&str>, period: Period) -> Result<Report, ReportError> {
        let mut groups = self.coordinator.book.list();
        let mut vms: Vec<(VmId, String)> = Vec::new();
        match of {
            Some(name) => match self.coordinator.book.find(name) {
                Ok(group) => {
                    vms.extend(group.members.iter().map(|member| (member.vm, member.name.clone())));
                    groups = vec![group];
                }
                Err(_) => {
                    let found = self.catalog.find_vm(name).await?;
                    vms.push((found.vm, found.name));
                    groups.clear();
                }
            },
            None => vms.extend(self.catalog.vms().await?.into_iter().map(|found| (found.vm, found.name))),
        }
        let mut subjects = Vec::new();
        for group in &groups {
            subjects.push(self.group(group, period).await?);
        }
        for (vm, name) in vms {
            subjects.push(self.vm(vm, name, period).await?);
        }
        Ok(Report {
            version: Report::VERSION,
            site: self.site.to_owned(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            made_at: period.now,
            since: period.since,
            subjects,
            limits: LIMITS.iter().map(|limit| (*limit).to_owned()).collect(),
        })
    }

    pub(super) async fn group_ages(&self, group: &Group, now: UnixMs) -> Result<Ages<OfGroup>, ReportError> {
        let all = self.coordinator.points.list(group).await?;
        let mut members = points::Members::new();
        let mut until = now;
        for member in &group.members {
            let own = self.catalog.points(member.vm).await?;
            members.extend(own.into_iter().map(|point| ((member.vm, point.point), point)));
            until = until.min(protected_until(self.journal.load(member.vm)?.as_ref(), now));
        }
        let moments = group_moments(&all, &members);
        Ok(Ages { moments, points: (all, members), until, target_ms: Some(millis(group.spec.rpo())) })
    }

    pub(super) async fn vm_ages(
        &self,
        vm: VmId,
        now: UnixMs,
    ) -> Result<Ages<Vec<PointSummary>>, ReportError> {
        let points = self.catalog.points(vm).await?;
        let group = self.coordinator.book.group_of(vm);
        let interval = self.board.seen(vm).and_then(|seen| seen.report).map(|report| report.interval_ms);
        // Of a VM in no group: two intervals, and a second on the way, as `check` has it.
        let alone = interval.map(|ms| ms.saturating_mul(2).saturating_add(1000));
        let target_ms = group.map_or(alone, |group| Some(millis(group.spec.rpo())));
        let until = protected_until(self.journal.load(vm)?.as_ref(), now);
        Ok(Ages { moments: moments(&points), points, until, target_ms })
    }

    async fn attained<P>(
        &self,
        of: Of,
        ages: &Ages<P>,
        period: Period,
    ) -> Result<rpo::Attained, ReportError> {
        let (log, since) = (self.slots.clone(), period.since);
        let recorded = tokio::task::spawn_blocking(move || log.since(of, since)).await??;
        Ok(rpo::attained(&ages.moments, &recorded, ages.since(since), period.now))
    }

    async fn group(&self, group: &Group, period: Period) -> Result<Subject, ReportError> {
        let ages = self.group_ages(group, period.now).await?;
        let rpo = self.attained(Of::Group(group.id), &ages, period).await?;
        let (all, members) = &ages.points;
        let failovers = self.journal.load_group(group.id)?.map(|record| history::of_group(&record));
        Ok(Subject {
            name: group.spec.name.clone(),
            is_group: true,
            group: None,
            members: group.members.iter().map(|member| member.name.clone()).collect(),
            target_ms: ages.target_ms,
            points: points::of_group(all, members, period.since),
            rpo,
            drill_every: group.spec.drill.every.clone(),
            drills: self.drills_of(period, |record| record.group == group.id),
            failovers: of_period(failovers.unwrap_or_default(), period),
            readiness: Some(self.readiness.one(&group.id.to_string()).await?),
        })
    }

    async fn vm(&self, vm: VmId, name: String, period: Period) -> Result<Subject, ReportError> {
        let ages = self.vm_ages(vm, period.now).await?;
        let rpo = self.attained(Of::Vm(vm), &ages, period).await?;
        let group = self.coordinator.book.group_of(vm);
        let record = self.journal.load(vm)?;
        let records = self.journal.closed(vm)?.into_iter().chain(record);
        let failovers = records.flat_map(|record| history::of_vm(&record)).collect();
        let readiness = match &group {
            Some(_) => None,
            None => Some(self.readiness.one(&vm.to_string()).await?),
        };
        Ok(Subject {
            name,
            is_group: false,
            group: group.map(|group| group.spec.name),
            members: Vec::new(),
            target_ms: ages.target_ms,
            points: points::of_vm(&ages.points, period.since),
            rpo,
            drill_every: None,
            drills: self.drills_of(period, |record| record.members.iter().any(|member| member.vm == vm)),
            failovers: of_period(failovers, period),
            readiness,
        })
    }

    fn drills_of(&self, period: Period, which: impl Fn(&DrillRecord) -> bool) -> Vec<DrillRecord> {
        let all = self.drills.list().into_iter();
        all.filter(|record| record.started_at >= period.since && which(record)).collect()
    }
}

fn of_period(mut all: Vec<history::Failover>, period: Period) -> Vec<history::Failover> {
    all.retain(|failover| failover.started_at >= period.since);
    all.sort_by_key(|failover| failover.started_at);
    all
}

/// Until the VM was this site's: from then on the age of its source's points says nothing.
fn protected_until(record: Option<&Record>, now: UnixMs) -> UnixMs {
    let fenced = record.filter(|record| record.phase >= Phase::Fenced);
    fenced.map_or(now, |record| record.earlier.first().map_or(record.started_at, |first| first.started_at))
}

/// A seed, and a failover or hand-over, begin another history.
fn moments(points: &[PointSummary]) -> Vec<Moment> {
    let (mut era, mut before) = (0, None);
    let mut out = Vec::new();
    for point in points {
        if point.seed || before.is_some_and(|generation| generation != point.generation) {
            era += 1;
        }
        before = Some(point.generation);
        if !point.seed {
            let (cut_at, durable_at) = (point.cut_at, point.committed_at);
            out.push(Moment { cut_at, durable_at, no: point.seq.0, era, at_rest: point.at_rest });
        }
    }
    out
}

/// A group's point is durable with the last of its members'.
fn group_moments(points: &[GroupPoint], members: &BTreeMap<(VmId, PointId), PointSummary>) -> Vec<Moment> {
    let (mut era, mut before) = (0, BTreeMap::new());
    let mut out = Vec::new();
    for point in points {
        let parts: Option<Vec<&PointSummary>> =
            point.members.iter().map(|of| members.get(&(of.vm, of.point))).collect();
        let Some(parts) = parts else { continue };
        let Some(durable_at) = parts.iter().map(|part| part.committed_at).max() else { continue };
        let mut changed = false;
        for part in parts {
            let known = before.insert(part.vm, part.generation);
            changed |= known.is_some_and(|known| known != part.generation);
        }
        era += u64::from(changed);
        // A group goes on getting points while a member is off.
        out.push(Moment { cut_at: point.cut_at, durable_at, no: point.no, era, at_rest: false });
    }
    out
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// What every report says of itself.
const LIMITS: &[&str] = &[
    "The RPO is recorded every ten minutes while the points that tell it are there, and computed from the points for the last \
     minutes, and for what was not recorded: before this release, or while the site was down for long. Where neither tells, the \
     time counts as unknown.",
    "Percentiles of what was recorded are rounded up, by 10 % at the most; how long the RPO was kept, and the longest age, are \
     exact.",
    "A point's instant is stamped by the clock of the source (of a group: of the site), when it became durable by the site's: \
     ages are wrong by what these clocks differ.",
    "Time in which a group was paused, or a VM was no longer protected on purpose, counts like any other. From a point of a VM \
     that was off until the next one it counts as unknown.",
    "What was recorded is held against the target of its time, all else against the one that holds now.",
    "That a point is kept says that its files are there; `lifeboat verify` reads and hashes them, a drill shows that the \
     replica comes up.",
    "Failovers are told as their journals remember them, of a group the last hundred; one that was withdrawn before anything \
     was changed is in the audit log alone.",
    "Drills whose evidence was removed (`keep_for`) are not told.",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        failover::journal::{Earlier, tests::record},
        report::points::tests::{group_point, point},
    };
    use lifeboat::{format::manifest::Consistency::Memory, units::Generation};

    #[test]
    fn a_seed_and_another_generation_begin_another_history() {
        let mut points: Vec<_> = (1..=5).map(|seq| point(1, seq, Memory)).collect();
        points[2].seed = true;
        points[4].generation = Generation(2);
        let found = moments(&points);
        assert_eq!(
            found.iter().map(|of| (of.no, of.era)).collect::<Vec<_>>(),
            [(1, 0), (2, 0), (4, 1), (5, 2)]
        );
        assert_eq!((found[0].cut_at, found[0].durable_at), (UnixMs(1000), UnixMs(1100)));
    }

    #[test]
    fn a_group_s_point_is_durable_when_its_last_member_s_is() {
        let mut summaries =
            [point(1, 1, Memory), point(2, 1, Memory), point(1, 2, Memory), point(2, 2, Memory)];
        summaries[1].committed_at = UnixMs(1900);
        summaries[3].generation = Generation(2);
        let members: BTreeMap<_, _> =
            summaries.into_iter().map(|point| ((point.vm, point.point), point)).collect();
        let points = [1, 2, 3].map(|no| group_point(no, &[1, 2]));
        let found = group_moments(&points, &members);
        assert_eq!(found.iter().map(|of| (of.no, of.era)).collect::<Vec<_>>(), [(1, 0), (2, 1)]);
        assert_eq!(found[0].durable_at, UnixMs(1900));
    }

    #[test]
    fn a_failover_ends_what_is_known_with_its_first_beginning() {
        let mut record = record();
        assert_eq!(protected_until(None, UnixMs(9)), UnixMs(9));
        assert_eq!(protected_until(Some(&record), UnixMs(9)), record.started_at);
        let (point, cut_at) = (record.point, record.cut_at);
        let ran = (UnixMs(1), UnixMs(2));
        let (started_at, running_at) = ran;
        record.earlier =
            vec![Earlier { point, cut_at, started_at, running_at, resumed: true, cold_boot: None }];
        record.started_at = UnixMs(7);
        assert_eq!(protected_until(Some(&record), UnixMs(9)), UnixMs(1));
        record.phase = Phase::Begun;
        assert_eq!(protected_until(Some(&record), UnixMs(9)), UnixMs(9));
    }
}
