//! What the site holds of a guest's memory, as a digest per page: what an engine compares with, and what one engine
//! hands to the next so that a change of engine does not send all of memory again.
//! Promises: tables are of exactly one point, the basis: the newest that was sent, though the site may not hold it yet.
//! Asked for an earlier one, down to the newest durable, what was sent since is undone; asked for any other, all is
//! forgotten. To undo a point takes 20 bytes for each page that it changed. Called by the engines that compare digests,
//! and by `choose`.

use super::{group::PageDigest, lineage::Lineage};
use lifeboat::{id::PointId, qemu::stream::RamBlock};
use std::collections::HashMap;

/// Digests of what the site holds, by block name, and of which point that is true.
pub struct Held {
    seed: u64,
    tables: HashMap<String, Vec<PageDigest>>,
    /// How the tables lead back from the basis to the points before it: by block name; a block that is not named was not
    /// known before.
    sent: Lineage<HashMap<String, Undo>>,
}

/// Pages that a point changed, and what their digests were.
#[derive(Debug, Default)]
struct Undo {
    pages: Vec<u32>,
    digests: Vec<PageDigest>,
}

impl Default for Held {
    fn default() -> Self {
        Self::new()
    }
}

impl Held {
    /// Knows nothing yet.
    pub fn new() -> Self {
        let seed = uuid::Uuid::new_v4().as_u64_pair().0;
        Self { seed, tables: HashMap::new(), sent: Lineage::default() }
    }

    /// What digests are seeded with.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Goes back to `basis`, or forgets everything if that is not known.
    pub fn keep_only(&mut self, basis: Option<PointId>) {
        let Some(undone) = self.sent.back_to(basis) else {
            self.tables.clear();
            return;
        };
        for mut point in undone {
            self.tables.retain(|name, table| {
                let undo = point.remove(name);
                undo.is_some_and(|undo| undo.apply(table))
            });
        }
    }

    /// What the site holds of `block`; `None` if that is not known, or was of another size.
    pub fn table(&self, block: &RamBlock) -> Option<&Vec<PageDigest>> {
        self.tables.get(&block.name).filter(|table| table.len() as u64 == block.pages())
    }

    /// `point` was sent, made over the basis, and is the basis now: these are its tables.
    pub fn replace(&mut self, point: PointId, tables: impl IntoIterator<Item = (String, Vec<PageDigest>)>) {
        let before = std::mem::replace(&mut self.tables, tables.into_iter().collect());
        let undo = |(name, old): (String, Vec<PageDigest>)| {
            let undo = Undo::between(&old, self.tables.get(&name)?)?;
            Some((name, undo))
        };
        let undo = before.into_iter().filter_map(undo).collect();
        self.sent.advance(point, undo);
    }

    /// The site holds `point`: nothing before it is ever the basis again.
    pub fn durable(&mut self, point: PointId) {
        self.sent.durable(point);
    }
}

impl Undo {
    /// `None` if the tables can't be compared.
    fn between(old: &[PageDigest], new: &[PageDigest]) -> Option<Self> {
        if old.len() != new.len() || u32::try_from(old.len()).is_err() {
            return None;
        }
        let mut undo = Self::default();
        for (page, (old, new)) in old.iter().zip(new).enumerate() {
            if old != new {
                undo.pages.push(page as u32);
                undo.digests.push(*old);
            }
        }
        Some(undo)
    }

    fn apply(self, table: &mut [PageDigest]) -> bool {
        for (page, digest) in self.pages.into_iter().zip(self.digests) {
            match table.get_mut(page as usize) {
                Some(slot) => *slot = digest,
                None => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn point(no: usize) -> PointId {
        PointId::from_bytes([no as u8 + 1; 16])
    }

    proptest! {
        /// Whatever points changed, going back to one of them gives just the tables that it had.
        #[test]
        fn going_back_gives_the_tables_of_that_point(
            points in prop::collection::vec(prop::collection::vec((0usize..40, 0u128..4), 0..30), 1..6),
            durable in 0usize..6, back in 0usize..6, resized in prop::option::of(1usize..6),
        ) {
            let block = |pages: usize| RamBlock { name: "pc.ram".into(), bytes: (pages * 4096) as u64 };
            let (mut held, mut made, mut table) = (Held::new(), Vec::new(), vec![0; 40]);
            for (no, changes) in points.iter().enumerate() {
                held.keep_only(no.checked_sub(1).map(point));
                table.resize(if resized.is_some_and(|at| at <= no) { 41 } else { 40 }, 0);
                changes.iter().for_each(|(page, digest)| table[*page] = *digest);
                held.replace(point(no), [("pc.ram".to_owned(), table.clone())]);
                made.push(table.clone());
                if no == durable {
                    held.durable(point(no));
                }
            }
            held.keep_only(Some(point(back)));
            let newest = points.len() - 1;
            let known = back <= newest && (durable > newest || back >= durable);
            let across = resized.is_some_and(|at| back < at && at <= newest);
            let found = held.table(&block(made.get(back).map_or(40, Vec::len)));
            prop_assert_eq!(found, made.get(back).filter(|_| known && !across));
        }
    }
}
