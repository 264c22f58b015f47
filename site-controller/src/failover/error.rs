//! Why a failover did not come to its end, in words for an operator: what is wrong, and what to do. Used by whatever does a
//! part of one.

use super::{
    hosts::HostError, images::ImageError, journal::JournalError, preflight::PreflightError,
    replica_xml::XmlError, stonith::StonithError,
};
use crate::{catalog::CatalogError, restore::RestoreError, store::StoreError};
use lifeboat::{
    hypervisor::libvirt::{DomainState, HypervisorError},
    id::PointId,
    units::UnixMs,
};
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum FailoverError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Xml(#[from] XmlError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Stonith(#[from] StonithError),
    #[error(transparent)]
    Host(HostError),
    #[error("no host of this site can take {name} now, and nothing was stopped. {why}")]
    NoHost { name: String, why: String },
    #[error(
        "it does not see the folder of the replicas{why}: `replica_dir` must be on storage that all hosts have mounted at the \
         same path"
    )]
    NotShared { why: String },
    #[error("a failover of this VM is under way; wait for it")]
    Busy,
    #[error(
        "a failover of this VM to point {begun} has come as far as starting the replica, whose disks may have changed \
         since; run it again with `--point {begun}` (or without --point) to finish it"
    )]
    AnotherPoint { begun: PointId },
    #[error(
        "this VM has been failed over to point {point}; its replica may have worked since. \
         `lifeboat undo` takes it to another point, and sets what the replica did aside"
    )]
    RunsFromAnother { point: PointId },
    #[error(
        "this VM was failed over to point {point} and its replica is {state} now; start it with `virsh start`, or undefine \
         it and move {journal} away to fail over afresh"
    )]
    DoneBefore { point: PointId, state: String, journal: String },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the replica did not stay up: it is {state} right after its start; see libvirt's log of it")]
    DidNotRun { state: String },
    #[error("the replica {grief} right after its resume; see libvirt's log of it")]
    WentWrong { grief: &'static str },
    #[error("the resume was refused {times} times, and no boot was to follow; the last time: {why}")]
    StillRefused { times: usize, why: String },
    #[error("{0}")]
    Wait(String),
    #[error("point {point} can't be restored, and nothing was changed: {why}")]
    PointDamaged { point: PointId, why: String },
    #[error(
        "the failover to point {begun} is not completed: `lifeboat failover --emergency` completes it; with `--point OTHER` it \
         takes another, as long as no replica was started"
    )]
    Unfinished { begun: PointId },
    #[error("a failover can be taken to another point until its window is over; this one's was at {until}")]
    TooLate { until: UnixMs },
    #[error("no failover of this VM is begun")]
    NotBegun,
    #[error("a task of the failover died: {0}")]
    Died(String),
}

impl From<HostError> for FailoverError {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Hypervisor(error) => Self::Hypervisor(error),
            HostError::Journal(error) => Self::Journal(error),
            HostError::Died(why) => Self::Died(why),
            error => Self::Host(error),
        }
    }
}

/// What an error calls the state of a replica.
pub(super) fn name_of(state: Option<DomainState>) -> String {
    state.map_or_else(|| "gone".to_owned(), |state| format!("{state:?}").to_lowercase())
}
