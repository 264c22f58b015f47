//! What protection asks of a guest: cut a point, hand over what changed, then settle or put back.
//! The one real implementation is `capture::guest` (QEMU through libvirt); the simulation has another, and both are
//! held to the same contract by tests. Called by `protect`.
//!
//! Contract, the agent's half of "a dirty bit is forgotten only when its point is durable":
//! * `begin` names what the site holds, and what was sent since and is still under way (`over`); nothing is assumed to be
//!   held there but that. The next `begin` may name any of these as the last one: what was sent after it is lost then, and
//!   everything that changed since it is owed.
//! * After `settle(point)`, changes before that point's cut are no longer owed. After `put_back` of a cut, or if none of
//!   these is called because the process died, everything that changed since the last of `over` is still owed, and
//!   everything that changed since any other of them.

use super::{meeting::Meeting, memory::choose::MemoryStatus};
use async_trait::async_trait;
use lifeboat::{
    format::manifest::{Image, PointMeta},
    id::PointId,
    page::PageGroup,
    wire::{message::Place, order::ConsistencyWish},
};
use serde::{Deserialize, Serialize};
use std::{path::Path, sync::Arc};

/// One guest that points can be cut of.
#[async_trait]
pub trait Source: Send {
    /// Starts a point as a delta over the last of `over`, or in full where there is none or where this source can't tell
    /// what changed since. The first of `over` is the newest point that the site holds, the others are under way.
    /// Looks at the guest afresh: it may have been reconfigured.
    async fn begin(&mut self, point: PointId, over: &[PointId]) -> Result<Box<dyn Cut>, CaptureError>;
    /// Whether the guest is off, and the last of `over` is of its disks and its XML as they stand. No cut is open.
    async fn rests(&mut self, _over: &[PointId]) -> Result<bool, CaptureError> {
        Ok(false)
    }
    /// A point that was sent is durable: what it carried is forgotten. No cut is open. If this fails or is left out, the
    /// next `begin` makes up for it.
    async fn settle(&mut self, point: PointId) -> Result<(), CaptureError>;
    /// Where the guest is; `None` while it comes, goes, or is otherwise in somebody's hands.
    async fn place(&mut self) -> Result<Option<Place>, CaptureError> {
        Ok(Some(Place::Here { migrated: false }))
    }
    /// How memory is captured and why so; known after the first `begin`.
    fn memory(&self) -> MemoryStatus;
    /// What points without memory are to be, from the next `begin` on.
    fn wish(&mut self, _: ConsistencyWish) {}
    /// What became of that wish; `None` where nothing is wished, or nothing was cut yet.
    fn consistency(&self) -> Option<Attained> {
        None
    }
    /// Takes away what an agent before this one left in the guest when it died, for the sake of others; what is owed is not
    /// forgotten. No cut is open. The next `begin` makes up for it if this fails.
    async fn clear(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }
    /// Leaves nothing behind in the guest: protection has ended. No cut is open.
    async fn leave(&mut self) -> Result<(), CaptureError>;
    /// Whether the guest runs, rather than stands or is off.
    async fn runs(&mut self) -> Result<bool, CaptureError>;
    /// Suspends the guest as its operator would. Should this process die or hang, it is let go on, unless `held` is there by
    /// then. Nothing happens to one that does not run.
    async fn stand(&mut self, held: &Path) -> Result<(), CaptureError>;
    /// The file that `stand` was told of is there: from here on nothing lets the guest go on but `go_on`. An error if it goes
    /// on already.
    async fn keep_standing(&mut self) -> Result<(), CaptureError>;
    /// Lets a guest go on that stands; nothing happens to one that runs.
    async fn go_on(&mut self) -> Result<(), CaptureError>;
    /// Shuts the guest off at once, and sees to it that it does not start by itself again.
    async fn shut_off(&mut self) -> Result<(), CaptureError>;
}

/// Whether points are as consistent as wished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attained {
    pub attained: bool,
    /// How, or why not.
    pub words: String,
}

/// One point being cut. Dropping it puts back what can be put back without waiting; call `put_back` to be sure.
#[async_trait]
pub trait Cut: Send {
    /// The guest is off: the point is of its disks as they stand.
    fn is_off(&self) -> bool {
        false
    }
    /// Memory and disks of the point, as `barrier` will describe them, or fail. `full` is said of an image where this
    /// source can't tell what changed since the basis: what is not handed over of it is zero.
    fn images(&self) -> Vec<Image>;
    /// Changed pages while the guest runs, before the cut; they may change again. `None` when it is time to cut.
    async fn before(&mut self) -> Result<Option<PageGroup>, CaptureError>;
    /// Freezes file systems where that is wished and can be done; `barrier` thaws them. Whatever comes of it, the cut goes on.
    async fn freeze(&mut self) {}
    /// What was written is on the disks: file systems are frozen and thawed at once, where that is wished and can be done.
    /// For a guest that is about to stand for long, and can't be thawed then.
    async fn flush(&mut self) {}
    /// The instant: pauses the guest, drains memory, saves devices, marks the disks, resumes; with a `meeting`, not before
    /// that is over. Returns what was cut.
    async fn barrier(&mut self, meeting: Option<Arc<Meeting>>) -> Result<PointMeta, CaptureError>;
    /// Changed pages as they were at the barrier. `None` when all have been handed over.
    async fn after(&mut self) -> Result<Option<PageGroup>, CaptureError>;
    /// Changed bytes handed over so far: (memory, disk). Complete once `after` returned `None`.
    fn changed(&self) -> (u64, u64);
    /// All of the point is on its way: the next one may be begun over it. Nothing is forgotten yet.
    async fn sent(self: Box<Self>) -> Result<(), CaptureError>;
    /// The point is lost: everything that it carried is owed again.
    async fn put_back(self: Box<Self>) -> Result<(), CaptureError>;
}

/// Why a point could not be cut, by what protection must do about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CaptureError {
    /// This guest, as it is configured, can't be protected; trying again won't help until it is changed.
    #[error("{0}")]
    Unsupported(String),
    /// The guest is not running (shut off, or gone); wait for it.
    #[error("{0}")]
    NotRunning(String),
    /// Somebody else is at work on the guest, or has what a cut needs; wait for them.
    #[error("yielding to {0}")]
    Busy(String),
    /// It did not work this time; the guest is unharmed and everything is still owed.
    #[error("{0}")]
    Failed(String),
}
