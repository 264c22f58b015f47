//! The journal stays bounded: points that no rule wants are taken away, and old layers are folded, so that whatever is
//! kept is put together from a bounded number of layers.
//!
//! [`plan`] decides (pure): which point goes, which layer is folded over which. [`keeper`] carries it out beside ingest
//! and restores, at its own pace. What stays is `store::retain`'s business; how it is done without harm, `store::fold`'s
//! and `store::prune`'s. Promises: the newest point, one that is read and one that a failover names are never taken away;
//! one pass takes away a bounded number. Called by the daemon, and by `api` for operators.

pub mod keeper;
pub mod plan;

#[cfg(test)]
mod tests;
