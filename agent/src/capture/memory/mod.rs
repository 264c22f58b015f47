//! Capturing a guest's memory: engines behind one trait, so that a host gets the best one that works there.
//! Promises of every engine: pages handed over by `before` and staged by `drain` together turn the basis into the
//! memory of the instant of `drain`; whatever was sent can be taken back until `settle`. All calls block.
//! Called by `capture::guest`, by way of [`choose`], which picks the engine. Engines: [`soft_dirty`], [`snapshot`] and
//! [`stop_and_read`].

pub mod choose;
pub mod device_state;
mod group;
mod head;
mod held;
mod known;
mod layout;
mod lineage;
mod process_memory;
pub mod snapshot;
pub mod soft_dirty;
mod staging;
pub mod stop_and_read;

pub use held::Held;
pub use staging::Staging;

use crate::watchdog::WatchdogError;
use lifeboat::{
    hypervisor::{
        libvirt::QemuProcess,
        monitor::{Monitor, MonitorError},
    },
    id::PointId,
    page::PageGroup,
    qemu::stream::{RamBlock, StreamError},
};
use std::{io, sync::Arc};

/// Takes away what an agent left in a guest's QEMU that is no longer protected.
pub fn leave(monitor: &dyn Monitor) -> Result<(), MemoryError> {
    head::leave(monitor)?;
    device_state::remove_left_over(monitor)
}

/// One running guest, as far as an engine needs it.
#[derive(Clone)]
pub struct Target {
    pub monitor: Arc<dyn Monitor>,
    pub process: QemuProcess,
    /// The guest was reset, or may have been, since the engine last began.
    pub may_have_reset: bool,
}

/// Whether an engine can be used on a guest, for status and for choosing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitness {
    pub usable: bool,
    /// For people: why, or why not.
    pub why: String,
}

/// One image of a point: a RAM block, in stream order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamImage {
    pub block: RamBlock,
    /// Nothing is known of what the site holds of it.
    pub full: bool,
}

/// A way of capturing memory. A cut calls `begin`, `before` until `None`, `drain` with the guest stopped, `after`
/// until `None`, then `sent` or `put_back`; after `sent` the next one may begin, and `settle` follows some time.
pub trait MemoryEngine: Send {
    fn name(&self) -> &'static str;
    /// Looks at the running guest anew and starts a round against what the site holds of `basis`, or will hold: it is the
    /// newest point that was sent, or, if what was sent since is lost, an earlier one.
    fn begin(&mut self, target: &Target, basis: Option<PointId>) -> Result<Vec<RamImage>, MemoryError>;
    /// Pages while the guest runs; an image's number is its block's place.
    fn before(&mut self) -> Result<Option<PageGroup>, MemoryError>;
    /// Whether a short pause is wanted now, before more is asked of `before`, so that the pause of the cut is short.
    fn wants_early_pause(&self) -> bool {
        false
    }
    /// The guest is stopped, for this alone; afterwards `before` goes on.
    fn early_pause(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
    /// The guest is stopped: whatever differs from what was handed over goes into staging.
    fn drain(&mut self) -> Result<(), MemoryError>;
    /// The last thing in the pause, after devices were saved and disks marked. An engine that takes memory here lets the
    /// guest go by doing so, and says so by `true`; it must not where the guest may not run on (`may_resume`).
    fn finish(&mut self, _may_resume: bool) -> Result<bool, MemoryError> {
        Ok(false)
    }
    /// Staged pages; the guest runs again.
    fn after(&mut self) -> Result<Option<PageGroup>, MemoryError>;
    /// The stream configuration section of the guest's machine.
    fn machine_config(&self) -> Vec<u8>;
    /// Bytes of changed pages found so far in this round.
    fn changed_bytes(&self) -> u64;
    /// Everything was handed over and is on its way as `point`: it may be the next basis.
    fn sent(&mut self, point: PointId);
    /// The site holds `point` now: it, or a later one, is every next basis.
    fn settle(&mut self, point: PointId);
    /// What was handed over did not arrive: it is owed again.
    fn put_back(&mut self);
    /// Gives away its table of what the site holds, for the next engine to go on with. Engines without one give none.
    fn hand_over(&mut self) -> Held {
        Held::new()
    }
    /// Goes on with another engine's table; an engine that can't use it knows nothing then.
    fn take_over(&mut self, _held: Held) {}
}

/// Memory could not be captured. The guest is unharmed in every case.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Somebody else uses QEMU's one migration slot (a save, a migration): wait for them.
    #[error(
        "QEMU is busy with another migration or save ({status}); the memory layout is read once it is over"
    )]
    Busy { status: String },
    #[error("{step} failed: {source}")]
    Io { step: &'static str, source: io::Error },
    /// The memory layout changed while the point was being cut: cut again.
    #[error("the guest's memory layout changed while it was being cut ({what})")]
    Changed { what: String },
    /// QEMU's answers do not fit together; nothing may be assumed.
    #[error("the guest's memory can't be found in its QEMU process: {what}")]
    Layout { what: String },
    #[error("the saved device state can't be used: {what}")]
    DeviceState { what: String },
    /// The engine can't be used on this guest as things stand.
    #[error("{why}")]
    Unfit { why: String },
    /// QEMU did not bring a background snapshot to its end.
    #[error("QEMU's background snapshot did not succeed (it is `{status}`)")]
    Snapshot { status: String },
    #[error("QEMU's migration capabilities could not be put back as they were found: {0}")]
    Capabilities(WatchdogError),
    /// Our own order of calls was broken.
    #[error("a memory round was used out of order: {0}")]
    Order(&'static str),
}

impl MemoryError {
    /// Whether it speaks against the engine. What others do to the guest, or a monitor out of reach, does not.
    pub fn blames_engine(&self) -> bool {
        match self {
            Self::Busy { .. } | Self::Changed { .. } => false,
            Self::Monitor(error) => !matches!(error, MonitorError::Unreachable { .. }),
            Self::Stream(_) | Self::Io { .. } | Self::Layout { .. } => true,
            Self::DeviceState { .. } | Self::Order(_) | Self::Unfit { .. } => true,
            Self::Snapshot { .. } | Self::Capabilities(_) => true,
        }
    }

    pub(crate) fn io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { step, source }
    }
}
