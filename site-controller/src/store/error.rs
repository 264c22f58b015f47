//! What can go wrong between the store and its disk, and why a point is not taken in. A variant exists because somebody
//! must react differently to it.

use crate::store::paths::Shown;
use lifeboat::{format::frame::FrameError, id::PointId, units::Generation};
use std::error::Error;

pub type Cause = Box<dyn Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room. Nothing that was acknowledged is harmed; the store goes on as soon as there is room.
    #[error(
        "{}: no room: {why}. Free space on the store's file system or thin out old points; protection goes on by itself then",
        Shown(path)
    )]
    Full { path: String, why: String },
    #[error("{}: not in the store", Shown(path))]
    Missing { path: String },
    /// Somebody else created it: two controllers on one store, or a clock-less retry.
    #[error("{}: already there; make sure that only one controller uses this store", Shown(path))]
    Exists { path: String },
    /// The bytes are there but are not what was written.
    #[error("{}: damaged: {what}. Run `lifeboat verify` to see which points are affected", Shown(path))]
    Damaged { path: String, what: String },
    #[error("{}: {step} failed; check the store's file system and the kernel log", Shown(path))]
    Disk {
        path: String,
        step: &'static str,
        #[source]
        source: Cause,
    },
    #[error("the store at {path} is in use by another controller; stop that one first")]
    InUse { path: String },
}

impl StoreError {
    pub fn disk(path: &str, step: &'static str, source: impl Into<Cause>) -> Self {
        let source = source.into();
        if is_full(source.as_ref()) {
            return Self::Full { path: path.into(), why: format!("{step}: the file system is full") };
        }
        Self::Disk { path: path.into(), step, source }
    }

    pub fn damaged(path: &str, what: impl ToString) -> Self {
        Self::Damaged { path: path.into(), what: what.to_string() }
    }

    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// The same again, if it is that.
    pub fn full(&self) -> Option<Self> {
        match self {
            Self::Full { path, why } => Some(Self::Full { path: path.clone(), why: why.clone() }),
            Self::Missing { .. }
            | Self::Exists { .. }
            | Self::Damaged { .. }
            | Self::Disk { .. }
            | Self::InUse { .. } => None,
        }
    }

    /// What is wrong with an object, for whoever names the object and knows what to do.
    pub fn what(&self) -> String {
        match self {
            Self::Damaged { what, .. } => what.clone(),
            Self::Missing { .. } => "missing".into(),
            Self::Full { .. } | Self::Exists { .. } | Self::Disk { .. } | Self::InUse { .. } => self.chain(),
        }
    }

    /// The whole chain of causes on one line.
    pub fn chain(&self) -> String {
        lifeboat::error::chain(self)
    }
}

/// Whether "no space left" or "quota exceeded" lies anywhere in a chain of causes.
pub fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            let code = io.raw_os_error();
            let kind = io.kind();
            if code == Some(libc::ENOSPC)
                || code == Some(libc::EDQUOT)
                || matches!(kind, std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
                || io.get_ref().is_some_and(|inner| is_full(inner))
            {
                return true;
            }
        }
        cause = error.source();
    }
    false
}

/// Why a point is not taken in.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    #[error("fenced: generation {given} may no longer write this VM, its generation is {current}")]
    Fenced { given: Generation, current: Generation },
    #[error("generation {given} was never given out by this site, where the VM's generation is {current}")]
    Unknown { given: Generation, current: Generation },
    #[error("this point, or too many others of this VM ({open}), are still being received")]
    Busy { open: PointId },
    /// The agent must send a point over `latest`, or one that is complete in itself.
    #[error("{why}; send a point over the newest one, or every image in full")]
    Parent { latest: Option<PointId>, why: String },
    /// Still open: the missing frames can be sent, and the commit repeated.
    #[error("{missing} of {frames} frames have not arrived")]
    Incomplete { missing: u32, frames: u32 },
    #[error("refused: {0}")]
    Frame(#[from] FrameError),
    #[error("refused: {0}")]
    Invalid(String),
    #[error("this point is closed: {0}")]
    Closed(&'static str),
    #[error(transparent)]
    Store(#[from] StoreError),
}
