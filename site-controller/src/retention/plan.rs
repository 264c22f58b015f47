//! What to do about one VM's journal. Pure.
//!
//! Every point has a *level*: a point that a coarser rule keeps has a higher one, and among points of the same rule those
//! at multiples of a power stand above the others. A point is folded over the nearest one below it of its own level or
//! higher. So a path climbs through the levels, and meets few points of each: at most `RADIX - 1` of those that all are
//! kept, and as many for each power. A point that no rule wants any more goes when nothing lies over it; where something
//! does, that is folded past it once it pays. The oldest, complete point, is folded into the next one only when that has
//! grown to a share of it, for that is the dear one. Where much lies over a complete point, and the journal since is so long
//! that one more complete point is a small part of it, there is one more: so a late point is read nearly as fast as an early
//! one. Called by `keeper`.

use crate::store::{Journal, JournalPoint, retain::Why};
use lifeboat::units::Seq;
use std::collections::{BTreeMap, BTreeSet};

/// A path longer than this is shortened whatever that costs; no kept point has a longer one for long.
pub const LAYERS_MAX: u32 = 48;
/// Points taken away in one pass at the most.
pub const PRUNED_MAX: usize = 512;

/// What is to be done next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Todo {
    /// Points that go now, oldest first.
    pub prune: Vec<Seq>,
    /// More would have gone, but for the bound on one pass.
    pub more: bool,
    /// A point to be folded, and the point that it then lies over; none to make it complete.
    pub fold: Option<(Seq, Option<Seq>)>,
}

/// `wanted` says which points stay and why; `held` names points that stay in any case.
pub fn todo(journal: &Journal, wanted: &BTreeMap<Seq, Why>, held: &BTreeSet<Seq>) -> Todo {
    if journal.frozen.is_some() || journal.points.is_empty() {
        return Todo::default();
    }
    let view = View::new(journal, wanted, held);
    let mut prune = view.prunable();
    let more = prune.len() > PRUNED_MAX;
    prune.truncate(PRUNED_MAX);
    let fold =
        view.aligned().or_else(|| view.too_deep()).or_else(|| view.past_unwanted()).or_else(|| view.heavy());
    Todo { prune, more, fold }
}

struct View<'a> {
    points: BTreeMap<Seq, &'a JournalPoint>,
    wanted: &'a BTreeMap<Seq, Why>,
    held: &'a BTreeSet<Seq>,
    newest: Seq,
    children: BTreeMap<Seq, Vec<Seq>>,
}

impl<'a> View<'a> {
    fn new(journal: &'a Journal, wanted: &'a BTreeMap<Seq, Why>, held: &'a BTreeSet<Seq>) -> Self {
        let points: BTreeMap<_, _> = journal.points.iter().map(|point| (point.seq, point)).collect();
        let mut children = BTreeMap::<Seq, Vec<Seq>>::new();
        for point in &journal.points {
            if let Some(base) = point.base {
                children.entry(base).or_default().push(point.seq);
            }
        }
        let newest = points.last_key_value().map(|(seq, _)| *seq).unwrap_or(Seq(0));
        Self { points, wanted, held, newest, children }
    }

    fn stays(&self, seq: Seq) -> bool {
        seq == self.newest
            || self.wanted.contains_key(&seq)
            || self.held.contains(&seq)
            || self.points.get(&seq).is_some_and(|point| point.pinned)
    }

    fn children(&self, seq: Seq) -> &[Seq] {
        self.children.get(&seq).map_or(&[], Vec::as_slice)
    }

    /// Points that nobody wants and nothing lies over, or only such points.
    fn prunable(&self) -> Vec<Seq> {
        let mut going = BTreeSet::new();
        for seq in self.points.keys().rev().copied() {
            if !self.stays(seq) && self.children(seq).iter().all(|child| going.contains(child)) {
                going.insert(seq);
            }
        }
        // The newest of them first in each branch; of branches, those of the oldest.
        let mut going: Vec<Seq> = going.into_iter().collect();
        if going.len() > PRUNED_MAX {
            let all: BTreeSet<Seq> = going.iter().copied().collect();
            let leaf = |seq: &Seq| self.children(*seq).iter().all(|child| !all.contains(child));
            going.sort_by_key(|seq| (!leaf(seq), *seq));
        }
        going
    }

    /// From a point downwards, as far as layers are there.
    fn path(&self, seq: Seq) -> Vec<&'a JournalPoint> {
        let mut path = Vec::new();
        let mut at = Some(seq);
        while let Some(point) = at.and_then(|seq| self.points.get(&seq)) {
            path.push(*point);
            at = point.base.filter(|base| *base < point.seq);
        }
        path
    }

    /// Complete in itself, and so the end of every path that reaches it.
    fn is_root(point: &JournalPoint) -> bool {
        point.base.is_none()
    }

    fn level(&self, seq: Seq) -> u32 {
        match self.wanted.get(&seq) {
            Some(Why::Slot { slot_ms, no }) => {
                // 200 for an hour, and more for each doubling: above all that are kept only because all are.
                let rank = u64::BITS - (*slot_ms / 1000).leading_zeros();
                LEVELS * (1 + rank) + power(*no, SLOT_RADIX)
            }
            Some(Why::All | Why::Newest) | None => power(seq.0, RADIX),
        }
    }

    /// The oldest point that does not lie where its level asks for.
    fn aligned(&self) -> Option<(Seq, Option<Seq>)> {
        self.points.values().filter(|point| point.whole && point.base.is_some()).find_map(|point| {
            let level = self.level(point.seq);
            if level == 0 || !self.stays(point.seq) {
                return None;
            }
            let path = self.path(point.seq);
            let at =
                path[1..].iter().position(|below| self.level(below.seq) >= level || Self::is_root(below))?;
            let run = &path[..=at];
            (at > 0 && run.iter().all(|below| below.whole)).then(|| {
                // A history that was never folded: a part of it at a time, each once.
                let narrow =
                    |point: &&&JournalPoint| point.base.is_some_and(|base| point.seq.0 - base.0 < RUN_MAX);
                let low = run.iter().rev().position(|point| narrow(&point)).unwrap_or_default();
                let part = run.iter().rev().skip(low).take_while(narrow).take(RUN_MAX as usize).count();
                match (run.len() > RUN_MAX as usize, part) {
                    (true, 2..) => {
                        let (top, under) = (run.len() - low - part, run.len() - low);
                        (run[top].seq, Some(path[under].seq))
                    }
                    _ => (point.seq, Some(path[at + 1].seq)),
                }
            })
        })
    }

    /// The oldest point whose path is too long: its longest stretch of one level is laid together, but for its oldest.
    fn too_deep(&self) -> Option<(Seq, Option<Seq>)> {
        let deep = self.points.values().find(|point| point.whole && point.layers > LAYERS_MAX)?;
        let path = self.path(deep.seq);
        let mut best = (0, 0);
        let mut from = 0;
        for at in 1..=path.len() {
            let level = |at: usize| path.get(at).map(|point| (self.level(point.seq), Self::is_root(point)));
            if level(at) != level(from) {
                if at - from > best.1 - best.0 {
                    best = (from, at);
                }
                from = at;
            }
        }
        let (mut from, mut to) = best;
        if to - from < 3 {
            // No stretch worth the name: the newest few, whatever they are.
            (from, to) = (0, path.len().min(1 + LAYERS_MAX as usize / 4));
        }
        let all_whole = path[from..to].iter().all(|point| point.whole);
        all_whole.then(|| (path[from].seq, Some(path[to - 1].seq)))
    }

    /// The fold that rids the journal of most of what nobody wants.
    fn past_unwanted(&self) -> Option<(Seq, Option<Seq>)> {
        let total: u64 =
            self.points.values().filter(|point| !Self::is_root(point)).map(|point| point.bytes).sum();
        let mut stuck = BTreeMap::<Seq, (u64, usize)>::new();
        let (mut stuck_bytes, mut count) = (0, 0);
        for point in self.points.values().filter(|point| self.stays(point.seq) && point.whole) {
            let path = self.path(point.seq);
            let (mut upper, mut run) = (point.bytes, 0);
            for below in &path[1..] {
                let alone = self.children(below.seq).len() == 1 && !self.stays(below.seq) && below.whole;
                // What is complete is dear to write anew: only once what lies over it is a share of it.
                if !alone || (Self::is_root(below) && upper < below.bytes / ROOT_SHARE) {
                    break;
                }
                upper += below.bytes;
                run += 1;
                let below_bytes = if Self::is_root(below) { upper - below.bytes } else { below.bytes };
                stuck_bytes += below_bytes;
                count += 1;
            }
            if run > 0 {
                stuck.insert(point.seq, (upper - point.bytes, run));
            }
        }
        let pressed = stuck_bytes > total / STUCK_SHARE || count > (self.points.len() / 4).max(STUCK_POINTS);
        let (seq, (_, run)) = stuck.into_iter().filter(|_| pressed).max_by_key(|(_, (bytes, _))| *bytes)?;
        let path = self.path(seq);
        Some((seq, path.get(run + 1).map(|point| point.seq)))
    }

    /// The oldest point under which more than a share of a complete one is to be read on top of that: made complete itself,
    /// where that costs a small part of what the journal has grown by since the last one.
    fn heavy(&self) -> Option<(Seq, Option<Seq>)> {
        let mut since = 0;
        self.points.values().find_map(|point| {
            since = if Self::is_root(point) { 0 } else { since + point.bytes };
            if !self.stays(point.seq) || self.level(point.seq) == 0 {
                return None;
            }
            let path = self.path(point.seq);
            let (root, over) = path.split_last()?;
            let heavy = over.iter().map(|layer| layer.bytes).sum::<u64>() > root.bytes / OVER_SHARE;
            let cheap = since / JOURNAL_SHARE >= root.bytes;
            (heavy && cheap && Self::is_root(root) && path.iter().all(|layer| layer.whole))
                .then_some((point.seq, None))
        })
    }
}

/// How often `radix` divides `no`; at the most [`LEVELS`] - 1 times.
fn power(no: u64, radix: u64) -> u32 {
    let (mut no, mut power) = (no, 0);
    while no > 0 && no.is_multiple_of(radix) && power < LEVELS - 1 {
        no /= radix;
        power += 1;
    }
    power
}

/// Levels of one rule.
const LEVELS: u32 = 16;
const RADIX: u64 = 4;
/// Layers that one fold lays together at the most, where there are more that have not been folded.
const RUN_MAX: u64 = 256;
const SLOT_RADIX: u64 = 6;
/// A complete layer is written anew when what lies over it has grown to this part of it.
const ROOT_SHARE: u64 = 4;
/// What lies over a complete layer may grow to this part of it, where a further one is this part of the journal since.
const OVER_SHARE: u64 = 2;
const JOURNAL_SHARE: u64 = 4;
/// Unwanted points are folded past when they hold this part of the journal, or are this many.
const STUCK_SHARE: u64 = 4;
const STUCK_POINTS: usize = 16;
