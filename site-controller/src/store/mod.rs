//! The site's store: where recovery points come to rest, and the only room that decides when one is durable.
//!
//! Truth is packs and manifests (`lifeboat::format`), kept as objects. Promises: I-2, a point is acknowledged after its
//! packs, then its manifest, are on stable storage, names and directories included; I-4, every write carries a
//! generation, checked at admission and again under the VM's lock when its manifest is written; nothing is deleted that a
//! manifest, readable or not, may need: what was folded or pruned goes once nobody reads it. Memory: per open point one part of
//! 8 MiB, one frame for each stream that appends, an index of at most 8 MiB (+ 1 frame's) and 4 bytes for each frame received.
//! Called by intake, catalog, restore, verify, retention and failover. Calls `lifeboat::format`, `object_store` (in
//! `local` only).

mod chain;
mod commit;
mod error;
mod finding;
mod fold;
mod ids;
mod index;
mod layer;
mod leads;
mod leftovers;
mod listing;
mod local;
mod objects;
mod order;
mod owner;
mod pack;
pub mod paths;
mod pin;
mod pins;
mod prune;
mod reopen;
pub mod retain;
#[cfg(any(test, feature = "fault-injection"))]
pub mod sim;
mod site;
mod slot;
mod summary;
mod tree;
mod walk;

pub use chain::{ChainWalk, ImageKey, Verdict};
pub use commit::{Appended, Committed, OpenPoint};
pub use error::{PointError, StoreError};
pub use finding::{Finding, PointRef, ReopenReport};
pub use fold::{FoldError, FoldWriter, Folded};
pub use ids::{PackIds, RandomIds, SeededIds};
pub use index::{MemoryIndex, SummaryIndex};
pub use layer::{Folds, Layer, list_folds, read_layer, read_manifest};
pub use listing::{Listing, list as list_objects};
pub use local::LocalObjects;
pub use objects::{ObjectInfo, Objects, Upload};
pub use order::{Ask, Order};
pub use pack::{read_index, read_index_at};
pub use pin::Pin;
pub use prune::{Journal, JournalPoint, Pruned};

pub use site::{Store, StoreOptions, read_generation};
pub use slot::Head;
pub use summary::{PointState, PointSummary};
pub use walk::read_pruned;

#[cfg(test)]
mod contract;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
