//! Bytes that outlive a process: frames, packs and manifests, each with its version and its checks.
//! Promises: pure (no I/O); decoding is bounded and never panics; docs/on-disk-format.md shows the tables.

pub mod fold;
pub mod frame;
pub mod header;
pub mod manifest;
pub mod owner;
pub mod pack;
pub mod pruned;
pub mod record;
pub mod refs;
pub mod words;
