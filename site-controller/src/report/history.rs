//! Failovers and undos, as the journals remember them. Pure. Called by `gather`.

use crate::failover::{
    group::record::{Earlier as OfGroup, GroupRecord, Kind, Phase as GroupPhase},
    journal::{Phase, Record},
};
use lifeboat::{id::PointId, units::UnixMs};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One failover, or what an undo made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ReportFailover")]
pub struct Failover {
    pub what: What,
    pub outcome: Outcome,
    /// Of a VM.
    pub point: Option<PointId>,
    pub cut_at: Option<UnixMs>,
    pub started_at: UnixMs,
    pub running_at: Option<UnixMs>,
    /// Age of the point when it began; a planned one loses nothing.
    pub rpo_ms: Option<u64>,
    /// From its beginning until the replica ran.
    pub rto_ms: Option<u64>,
    /// Of a VM: it went on with its memory, rather than booted.
    pub resumed: Option<bool>,
    /// Of a VM, where the site has several hosts: that at which it ran, or is to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Why it booted, what was refused, what could not be done, what went wrong.
    pub notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "ReportFailoverKind")]
pub enum What {
    Planned,
    Emergency,
    /// A completed failover was taken to this point.
    Undo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "ReportFailoverOutcome")]
pub enum Outcome {
    /// The replica, or all of a group's, came up.
    Ran,
    NotCompleted,
    /// Of a planned one: the sources went on.
    CalledOff,
}

pub fn of_vm(record: &Record) -> Vec<Failover> {
    let first = if record.kind == "planned" { What::Planned } else { What::Emergency };
    let what = |at: usize| if at == 0 { first } else { What::Undo };
    let earlier = record.earlier.iter().enumerate().map(|(at, ran)| {
        made(Times {
            what: what(at),
            cut_at: Some(ran.cut_at),
            started_at: ran.started_at,
            running_at: Some(ran.running_at),
        })
        .of(ran.point, ran.resumed, ran.cold_boot.iter().cloned().collect())
    });
    let running_at = record.running_at.filter(|_| record.phase == Phase::Running);
    let (cut_at, started_at) = (Some(record.cut_at), record.started_at);
    let last = made(Times { what: what(record.earlier.len()), cut_at, started_at, running_at });
    let undone = record.addresses.iter().chain(&record.after_resume);
    let undone = undone.filter(|step| !step.done).map(ToString::to_string);
    let refused = record.refused.iter().filter(|_| record.cold_boot.is_none()).cloned();
    let notes = record.cold_boot.iter().cloned().chain(refused).chain(undone);
    let notes = notes.chain(record.last_error.iter().cloned()).collect();
    let all = earlier.chain([last.of(record.point, record.resumes, notes)]);
    // An undo goes on at the same one.
    let host = record.host.as_ref().map(|host| host.name.clone());
    all.map(|of| Failover { host: host.clone(), ..of }).collect()
}

pub fn of_group(record: &GroupRecord) -> Vec<Failover> {
    let own = record.history().pop().into_iter();
    let over = record.phase == GroupPhase::CalledOff || record.phase == GroupPhase::Returning;
    let own = own.map(|own| group_row(&own, over));
    // What was not completed when the next one began was called off, or given up.
    let earlier = record.earlier.iter().map(|of| group_row(of, of.kind == Kind::Planned));
    earlier.chain(own).collect()
}

fn group_row(of: &OfGroup, called_off: bool) -> Failover {
    let what = match (of.undone, of.kind) {
        (true, _) => What::Undo,
        (false, Kind::Planned) => What::Planned,
        (false, Kind::Emergency) => What::Emergency,
    };
    let (cut_at, started_at, running_at) = (of.cut_at, of.started_at, of.running_at);
    let mut row = made(Times { what, cut_at, started_at, running_at });
    if called_off && running_at.is_none() {
        row.outcome = Outcome::CalledOff;
    }
    row.notes = of.warnings.iter().chain(&of.last_error).cloned().collect();
    row
}

struct Times {
    what: What,
    cut_at: Option<UnixMs>,
    started_at: UnixMs,
    running_at: Option<UnixMs>,
}

fn made(times: Times) -> Failover {
    let Times { what, cut_at, started_at, running_at } = times;
    let lost = cut_at.map(|at| started_at.0.saturating_sub(at.0));
    Failover {
        what,
        outcome: if running_at.is_some() { Outcome::Ran } else { Outcome::NotCompleted },
        point: None,
        cut_at,
        started_at,
        running_at,
        rpo_ms: if what == What::Planned { cut_at.map(|_| 0) } else { lost },
        rto_ms: running_at.map(|at| at.0.saturating_sub(started_at.0)),
        resumed: None,
        host: None,
        notes: Vec::new(),
    }
}

impl Failover {
    fn of(self, point: PointId, resumed: bool, notes: Vec<String>) -> Self {
        let resumed = self.running_at.map(|_| resumed);
        Self { point: Some(point), resumed, notes, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        failover::journal::{Earlier, tests::record},
        group::Group,
    };
    use lifeboat::id::VmId;

    #[test]
    fn what_ran_before_an_undo_is_told_with_it_and_one_that_is_not_completed_has_no_rto() {
        let mut record = record();
        let unfinished = of_vm(&record);
        assert_eq!((unfinished.len(), unfinished[0].outcome), (1, Outcome::NotCompleted));
        assert_eq!(
            (unfinished[0].rto_ms, unfinished[0].resumed, unfinished[0].rpo_ms),
            (None, None, Some(1))
        );
        record.earlier.push(Earlier {
            point: record.point,
            cut_at: UnixMs(500),
            started_at: UnixMs(2000),
            running_at: UnixMs(5000),
            resumed: true,
            cold_boot: None,
        });
        (record.cut_at, record.started_at) = (UnixMs(400), UnixMs(10_000));
        (record.phase, record.running_at) = (Phase::Running, Some(UnixMs(12_000)));
        (record.resumes, record.cold_boot) = (false, Some("it was refused 2 times".into()));
        let [first, undo] = of_vm(&record).try_into().unwrap();
        assert_eq!((first.what, first.rpo_ms, first.rto_ms), (What::Emergency, Some(1500), Some(3000)));
        assert_eq!((undo.what, undo.rpo_ms, undo.rto_ms), (What::Undo, Some(9600), Some(2000)));
        assert_eq!((undo.resumed, undo.notes.len()), (Some(false), 1));
        record.kind = "planned".into();
        assert_eq!(of_vm(&record)[0].rpo_ms, Some(0));
    }

    #[test]
    fn a_group_s_planned_failover_that_was_called_off_is_told_and_so_are_those_before_it() {
        let group = Group::alone(VmId::from_bytes([1; 16]), "web", UnixMs(1));
        let mut ran = GroupRecord::new(Kind::Planned, group.clone(), UnixMs(100));
        (ran.phase, ran.cut_at, ran.running_at) = (GroupPhase::Done, Some(UnixMs(90)), Some(UnixMs(400)));
        let mut off = GroupRecord::after(Some(&ran), Kind::Planned, group, UnixMs(900));
        (off.phase, off.last_error) = (GroupPhase::CalledOff, Some("no room".into()));
        let [first, second] = of_group(&off).try_into().unwrap();
        assert_eq!((first.outcome, first.rpo_ms, first.rto_ms), (Outcome::Ran, Some(0), Some(300)));
        assert_eq!(
            (second.outcome, second.rto_ms, second.notes),
            (Outcome::CalledOff, None, vec!["no room".into()])
        );
    }
}
