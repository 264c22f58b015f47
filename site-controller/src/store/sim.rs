//! A disk that can lose power at any durable step, fill up and rot, for tests and the simulation.
//!
//! Model: an object's bytes are written, synced, named, and its directory synced; each sync is one *step*. Power cut at
//! step n: that sync does not return and nothing works until [`SimDisk::reopen`]. What was synced stays. A name given but
//! not yet synced stays or not, by the seed; bytes not yet synced stay as a torn prefix, under no name. With
//! [`SimDisk::lie`] even named bytes may be torn, as on a disk that drops its cache. Its behaviour without faults is
//! pinned by the contract that the real implementation is held to.

use crate::store::{
    error::StoreError,
    objects::{ObjectInfo, Objects, Upload},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A handle of one process's life to a disk. Handles from before a `reopen` never work again.
#[derive(Clone, Debug)]
pub struct SimDisk {
    platter: Arc<Mutex<Platter>>,
    life: u64,
}

#[derive(Debug)]
struct Platter {
    rng: StdRng,
    life: u64,
    powered: bool,
    lies: bool,
    steps: u64,
    cut_at: Option<u64>,
    /// Syncs that fail although the power stays on.
    failing: Range<u64>,
    capacity: u64,
    reserve: u64,
    /// What a reader sees while the power is on.
    live: BTreeMap<String, Bytes>,
    /// What a reader would see after a power cut, but for the names in `unsynced`.
    durable: BTreeMap<String, Bytes>,
    /// Names created (`Some`) or removed (`None`) whose directory was being synced when the power went.
    unsynced: Vec<(String, Option<Bytes>)>,
    /// Bytes that belong to no name yet, by upload.
    partials: BTreeMap<u64, u64>,
    next_upload: u64,
}

impl SimDisk {
    pub fn new(seed: u64) -> Self {
        let platter = Platter {
            rng: StdRng::seed_from_u64(seed),
            life: 0,
            powered: true,
            lies: false,
            steps: 0,
            cut_at: None,
            failing: 0..0,
            capacity: u64::MAX,
            reserve: 0,
            live: BTreeMap::new(),
            durable: BTreeMap::new(),
            unsynced: Vec::new(),
            partials: BTreeMap::new(),
            next_upload: 0,
        };
        Self { platter: Arc::new(Mutex::new(platter)), life: 0 }
    }

    /// Power goes at the `step`-th sync from now, counted from 1.
    pub fn cut_at(&self, step: u64) {
        let mut platter = self.platter();
        platter.cut_at = Some(platter.steps + step);
    }

    /// The `step`-th sync from now, counted from 1, and the `count - 1` after it fail; then the disk is well again.
    /// Names given just before a failed sync are seen, but may not outlive the next power cut.
    pub fn fail_at(&self, step: u64, count: u64) {
        let mut platter = self.platter();
        let first = platter.steps + step;
        platter.failing = first..first + count;
    }

    /// From now on a power cut may tear what was synced but whose name was not.
    pub fn lie(&self) {
        self.platter().lies = true;
    }

    /// Syncs so far.
    pub fn steps(&self) -> u64 {
        self.platter().steps
    }

    pub fn is_powered(&self) -> bool {
        self.platter().powered
    }

    /// Bytes that fit, and how many of them uploads leave free.
    pub fn set_capacity(&self, capacity: u64, reserve: u64) {
        let mut platter = self.platter();
        (platter.capacity, platter.reserve) = (capacity, reserve);
    }

    pub fn used(&self) -> u64 {
        self.platter().used()
    }

    /// The power comes back (or goes and comes back): a disk for the next process.
    pub fn reopen(&self) -> Self {
        let mut platter = self.platter();
        for (path, bytes) in std::mem::take(&mut platter.unsynced) {
            if platter.rng.random() {
                match bytes {
                    Some(bytes) if platter.lies => {
                        let kept = platter.rng.random_range(0..=bytes.len());
                        platter.durable.insert(path, bytes.slice(..kept));
                    }
                    Some(bytes) => drop(platter.durable.insert(path, bytes)),
                    None => drop(platter.durable.remove(&path)),
                }
            }
        }
        let mut partials = std::mem::take(&mut platter.partials);
        partials.retain(|_, written| {
            *written = platter.rng.random_range(0..=*written);
            *written > 0
        });
        platter.partials = partials;
        platter.live = platter.durable.clone();
        platter.begin_life();
        Self { platter: self.platter.clone(), life: platter.life }
    }

    /// Only the process dies: a disk for the next one, on which everything is as it was seen last.
    pub fn restart(&self) -> Self {
        let mut platter = self.platter();
        platter.begin_life();
        Self { platter: self.platter.clone(), life: platter.life }
    }

    pub fn paths(&self) -> Vec<String> {
        self.platter().live.keys().cloned().collect()
    }

    /// Changes what is stored behind the store's back, or removes it with `None`.
    pub fn tamper(&self, path: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
        let mut platter = self.platter();
        let Some(bytes) = platter.live.get(path).cloned() else { return };
        match change(bytes.to_vec()) {
            Some(bytes) => {
                platter.live.insert(path.into(), bytes.clone().into());
                platter.durable.insert(path.into(), bytes.into());
            }
            None => {
                platter.live.remove(path);
                platter.durable.remove(path);
            }
        }
    }

    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.platter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on(&self, path: &str) -> Result<MutexGuard<'_, Platter>, StoreError> {
        let platter = self.platter();
        if platter.powered && platter.life == self.life { Ok(platter) } else { Err(no_power(path)) }
    }
}

impl Platter {
    fn begin_life(&mut self) {
        self.life += 1;
        self.powered = true;
        self.cut_at = None;
    }

    fn used(&self) -> u64 {
        let objects: u64 = self.live.values().map(|bytes| bytes.len() as u64).sum();
        objects + self.partials.values().sum::<u64>()
    }

    fn room(&self, path: &str, more: u64, reserve: u64) -> Result<(), StoreError> {
        if self.used().saturating_add(more).saturating_add(reserve) <= self.capacity {
            return Ok(());
        }
        Err(StoreError::Full { path: path.into(), why: "the simulated disk is full".into() })
    }

    /// One sync, which may be the one at which the power goes.
    fn sync(&mut self, path: &str) -> Result<(), StoreError> {
        self.steps += 1;
        if self.cut_at == Some(self.steps) {
            self.powered = false;
            return Err(no_power(path));
        }
        if self.failing.contains(&self.steps) {
            return Err(StoreError::disk(path, "syncing", io::Error::from_raw_os_error(libc::EIO)));
        }
        Ok(())
    }

    /// Names synced bytes, then syncs the directory.
    fn name(&mut self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.live.insert(path.into(), bytes.clone());
        if let Err(error) = self.sync(path) {
            self.unsynced.push((path.into(), Some(bytes)));
            return Err(error);
        }
        self.unsynced.retain(|(name, _)| name != path);
        self.durable.insert(path.into(), bytes);
        Ok(())
    }

    fn stage(&mut self, bytes: u64) -> u64 {
        self.next_upload += 1;
        self.partials.insert(self.next_upload, bytes);
        self.next_upload
    }
}

fn no_power(path: &str) -> StoreError {
    StoreError::disk(path, "reaching the disk", io::Error::other("the power is off"))
}

#[async_trait]
impl Objects for SimDisk {
    async fn put_durable(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        let mut platter = self.on(path)?;
        if platter.live.contains_key(path) {
            return Err(StoreError::Exists { path: path.into() });
        }
        platter.room(path, bytes.len() as u64, 0)?;
        let staged = platter.stage(bytes.len() as u64);
        let synced = platter.sync(path);
        if platter.powered {
            platter.partials.remove(&staged);
        }
        synced?;
        platter.name(path, bytes)
    }

    async fn create(&self, path: &str) -> Result<Box<dyn Upload>, StoreError> {
        let mut platter = self.on(path)?;
        platter.room(path, 0, platter.reserve)?;
        let id = platter.stage(0);
        Ok(Box::new(SimUpload { disk: self.clone(), path: path.into(), id, bytes: BytesMut::new() }))
    }

    async fn get(&self, path: &str, max: u64) -> Result<Bytes, StoreError> {
        let platter = self.on(path)?;
        let found = platter.live.get(path).ok_or_else(|| StoreError::Missing { path: path.into() })?;
        if found.len() as u64 > max {
            return Err(StoreError::damaged(path, format!("{} bytes, at most {max} expected", found.len())));
        }
        Ok(found.clone())
    }

    async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let platter = self.on(path)?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let found = platter.live.get(path).ok_or_else(|| StoreError::Missing { path: path.into() })?;
        if range.end > found.len() as u64 {
            return Err(StoreError::damaged(path, "it ends too early"));
        }
        Ok(found.slice(range.start as usize..range.end as usize))
    }

    async fn list(&self, directory: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let platter = self.on(directory)?;
        let below = |path: &&String| path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'));
        let found = platter.live.iter().filter(|(path, _)| below(path));
        Ok(found.map(|(path, bytes)| ObjectInfo { path: path.clone(), bytes: bytes.len() as u64 }).collect())
    }

    async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let mut platter = self.on(path)?;
        platter.live.remove(path);
        if let Err(error) = platter.sync(path) {
            platter.unsynced.push((path.into(), None));
            return Err(error);
        }
        platter.unsynced.retain(|(name, _)| name != path);
        platter.durable.remove(path);
        Ok(())
    }

    async fn sweep_partials(&self) -> Result<u64, StoreError> {
        let mut platter = self.on("")?;
        Ok(std::mem::take(&mut platter.partials).len() as u64)
    }

    async fn free_bytes(&self) -> Result<u64, StoreError> {
        let platter = self.on("")?;
        Ok(platter.capacity.saturating_sub(platter.used()))
    }

    async fn check_room(&self, path: &str) -> Result<(), StoreError> {
        let platter = self.on(path)?;
        platter.room(path, 0, platter.reserve)
    }
}

struct SimUpload {
    disk: SimDisk,
    path: String,
    id: u64,
    bytes: BytesMut,
}

#[async_trait]
impl Upload for SimUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        let mut platter = self.disk.on(&self.path)?;
        platter.room(&self.path, bytes.len() as u64, platter.reserve)?;
        *platter.partials.entry(self.id).or_default() += bytes.len() as u64;
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn finish_durable(mut self: Box<Self>) -> Result<(), StoreError> {
        let bytes = self.bytes.split().freeze();
        let mut platter = self.disk.on(&self.path)?;
        platter.sync(&self.path)?;
        platter.partials.remove(&self.id);
        platter.name(&self.path, bytes)
    }

    async fn abort(self: Box<Self>) {}
}

impl Drop for SimUpload {
    fn drop(&mut self) {
        if let Ok(mut platter) = self.disk.on(&self.path) {
            platter.partials.remove(&self.id);
        }
    }
}
