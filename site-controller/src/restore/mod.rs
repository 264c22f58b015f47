//! From a recovery point back to its images.
//!
//! [`plan`] decides which pages of which packs make up each image (pure but for reading indices and references; `planned`
//! is what it is made of), [`read`] streams them, verified, [`disk`] writes them to files, [`merge`] lays layers together for
//! folding, and [`fingerprints`] makes images comparable with a running guest. Promises I-6: every frame is hashed again
//! before a byte of it is handed out, and a page that was put together is compared with its checks. Called by failover,
//! retention, intake, drills, verify. Calls the store.

pub mod chains;
mod descent;
pub mod disk;
mod error;
pub mod fingerprints;
mod layered;
mod made;
pub mod merge;
pub mod plan;
mod planned;
pub mod read;
mod sources;

pub use error::RestoreError;
pub use plan::{ImagePlan, Plan};
pub use read::{Progress, Reader, Run};

#[cfg(test)]
pub(crate) mod tests;
