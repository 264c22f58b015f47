//! The order of points, in memory: by seq, and by when they were cut. So one point is found without looking at all.
//! Promises the answers that a scan of all points would give ([`Ask`]), however the source's clock jumped. Pure; held by
//! the indices beside what they hold, and as long as that.

use super::summary::{PointState, PointSummary};
use lifeboat::{
    id::VmId,
    units::{Seq, UnixMs},
};
use std::collections::{BTreeMap, BTreeSet};

/// Which point of a VM is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Oldest,
    Newest,
    NewestNoSeed,
    /// Of those that were cut then or earlier, the one cut last; the newer one of two cut at the same time. No seeds.
    AtOrBefore(UnixMs),
    /// The newest one before this that is not known to be damaged.
    WholeBefore(Seq),
}

#[derive(Debug, Default)]
pub struct Order {
    by_seq: BTreeMap<(VmId, Seq), Place>,
    /// Without seeds.
    by_time: BTreeSet<(VmId, UnixMs, Seq)>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    cut_at: UnixMs,
    whole: bool,
    seed: bool,
}

impl Order {
    pub fn of(points: &[PointSummary]) -> Self {
        let mut order = Self::default();
        points.iter().for_each(|point| order.put(point));
        order
    }

    pub fn put(&mut self, point: &PointSummary) {
        let PointSummary { vm, seq, cut_at, seed, .. } = *point;
        self.forget(vm, seq);
        let whole = point.state == PointState::Ok;
        self.by_seq.insert((vm, seq), Place { cut_at, whole, seed });
        if !seed {
            self.by_time.insert((vm, cut_at, seq));
        }
    }

    pub fn forget(&mut self, vm: VmId, seq: Seq) {
        if let Some(former) = self.by_seq.remove(&(vm, seq)) {
            self.by_time.remove(&(vm, former.cut_at, seq));
        }
    }

    pub fn find(&self, vm: VmId, ask: Ask) -> Option<Seq> {
        let of_vm = || self.by_seq.range((vm, Seq(0))..=(vm, Seq(u64::MAX)));
        let seq = |((_, seq), _): (&(VmId, Seq), &Place)| *seq;
        match ask {
            Ask::Oldest => of_vm().next().map(seq),
            Ask::Newest => of_vm().next_back().map(seq),
            Ask::NewestNoSeed => of_vm().rfind(|(_, place)| !place.seed).map(seq),
            Ask::AtOrBefore(at) => {
                let mut early = self.by_time.range((vm, UnixMs(0), Seq(0))..=(vm, at, Seq(u64::MAX)));
                early.next_back().map(|(_, _, seq)| *seq)
            }
            Ask::WholeBefore(before) => {
                let mut older = self.by_seq.range((vm, Seq(0))..(vm, before));
                older.rfind(|(_, place)| place.whole).map(seq)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryIndex, SummaryIndex};
    use lifeboat::{id::PointId, units::Generation};
    use proptest::prelude::*;

    fn point(vm: u8, seq: u64, cut_at: u64, (whole, seed): (bool, bool)) -> PointSummary {
        PointSummary {
            vm: VmId::from_bytes([vm; 16]),
            name: "web-1".into(),
            point: PointId::from_bytes([seq as u8; 16]),
            seq: Seq(seq),
            cut_at: UnixMs(cut_at),
            committed_at: UnixMs(cut_at),
            generation: Generation::FIRST,
            has_memory: true,
            consistency: lifeboat::format::manifest::Consistency::Memory,
            cut: None,
            seed,
            at_rest: false,
            stays_off: false,
            memory_changed_bytes: 0,
            disk_changed_bytes: 0,
            wire_bytes: 0,
            pause_us: 0,
            stored_bytes: 0,
            state: if whole { PointState::Ok } else { PointState::Damaged("gone".into()) },
        }
    }

    /// What the words of [`Ask`] say, by looking at every point.
    fn scan(points: &[PointSummary], vm: VmId, ask: Ask) -> Option<PointSummary> {
        let own = points.iter().filter(|point| point.vm == vm);
        let found = match ask {
            Ask::Oldest => own.min_by_key(|point| point.seq),
            Ask::Newest => own.max_by_key(|point| point.seq),
            Ask::NewestNoSeed => own.filter(|point| !point.seed).max_by_key(|point| point.seq),
            Ask::AtOrBefore(at) => own
                .filter(|point| point.cut_at <= at && !point.seed)
                .max_by_key(|point| (point.cut_at, point.seq)),
            Ask::WholeBefore(seq) => own
                .filter(|point| point.seq < seq && point.state == PointState::Ok)
                .max_by_key(|point| point.seq),
        };
        found.cloned()
    }

    proptest! {
        /// Goal: an index answers as a scan does, whatever was put, put again and forgotten, with a clock that jumps.
        /// Method: few seqs and few times, so that most are met again; every question that can differ is asked.
        #[test]
        fn a_point_is_found_as_a_scan_of_all_finds_it_however_the_clock_jumps(
            begun in proptest::collection::vec((1u8..3, 1u64..12, 0u64..10, any::<(bool, bool)>()), 0..12),
            then in proptest::collection::vec((1u8..3, 1u64..12, 0u64..10, any::<(bool, bool)>(), 0u8..4), 0..40),
        ) {
            let mut truth = BTreeMap::new();
            for (vm, seq, cut_at, state) in begun {
                truth.insert((vm, seq), point(vm, seq, cut_at, state));
            }
            let index = MemoryIndex::default();
            index.reconcile(&truth.values().cloned().collect::<Vec<_>>());
            for (vm, seq, cut_at, state, what) in then {
                if what == 0 {
                    truth.remove(&(vm, seq));
                    index.forget(VmId::from_bytes([vm; 16]), &[Seq(seq)]);
                } else {
                    let point = point(vm, seq, cut_at, state);
                    index.put(&point);
                    truth.insert((vm, seq), point);
                }
            }
            let all: Vec<_> = truth.values().cloned().collect();
            let times = (0..11).map(|at| Ask::AtOrBefore(UnixMs(at)));
            let seqs = (0..13).map(|seq| Ask::WholeBefore(Seq(seq)));
            for ask in [Ask::Oldest, Ask::Newest, Ask::NewestNoSeed].into_iter().chain(times).chain(seqs) {
                for vm in 1u8..4 {
                    let vm = VmId::from_bytes([vm; 16]);
                    prop_assert_eq!(index.find(vm, ask), Some(scan(&all, vm, ask)), "{:?}", ask);
                }
            }
        }
    }
}
