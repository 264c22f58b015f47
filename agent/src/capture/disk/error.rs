//! What can go wrong with marks and views, by what the caller must do about it.

use lifeboat::nbd::NbdError;
use lifeboat::{hypervisor::monitor::MonitorError, units::ByteSize};
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// This disk can't be tracked as it is configured.
    #[error("disk {target} can't be tracked: {why}")]
    Untracked { target: String, why: String },
    /// QEMU's only NBD server is in use by somebody else, for example a backup. Try again later.
    #[error(
        "QEMU's NBD server is in use by somebody else (a backup?); the disks are read when it is free again"
    )]
    Busy,
    /// The disk is no longer what was marked: a snapshot, a block copy or a hot-unplug came in between.
    #[error(
        "disk {target} was reconfigured while the point was being cut ({what}); the next point looks at it afresh"
    )]
    Reconfigured { target: String, what: &'static str },
    #[error("the guest runs although the views of its disks are only consistent if it stands still")]
    NotStopped,
    /// The point-in-time view would take space that others need. The point is lost, the guest unharmed.
    #[error(
        "only {free} are left where {dir} is; a view of the disks may not take more: make room, or point `scratch` elsewhere"
    )]
    ScratchFull { dir: PathBuf, free: ByteSize },
    #[error("{step} in {dir} failed; is it a writable directory of a local file system?")]
    Scratch {
        step: &'static str,
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Reading a view failed, because its old data could no longer be kept or because the disk itself can't be read.
    #[error("disk {target} could not be read from its point-in-time view")]
    View {
        target: String,
        #[source]
        source: NbdError,
    },
    #[error("QEMU still uses {what} after {after_s} s; it is taken away before the next point")]
    Stuck { what: String, after_s: u64 },
    /// Our own mistake in the order of calls.
    #[error("the disks were asked to {asked} at the wrong step")]
    OutOfOrder { asked: &'static str },
    /// The work on QEMU's monitor was torn down with the process.
    #[error("the work on QEMU's monitor did not end")]
    Interrupted,
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

impl DiskError {
    /// Whether trying again won't help until the guest is configured differently.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Untracked { .. } => true,
            Self::Busy
            | Self::Reconfigured { .. }
            | Self::NotStopped
            | Self::ScratchFull { .. }
            | Self::Scratch { .. }
            | Self::View { .. }
            | Self::Stuck { .. }
            | Self::OutOfOrder { .. }
            | Self::Interrupted
            | Self::Monitor(_) => false,
        }
    }
}
