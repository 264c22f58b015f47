//! Marks: what our dirty bitmaps say about changes since the basis, and the actions that move them on. Pure.
//! Promises: a delta is promised only if every write since the basis is in the bitmaps that remain. Called by `disk`.
//!
//! Marks of points under way are a chain: each stops in the instant in which the next one takes over, and the last one
//! records. Marks go in two ways only, each one transaction: all those before the newest durable point together, or all
//! those after a point by being merged into its mark. So where a mark is there, all that came after it are.

use super::{names::Mark, qemu::Bitmap};
use lifeboat::id::PointId;
use serde_json::{Value, json};

/// Bytes that one bit of a mark stands for: one page.
pub(super) const GRANULARITY: u64 = lifeboat::page::PAGE as u64;

/// What is owed of a disk, and what must be done to its bitmaps so that they say just that.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Owed {
    /// Everything: nothing we have tells what changed. All our bitmaps go.
    Full { remove: Vec<String> },
    /// What is in `old` once `merge` were merged into it.
    Delta { old: String, merge: Vec<String>, remove: Vec<String> },
}

/// Judges the `bitmaps` of a disk that has `bytes` bytes now, for a point over the last of `over`; the marks of the others,
/// which are older, stay. Bitmaps that are not ours are left alone.
pub(super) fn owed(bitmaps: &[Bitmap], over: &[PointId], bytes: u64) -> Owed {
    let ours: Vec<(&Bitmap, Mark)> =
        bitmaps.iter().filter_map(|bitmap| Some((bitmap, Mark::parse(&bitmap.name)?))).collect();
    let sound = |bitmap: &Bitmap, mark: &Mark| {
        !bitmap.inconsistent && bitmap.granularity == GRANULARITY && mark.bytes == bytes
    };
    let full = || Owed::Full { remove: ours.iter().map(|(bitmap, _)| bitmap.name.clone()).collect() };
    let Some((basis, older)) = over.split_last() else { return full() };
    let Some((old, mark)) = ours.iter().find(|(_, mark)| mark.point == *basis) else { return full() };
    if !sound(old, mark) {
        return full();
    }
    let stays = |mark: &Mark| mark.point == *basis || older.contains(&mark.point);
    let others: Vec<_> = ours.iter().filter(|(_, mark)| !stays(mark)).collect();
    let names = || others.iter().map(|(bitmap, _)| bitmap.name.clone()).collect::<Vec<_>>();
    if old.recording {
        // It never stopped recording: it alone is the truth, whatever else is there is older or of a lost point.
        return Owed::Delta { old: old.name.clone(), merge: Vec::new(), remove: names() };
    }
    // Points were cut after it and lost: each mark took over in the instant in which the one before stopped. Of those in
    // between it can't be told which are older than the basis: what they hold too much costs bytes and nothing else.
    let recording = ours.iter().filter(|(bitmap, _)| bitmap.recording).count();
    let ends = others.iter().any(|(bitmap, _)| bitmap.recording);
    if recording == 1 && ends && others.iter().all(|(bitmap, mark)| sound(bitmap, mark)) {
        return Owed::Delta { old: old.name.clone(), merge: names(), remove: Vec::new() };
    }
    full()
}

impl Owed {
    pub fn old(&self) -> Option<&str> {
        match self {
            Self::Full { .. } => None,
            Self::Delta { old, .. } => Some(old),
        }
    }

    /// The actions, for a transaction, that leave nothing but what is owed.
    pub fn actions(&self, node: &str) -> Vec<Value> {
        match self {
            Self::Full { remove: names } => names.iter().map(|name| remove(node, name)).collect(),
            Self::Delta { old, merge, remove: names } => {
                let mut actions: Vec<_> = names.iter().map(|name| remove(node, name)).collect();
                actions.extend(take_back(node, old, merge));
                actions
            }
        }
    }
}

/// The marks of `bitmaps` that are neither of `points` nor foreign: older than the first of them, which is durable.
pub(super) fn outdated<'a>(bitmaps: &'a [Bitmap], points: &[PointId]) -> impl Iterator<Item = &'a str> {
    let older = |name: &str| Mark::parse(name).is_some_and(|mark| !points.contains(&mark.point));
    bitmaps.iter().map(|bitmap| bitmap.name.as_str()).filter(move |name| older(name))
}

pub(super) fn add(node: &str, name: &str) -> Value {
    let data = json!({ "node": node, "name": name, "granularity": GRANULARITY, "persistent": false });
    json!({ "type": "block-dirty-bitmap-add", "data": data })
}

pub(super) fn disable(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-disable", "data": { "node": node, "name": name } })
}

pub(super) fn remove(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": name } })
}

/// `old` records again and owes what those of `new` saw in the meantime.
pub(super) fn take_back(node: &str, old: &str, new: &[String]) -> Vec<Value> {
    if new.is_empty() {
        return Vec::new();
    }
    let mut actions = vec![
        json!({ "type": "block-dirty-bitmap-enable", "data": { "node": node, "name": old } }),
        json!({ "type": "block-dirty-bitmap-merge", "data": { "node": node, "target": old, "bitmaps": new } }),
    ];
    actions.extend(new.iter().map(|new| remove(node, new)));
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 1 << 20;
    fn point(no: u8) -> PointId {
        PointId::from_bytes([no; 16])
    }
    fn mark(no: u8, recording: bool) -> Bitmap {
        let name = Mark { point: point(no), bytes: BYTES }.name();
        Bitmap { name, recording, inconsistent: false, granularity: GRANULARITY }
    }
    fn name(no: u8) -> String {
        mark(no, true).name
    }

    #[test]
    fn a_delta_is_promised_only_where_every_write_since_the_basis_was_recorded() {
        let names = |numbers: &[u8]| numbers.iter().copied().map(name).collect::<Vec<_>>();
        let delta = |old: u8, merge: &[u8], remove: &[u8]| Owed::Delta {
            old: name(old),
            merge: names(merge),
            remove: names(remove),
        };
        let full = |remove: &[u8]| Owed::Full { remove: names(remove) };
        let foreign = Bitmap { name: "backup".into(), recording: true, ..Bitmap::default() };
        let broken = Bitmap { inconsistent: true, ..mark(1, true) };
        let coarse = Bitmap { granularity: 65536, ..mark(1, true) };
        let chain = || vec![mark(1, false), mark(2, false), mark(3, true)];
        let cases: [(_, &[u8], _); 19] = [
            (vec![], &[1], full(&[])),
            (vec![mark(1, true)], &[], full(&[1])),
            (vec![mark(1, true), foreign], &[1], delta(1, &[], &[])),
            (vec![mark(1, false), mark(2, true)], &[1], delta(1, &[2], &[])),
            (vec![mark(1, false), mark(2, true)], &[2], delta(2, &[], &[1])),
            (vec![mark(1, false), mark(2, true)], &[3], full(&[1, 2])),
            (vec![mark(1, false)], &[1], full(&[1])),
            (vec![mark(1, false), mark(2, false)], &[1], full(&[1, 2])),
            (vec![mark(1, false), mark(2, true), mark(3, true)], &[1], full(&[1, 2, 3])),
            (vec![broken.clone()], &[1], full(&[1])),
            (vec![coarse], &[1], full(&[1])),
            (vec![mark(2, false), broken.clone()], &[2], full(&[2, 1])),
            // Points under way: some of them lost, none, or all.
            (chain(), &[1], delta(1, &[2, 3], &[])),
            (chain(), &[2], delta(2, &[1, 3], &[])),
            (chain(), &[3], delta(3, &[], &[1, 2])),
            (chain(), &[1, 2], delta(2, &[3], &[])),
            (chain(), &[2, 3], delta(3, &[], &[1])),
            (chain(), &[1, 2, 3], delta(3, &[], &[])),
            (vec![broken, mark(2, false), mark(3, true)], &[2], full(&[1, 2, 3])),
        ];
        for (bitmaps, over, expected) in cases {
            let over: Vec<_> = over.iter().copied().map(point).collect();
            assert_eq!(owed(&bitmaps, &over, BYTES), expected, "{bitmaps:?} over {over:?}");
        }
        assert_eq!(owed(&[mark(1, true)], &[point(1)], BYTES + 1), full(&[1]), "a disk of another size");
    }
    #[test]
    fn what_is_older_than_the_newest_durable_point_is_told_from_what_is_not() {
        let foreign = Bitmap { name: "backup".into(), ..Bitmap::default() };
        let chain = [mark(1, false), mark(2, false), foreign, mark(3, true)];
        assert!(outdated(&chain, &[point(2), point(3)]).eq([name(1).as_str()]));
        assert!(outdated(&chain, &[point(3)]).eq([name(1).as_str(), name(2).as_str()]));
        assert_eq!(outdated(&chain, &[point(1), point(2), point(3)]).count(), 0);
    }
}
