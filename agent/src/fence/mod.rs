//! Fencing at the source: a copy of a VM that runs elsewhere since a failover is kept from running here. [`decide`] says
//! what is to be done, [`keeper`] sees what there is and does it; [`book`] remembers it, [`lease`] is what the [`hook`]
//! of libvirt's goes by, [`guard`] is a process that pauses what no lease lets run, [`diverged`] keeps what only this
//! copy knows, [`orders`] are an operator's.

pub mod book;
pub mod decide;
pub mod diverged;
pub mod guard;
pub mod hook;
pub mod keeper;
mod label;
pub mod lease;
pub mod orders;
mod words;

use crate::capture::source::CaptureError;
use lifeboat::{hypervisor::libvirt::HypervisorError, id::VmId};
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("taking away what an agent left in its QEMU: {0}")]
    Clearing(#[from] CaptureError),
    #[error("{what}: {source}")]
    File { what: &'static str, source: io::Error },
    #[error("the guest was still not paused after {0} s; it is tried again")]
    NotPaused(u64),
    #[error(
        "{} has {free_mib} MiB free, and putting the guest's memory there may take {needed_mib}: it stays paused in memory, \
         which does not survive a reboot",
        dir.display()
    )]
    NoRoom { dir: PathBuf, free_mib: u64, needed_mib: u64 },
    #[error("no VM `{0}` is protected or fenced here")]
    Unknown(String),
    #[error("{0} is not held for a planned failover")]
    NotHeld(String),
    #[error("this host keeps no diverged state of {0}")]
    NothingKept(VmId),
    #[error("{0} is fenced: say first that this copy may run, with `lifeboat-agent allow`")]
    StillFenced(VmId),
    #[error("a guard of this host runs already")]
    GuardRuns,
    #[error("{0} is fenced and its copy here runs; pause it first: discarding it would end it")]
    Runs(VmId),
}
