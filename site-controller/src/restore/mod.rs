//! From a recovery point back to its images.
//!
//! [`plan`] decides which pages of which packs make up each image (pure but for reading indices), [`read`] streams
//! them, verified, [`disk`] writes them to files, and [`fingerprints`] makes them comparable with a running guest. Promises I-6: every frame is hashed again before a byte of it is
//! handed out. Called by failover, drills, verify. Calls the store.

pub mod disk;
mod error;
pub mod fingerprints;
pub mod plan;
pub mod read;

pub use error::RestoreError;
pub use plan::{ImagePlan, Plan};
pub use read::{Progress, Reader, Run};

#[cfg(test)]
mod tests;
