//! Names for new packs, as a parameter, so that one seed decides them in the simulation.

use lifeboat::id::PackId;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use std::{
    fmt::Debug,
    sync::{Mutex, PoisonError},
};

pub trait PackIds: Send + Sync + Debug {
    fn next(&self) -> PackId;
}

/// Random version-4 UUIDs.
#[derive(Clone, Copy, Debug, Default)]
pub struct RandomIds;

impl PackIds for RandomIds {
    fn next(&self) -> PackId {
        PackId::from_bytes(uuid::Uuid::new_v4().into_bytes())
    }
}

/// The same ids for the same seed; each life of a store needs another one, because a pack's name must be new.
#[derive(Debug)]
pub struct SeededIds(Mutex<StdRng>);

impl SeededIds {
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new(StdRng::seed_from_u64(seed)))
    }
}

impl PackIds for SeededIds {
    fn next(&self) -> PackId {
        let mut bytes = [0; 16];
        self.0.lock().unwrap_or_else(PoisonError::into_inner).fill_bytes(&mut bytes);
        PackId::from_bytes(bytes)
    }
}
