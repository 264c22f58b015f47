//! Which points there are: how many, of what kind, how old. Pure. Called by `gather`.

use crate::{
    group::points::GroupPoint,
    store::{PointState, PointSummary},
};
use lifeboat::{
    format::manifest::Consistency,
    id::{PointId, VmId},
    units::UnixMs,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Those that are kept now, and how many of them were cut in the time of the report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ReportPoints")]
pub struct Points {
    pub kept: u64,
    pub kept_of_period: u64,
    /// A replica goes on where the guest stood.
    pub memory: u64,
    /// It boots; file systems were frozen.
    pub app: u64,
    /// It boots as after a power cut.
    pub crash: u64,
    /// Disks that were at the site already, and no state of the VM. Not among the others.
    pub seeds: u64,
    /// Known to be damaged; of those that are kept. `lifeboat verify` may find more.
    pub damaged: u64,
    pub oldest: Option<UnixMs>,
    pub newest: Option<UnixMs>,
    pub stored_bytes: u64,
    /// The longest pause that one of them took.
    pub longest_pause_us: u64,
    /// Of a group: between the first and the last member that stood, at the most.
    pub worst_skew_us: Option<u64>,
}

/// What is counted of a point, or of a group's.
struct One {
    cut_at: UnixMs,
    consistency: Consistency,
    damaged: bool,
    stored_bytes: u64,
    pause_us: u64,
}

pub fn of_vm(points: &[PointSummary], since: UnixMs) -> Points {
    let own = points.iter().filter(|point| !point.seed).map(|point| One {
        cut_at: point.cut_at,
        consistency: point.consistency,
        damaged: point.state != PointState::Ok,
        stored_bytes: point.stored_bytes,
        pause_us: point.pause_us,
    });
    let seeds = points.iter().filter(|point| point.seed).count() as u64;
    Points { seeds, ..counted(own, since) }
}

pub type Members = BTreeMap<(VmId, PointId), PointSummary>;

/// A group's point is what the worst of its members' is. One of which a member's point is gone is left out.
pub fn of_group(points: &[GroupPoint], members: &Members, since: UnixMs) -> Points {
    let own = points.iter().filter_map(|point| {
        let parts: Option<Vec<&PointSummary>> =
            point.members.iter().map(|of| members.get(&(of.vm, of.point))).collect();
        let parts = parts.filter(|parts| !parts.is_empty())?;
        Some(One {
            cut_at: point.cut_at,
            consistency: parts.iter().map(|part| part.consistency).max_by_key(|of| rank(*of))?,
            damaged: parts.iter().any(|part| part.state != PointState::Ok),
            stored_bytes: parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.stored_bytes)),
            pause_us: parts.iter().map(|part| part.pause_us).max()?,
        })
    });
    let worst_skew_us = points.iter().map(|point| point.skew_us).max();
    Points { worst_skew_us, ..counted(own, since) }
}

fn rank(consistency: Consistency) -> u8 {
    match consistency {
        Consistency::Memory => 0,
        Consistency::App => 1,
        Consistency::Crash => 2,
    }
}

fn counted(all: impl Iterator<Item = One>, since: UnixMs) -> Points {
    let mut out = Points::default();
    for one in all {
        out.kept += 1;
        out.kept_of_period += u64::from(one.cut_at >= since);
        out.damaged += u64::from(one.damaged);
        match one.consistency {
            Consistency::Memory => out.memory += 1,
            Consistency::App => out.app += 1,
            Consistency::Crash => out.crash += 1,
        }
        out.oldest = Some(out.oldest.map_or(one.cut_at, |oldest| oldest.min(one.cut_at)));
        out.newest = out.newest.max(Some(one.cut_at));
        out.stored_bytes = out.stored_bytes.saturating_add(one.stored_bytes);
        out.longest_pause_us = out.longest_pause_us.max(one.pause_us);
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::group::points::PointOf;
    use lifeboat::{
        id::CutId,
        units::{Generation, Seq},
    };

    pub(in crate::report) fn point(vm: u8, seq: u64, consistency: Consistency) -> PointSummary {
        PointSummary {
            vm: VmId::from_bytes([vm; 16]),
            name: "web".into(),
            point: PointId::from_bytes([seq as u8; 16]),
            seq: Seq(seq),
            cut_at: UnixMs(seq * 1000),
            committed_at: UnixMs(seq * 1000 + 100),
            generation: Generation(1),
            has_memory: consistency == Consistency::Memory,
            seed: false,
            at_rest: false,
            stays_off: false,
            consistency,
            cut: None,
            memory_changed_bytes: 0,
            disk_changed_bytes: 0,
            wire_bytes: 0,
            pause_us: seq * 10,
            stored_bytes: 100,
            state: PointState::Ok,
        }
    }

    pub(in crate::report) fn group_point(no: u64, vms: &[u8]) -> GroupPoint {
        let members = vms.iter().map(|vm| PointOf {
            consistency: None,
            vm: VmId::from_bytes([*vm; 16]),
            name: "web".into(),
            point: PointId::from_bytes([no as u8; 16]),
            seq: Seq(no),
            pause_us: 10,
        });
        let cut = CutId::from_bytes([no as u8; 16]);
        GroupPoint { version: 1, cut, no, cut_at: UnixMs(no * 1000), skew_us: no, members: members.collect() }
    }

    #[test]
    fn kinds_are_counted_and_a_seed_is_no_state_of_the_vm() {
        let mut points = [Consistency::Crash, Consistency::Memory, Consistency::App, Consistency::Memory]
            .map(Some)
            .to_vec();
        let mut points: Vec<_> =
            points.drain(..).flatten().zip(1..).map(|(of, seq)| point(1, seq, of)).collect();
        points[0].seed = true;
        points[1].state = PointState::Damaged("gone".into());
        let found = of_vm(&points, UnixMs(3000));
        assert_eq!((found.kept, found.kept_of_period, found.seeds, found.damaged), (3, 2, 1, 1));
        assert_eq!((found.memory, found.app, found.crash), (2, 1, 0));
        assert_eq!((found.oldest, found.newest), (Some(UnixMs(2000)), Some(UnixMs(4000))));
        assert_eq!((found.stored_bytes, found.longest_pause_us), (300, 40));
        assert_eq!(of_vm(&[], UnixMs(0)), Points::default());
    }

    #[test]
    fn a_group_s_point_is_as_good_as_the_worst_of_it_and_one_that_is_not_whole_is_none() {
        let summaries = [
            point(1, 1, Consistency::Memory),
            point(2, 1, Consistency::Crash),
            point(1, 2, Consistency::Memory),
            point(2, 2, Consistency::Memory),
            point(1, 3, Consistency::Memory),
        ];
        let members = summaries.into_iter().map(|point| ((point.vm, point.point), point)).collect();
        let points = [1, 2, 3].map(|no| group_point(no, &[1, 2]));
        let found = of_group(&points, &members, UnixMs(0));
        assert_eq!((found.kept, found.memory, found.crash), (2, 1, 1));
        assert_eq!((found.worst_skew_us, found.stored_bytes), (Some(3), 400));
    }
}
