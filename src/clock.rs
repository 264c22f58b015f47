//! Time as a parameter. Promises: nothing else in the product asks the system what time it is when an answer could
//! change what is stored or decided, so that the simulation can own time.

use crate::units::UnixMs;
use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// Wall-clock time. Monotonic waits go through `tokio::time`, which a test can pause and turn by hand.
pub trait Clock: Send + Sync + Debug {
    fn now(&self) -> UnixMs;
}

/// The machine's own clock.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixMs {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// A clock that moves only when told to; for tests and the simulation.
#[derive(Debug, Default, Clone)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    pub fn at(now: UnixMs) -> Self {
        Self(Arc::new(AtomicU64::new(now.0)))
    }
    pub fn advance(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> UnixMs {
        UnixMs(self.0.load(Ordering::SeqCst))
    }
}
