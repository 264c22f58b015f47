//! What the site holds of a guest's memory, as a digest per page: what an engine compares with, and what one engine
//! hands to the next so that a change of engine does not send all of memory again.
//! Promises: tables are of exactly one point, the basis; asked for another, they are forgotten. Called by the engines
//! that compare digests, and by `choose`.

use super::group::PageDigest;
use lifeboat::{id::PointId, qemu::stream::RamBlock};
use std::collections::HashMap;

/// Digests of what the site holds, by block name, and of which point that is true.
pub struct Held {
    seed: u64,
    tables: HashMap<String, Vec<PageDigest>>,
    basis: Option<PointId>,
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
        Self { seed, tables: HashMap::new(), basis: None }
    }

    /// What digests are seeded with.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Forgets everything that is not of `basis`.
    pub fn keep_only(&mut self, basis: Option<PointId>) {
        if basis.is_none() || basis != self.basis {
            self.tables.clear();
            self.basis = None;
        }
    }

    /// What the site holds of `block`; `None` if that is not known, or was of another size.
    pub fn table(&self, block: &RamBlock) -> Option<&Vec<PageDigest>> {
        self.tables.get(&block.name).filter(|table| table.len() as u64 == block.pages())
    }

    /// The site holds `point` now, and these are its tables.
    pub fn replace(&mut self, point: PointId, tables: impl IntoIterator<Item = (String, Vec<PageDigest>)>) {
        self.tables = tables.into_iter().collect();
        self.basis = Some(point);
    }
}
