//! Marks: what our dirty bitmaps say about changes since the basis, and the actions that move them on. Pure.
//! Promises: a delta is promised only if every write since the basis is in the bitmaps that remain. Called by `disk`.

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
    /// What is in `old` once `merge` was merged into it.
    Delta { old: String, merge: Option<String>, remove: Vec<String> },
}

/// Judges the `bitmaps` of a disk that has `bytes` bytes now. Bitmaps that are not ours are left alone.
pub(super) fn owed(bitmaps: &[Bitmap], basis: Option<PointId>, bytes: u64) -> Owed {
    let ours: Vec<(&Bitmap, Mark)> =
        bitmaps.iter().filter_map(|bitmap| Some((bitmap, Mark::parse(&bitmap.name)?))).collect();
    let sound = |bitmap: &Bitmap, mark: &Mark| {
        !bitmap.inconsistent && bitmap.granularity == GRANULARITY && mark.bytes == bytes
    };
    let full = || Owed::Full { remove: ours.iter().map(|(bitmap, _)| bitmap.name.clone()).collect() };
    let is_basis = |mark: &Mark| Some(mark.point) == basis;
    let Some((old, mark)) = ours.iter().find(|(_, mark)| is_basis(mark)) else { return full() };
    if !sound(old, mark) {
        return full();
    }
    let others: Vec<_> = ours.iter().filter(|(_, mark)| !is_basis(mark)).collect();
    let names = || others.iter().map(|(bitmap, _)| bitmap.name.clone()).collect::<Vec<_>>();
    let old = old.name.clone();
    match (bitmaps.iter().any(|bitmap| bitmap.name == old && bitmap.recording), others.as_slice()) {
        // It never stopped recording: it alone is the truth, whatever else is there is older or of a lost point.
        (true, _) => Owed::Delta { old, merge: None, remove: names() },
        // Cut, but the point was lost: the later mark took over in the instant in which this one stopped.
        (false, [(later, mark)]) if later.recording && sound(later, mark) => {
            Owed::Delta { old, merge: Some(later.name.clone()), remove: Vec::new() }
        }
        (false, _) => full(),
    }
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
                if let Some(new) = merge {
                    actions.extend(take_back(node, old, new));
                }
                actions
            }
        }
    }
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

/// `old` records again and owes what `new` saw in the meantime.
pub(super) fn take_back(node: &str, old: &str, new: &str) -> [Value; 3] {
    [
        json!({ "type": "block-dirty-bitmap-enable", "data": { "node": node, "name": old } }),
        json!({ "type": "block-dirty-bitmap-merge", "data": { "node": node, "target": old, "bitmaps": [new] } }),
        remove(node, new),
    ]
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
        let delta = |old: u8, merge: Option<u8>, remove: &[u8]| Owed::Delta {
            old: name(old),
            merge: merge.map(name),
            remove: remove.iter().copied().map(name).collect(),
        };
        let full = |remove: &[u8]| Owed::Full { remove: remove.iter().copied().map(name).collect() };
        let foreign = Bitmap { name: "backup".into(), recording: true, ..Bitmap::default() };
        let broken = Bitmap { inconsistent: true, ..mark(1, true) };
        let coarse = Bitmap { granularity: 65536, ..mark(1, true) };
        let cases = [
            (vec![], Some(1), full(&[])),
            (vec![mark(1, true)], None, full(&[1])),
            (vec![mark(1, true), foreign], Some(1), delta(1, None, &[])),
            (vec![mark(1, false), mark(2, true)], Some(1), delta(1, Some(2), &[])),
            (vec![mark(1, false), mark(2, true)], Some(2), delta(2, None, &[1])),
            (vec![mark(1, false), mark(2, true)], Some(3), full(&[1, 2])),
            (vec![mark(1, false)], Some(1), full(&[1])),
            (vec![mark(1, false), mark(2, false)], Some(1), full(&[1, 2])),
            (vec![mark(1, false), mark(2, true), mark(3, true)], Some(1), full(&[1, 2, 3])),
            (vec![broken.clone()], Some(1), full(&[1])),
            (vec![coarse], Some(1), full(&[1])),
            (vec![mark(2, false), broken], Some(2), full(&[2, 1])),
        ];
        for (bitmaps, basis, expected) in cases {
            assert_eq!(owed(&bitmaps, basis.map(point), BYTES), expected, "{bitmaps:?} for {basis:?}");
        }
        assert_eq!(owed(&[mark(1, true)], Some(point(1)), BYTES + 1), full(&[1]), "a disk of another size");
    }
}
