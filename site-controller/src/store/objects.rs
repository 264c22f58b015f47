//! What durability needs of a place to keep objects: one narrow trait, so that the simulation can own the disk.
//! Promises of every implementation (pinned by `contract`): what `put_durable`, `finish_durable` and `delete` returned
//! from survives a power cut; an object is seen whole or not at all; creating never replaces. Called by the whole room.

use crate::store::error::StoreError;
use async_trait::async_trait;
use bytes::Bytes;
use std::{fmt::Debug, ops::Range};

/// Bytes handed to an [`Upload`] at once; what one open pack holds in memory.
pub const PART: usize = 8 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    pub path: String,
    pub bytes: u64,
}

#[async_trait]
pub trait Objects: Send + Sync + Debug {
    /// Creates a small object. Returns once its bytes, its name and every directory above it are on stable storage;
    /// `Exists` (and nothing changed) where the name is taken. May use the reserve: it is what the reserve is for.
    async fn put_durable(&self, path: &str, bytes: Bytes) -> Result<(), StoreError>;
    /// Starts a large object, which nobody sees before `finish_durable`.
    async fn create(&self, path: &str) -> Result<Box<dyn Upload>, StoreError>;
    /// A whole object of at most `max` bytes; larger is `Damaged`, and not read.
    async fn get(&self, path: &str, max: u64) -> Result<Bytes, StoreError>;
    /// Exactly `range` of an object; `Damaged` where it ends before that.
    async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError>;
    /// Everything below a directory, sorted by path; nothing where there is no such directory.
    async fn list(&self, directory: &str) -> Result<Vec<ObjectInfo>, StoreError>;
    /// Returns once the object is gone for good. Fine where it was not there.
    async fn delete(&self, path: &str) -> Result<(), StoreError>;
    /// Removes what uploads of a dead process left behind; returns how many. Only before anything is written.
    async fn sweep_partials(&self) -> Result<u64, StoreError>;
    async fn free_bytes(&self) -> Result<u64, StoreError>;
    /// Refuses, as uploads do, where less than the reserve is free.
    async fn check_room(&self, path: &str) -> Result<(), StoreError>;
}

/// A large object on its way. Dropping it, like `abort`, leaves nothing that anybody sees.
#[async_trait]
pub trait Upload: Send {
    /// Appends. `Full` where that would eat into the reserve.
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError>;
    /// Returns once bytes, name and directories are on stable storage.
    async fn finish_durable(self: Box<Self>) -> Result<(), StoreError>;
    async fn abort(self: Box<Self>);
}
