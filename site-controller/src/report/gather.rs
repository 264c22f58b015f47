//! Asks the store, the groups, the journals, the drills and the judge for what a report tells. Changes nothing. Called by
//! `api`.

use super::{
    Report, Subject, history, points,
    rpo::{self, Asked, Moment},
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
}

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

    async fn group(&self, group: &Group, period: Period) -> Result<Subject, ReportError> {
        let all = self.coordinator.points.list(group.id).await?;
        let mut members = points::Members::new();
        let mut until = period.now;
        for member in &group.members {
            let own = self.catalog.points(member.vm).await?;
            members.extend(own.into_iter().map(|point| ((member.vm, point.point), point)));
            until = until.min(protected_until(self.journal.load(member.vm)?.as_ref(), period.now));
        }
        let target_ms = Some(millis(group.spec.rpo()));
        let asked = Asked { since: period.since, until, target_ms };
        let failovers = self.journal.load_group(group.id)?.map(|record| history::of_group(&record));
        Ok(Subject {
            name: group.spec.name.clone(),
            is_group: true,
            group: None,
            members: group.members.iter().map(|member| member.name.clone()).collect(),
            target_ms,
            points: points::of_group(&all, &members, period.since),
            rpo: rpo::attained(&group_moments(&all, &members), asked, period.now),
            drill_every: group.spec.drill.every.clone(),
            drills: self.drills_of(period, |record| record.group == group.id),
            failovers: of_period(failovers.unwrap_or_default(), period),
            readiness: Some(self.readiness.one(&group.id.to_string()).await?),
        })
    }

    async fn vm(&self, vm: VmId, name: String, period: Period) -> Result<Subject, ReportError> {
        let all = self.catalog.points(vm).await?;
        let group = self.coordinator.book.group_of(vm);
        let interval = self.board.seen(vm).and_then(|seen| seen.report).map(|report| report.interval_ms);
        // Of a VM in no group: two intervals, and a second on the way, as `check` has it.
        let alone = interval.map(|ms| ms.saturating_mul(2).saturating_add(1000));
        let target_ms = group.as_ref().map_or(alone, |group| Some(millis(group.spec.rpo())));
        let record = self.journal.load(vm)?;
        let until = protected_until(record.as_ref(), period.now);
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
            target_ms,
            points: points::of_vm(&all, period.since),
            rpo: rpo::attained(&moments(&all), Asked { since: period.since, until, target_ms }, period.now),
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
    "The RPO is computed from the points that are kept now: where points in between are not kept any more, the time counts as \
     unknown. How much is known of the past is a matter of the `keep` rules.",
    "A point's instant is stamped by the clock of the source (of a group: of the site), when it became durable by the site's: \
     ages are wrong by what these clocks differ.",
    "Time in which a group was paused, or a VM was no longer protected on purpose, counts like any other. From a point of a VM \
     that was off until the next one it counts as unknown.",
    "The target is the one that holds now; earlier targets are not remembered.",
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
