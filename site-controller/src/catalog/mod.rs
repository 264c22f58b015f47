//! Which VMs and points there are, and which of them an operator means.
//! Promises: what is ambiguous is refused with the choices; a damaged point is never handed out as if it were whole, and
//! an older one never in its place without saying so; nor a seed, unless it is named by its id. Called by the API, failover, drills. Calls the store.

mod index;
mod select;

pub use crate::store::{PointState, PointSummary};
pub use index::SledIndex;
pub use select::{Selector, select};

use crate::store::{Store, StoreError};
use lifeboat::{
    id::{PointId, VmId},
    units::{Generation, UnixMs},
};
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("no VM here is called or has the id `{given}`; there are: {known}")]
    NoVm { given: String, known: String },
    #[error("`{given}` means several VMs; name one by its id: {choices}")]
    ManyVms { given: String, choices: String },
    #[error("VM {vm} has no points")]
    NoPoints { vm: VmId },
    #[error("VM {vm} has no point `{given}`; `lifeboat points` lists them")]
    NoPoint { vm: VmId, given: String },
    #[error("VM {vm} has no point at or before {at}; the oldest one is of {oldest}")]
    TooEarly { vm: VmId, at: UnixMs, oldest: UnixMs },
    #[error("`{given}` means several points; write more of the id: {choices}")]
    ManyPoints { given: String, choices: String },
    #[error(
        "`{given}` is not a point: write `latest`, the beginning of a point's id, or a time as \
         `2025-01-31T12:00:00Z`, `12:00:00` (UTC) or `5m ago`"
    )]
    Unreadable { given: String },
    #[error(
        "the newest point, {point} of {at}, is a seed: disks that lay at this site, and not the VM as it ran since. Name \
         the point that you want; {instead}"
    )]
    NewestIsSeed { point: PointId, at: UnixMs, instead: String },
    #[error("point {point} can't be restored: {why}. {instead}")]
    Damaged { point: String, why: String, instead: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSummary {
    pub vm: VmId,
    /// As the newest point calls it.
    pub name: String,
    pub generation: Generation,
    pub points: u64,
    pub damaged_points: u64,
    pub stored_bytes: u64,
    pub latest: Option<PointSummary>,
}

/// Questions about a store.
#[derive(Clone, Debug)]
pub struct Catalog {
    store: Store,
}

impl Catalog {
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    pub async fn vms(&self) -> Result<Vec<VmSummary>, CatalogError> {
        let points = self.store.points(None).await?;
        let mut vms = Vec::new();
        for vm in self.store.vms() {
            let from = points.partition_point(|point| point.vm < vm);
            let own = &points[from..points.partition_point(|point| point.vm <= vm)];
            let latest = own.last().cloned();
            let name = latest.as_ref().map_or_else(|| vm.to_string(), |latest| latest.name.clone());
            let damaged = own.iter().filter(|point| point.state != PointState::Ok);
            vms.push(VmSummary {
                vm,
                name,
                generation: self.store.generation(vm).await,
                points: own.len() as u64,
                damaged_points: damaged.count() as u64,
                stored_bytes: own.iter().map(|point| point.stored_bytes).sum(),
                latest,
            });
        }
        Ok(vms)
    }

    /// The VM with this id or name.
    pub async fn find_vm(&self, given: &str) -> Result<VmSummary, CatalogError> {
        let vms = self.vms().await?;
        let list = |vms: &[VmSummary]| {
            let shown: Vec<_> = vms.iter().take(8).map(|vm| format!("{} ({})", vm.name, vm.vm)).collect();
            if shown.is_empty() { "none".into() } else { shown.join(", ") }
        };
        let id: Option<VmId> = given.parse().ok();
        let known = list(&vms);
        let mut found: Vec<_> = vms.into_iter().filter(|vm| Some(vm.vm) == id || vm.name == given).collect();
        match (found.pop(), found.is_empty()) {
            (Some(vm), true) => Ok(vm),
            (Some(vm), false) => {
                found.push(vm);
                Err(CatalogError::ManyVms { given: given.into(), choices: list(&found) })
            }
            (None, _) => Err(CatalogError::NoVm { given: given.into(), known }),
        }
    }

    /// The points of a VM, oldest first.
    pub async fn points(&self, vm: VmId) -> Result<Vec<PointSummary>, CatalogError> {
        Ok(self.store.points(Some(vm)).await?)
    }

    /// The point that an operator means by `latest`, the beginning of an id, or a time.
    pub async fn find(&self, vm: VmId, given: &str) -> Result<PointSummary, CatalogError> {
        let selector = Selector::parse(given, self.store.clock().now())?;
        select(vm, &self.points(vm).await?, &selector).cloned()
    }
}

#[cfg(test)]
mod tests;
