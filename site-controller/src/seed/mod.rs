//! Seeds: disks that are at this site already, taken into the store as a point, so that an agent that begins with a full
//! point sends what differs from them and nothing else. After a failover these are the disks that the VM left here; for a
//! first point, a shipped copy.
//! [`disks`] says which files, [`image`] opens one (QEMU reads it, whatever its format), [`import`] compares it with what
//! the store holds and stores the difference. Promises: files are only read; the VM does not run here, and no agent
//! writes its history meanwhile; a seed that was interrupted leaves nothing, and is begun anew; memory is bounded by a few
//! regions of 1 MiB. A seed is marked as such, and nobody fails over to one unasked. Called by `api` and `handover`.

pub mod disks;
mod image;
mod import;
mod locks;
pub mod request;
#[cfg(test)]
mod tests;

use crate::{
    failover::{
        hosts::{HostError, Hosts},
        journal::Journal,
    },
    intake::slot::Slots,
    restore::RestoreError,
    store::{PointError, Store, StoreError},
};
use disks::DiskFile;
use lifeboat::{
    format::manifest::ManifestError,
    hypervisor::libvirt::DomainState,
    id::{PointId, VmId},
    nbd::NbdError,
    units::Seq,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf, sync::Arc};

#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("the VM is {state} at this site; a seed is of disks that nobody writes to. Shut it off first")]
    Active { state: DomainState },
    #[error("{0}")]
    Disks(String),
    #[error("disk {target}, {path}: {why}", path = path.display())]
    Image { target: String, path: PathBuf, why: String },
    #[error("disk {target}, {path}: reading it failed", path = path.display())]
    Nbd {
        target: String,
        path: PathBuf,
        #[source]
        source: NbdError,
    },
    #[error("{0}")]
    Held(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Point(#[from] PointError),
    #[error("reading what the store holds of it: {0}")]
    Restore(#[from] RestoreError),
    #[error("packing what was read: {0}")]
    Packing(String),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("a task of the seed died: {0}")]
    Died(#[source] io::Error),
}

/// What is to be taken in.
#[derive(Clone, Debug)]
pub struct Order {
    pub vm: VmId,
    pub name: String,
    pub disks: Vec<DiskFile>,
    /// The domain's definition, where there is one: a seed that somebody fails over to needs it.
    pub definition: Option<String>,
}

/// How far a seed has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SeedProgress {
    pub disk: String,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SeedReport {
    pub vm: VmId,
    pub name: String,
    pub point: PointId,
    pub seq: Seq,
    /// The point that the disks were compared with; without one they were taken whole.
    pub over: Option<PointId>,
    pub disks: Vec<SeededDisk>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SeededDisk {
    pub target: String,
    pub path: PathBuf,
    pub bytes: u64,
    /// What differed from the point before.
    pub changed_bytes: u64,
}

/// Where VMs are at this site.
#[derive(Clone)]
pub struct Here {
    pub hosts: Arc<Hosts>,
    pub journal: Journal,
    /// What all hosts share.
    pub replica_dir: PathBuf,
}

/// Takes seeds into the store of this site.
#[derive(Clone)]
pub struct Seeder {
    pub store: Store,
    pub here: Option<Here>,
    /// For sockets of the processes that read images.
    pub run_dir: PathBuf,
    /// For nameless files.
    pub scratch_dir: PathBuf,
}

impl Seeder {
    /// Takes the disks in as the newest point of the VM.
    pub async fn seed(
        &self,
        slots: &Slots,
        order: &Order,
        tell: impl FnMut(SeedProgress) + Send,
    ) -> Result<SeedReport, SeedError> {
        let held = slots.reserve(order.vm, "its disks at this site are being read as a seed").await;
        let _held = held.map_err(SeedError::Held)?;
        self.seed_reserved(order, tell).await
    }

    /// The same, for whoever has reserved the VM.
    pub async fn seed_reserved(
        &self,
        order: &Order,
        tell: impl FnMut(SeedProgress) + Send,
    ) -> Result<SeedReport, SeedError> {
        self.check_off(order.vm).await?;
        import::run(self, order, tell).await
    }

    /// Refuses a VM that runs here.
    pub async fn check_off(&self, vm: VmId) -> Result<(), SeedError> {
        let Some(here) = &self.here else { return Ok(()) };
        let record = here.journal.load(vm).map_err(HostError::from)?;
        match here.hosts.whereabouts(vm, record.as_ref()).await? {
            (_, Some(state)) if state.is_active() => Err(SeedError::Active { state }),
            _ => Ok(()),
        }
    }
}
