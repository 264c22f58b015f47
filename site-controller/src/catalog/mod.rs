//! Which VMs and points there are, and which of them an operator means.
//! Promises: what is ambiguous is refused with the choices; a damaged point is never handed out as if it were whole, and
//! an older one never in its place without saying so; nor a seed, unless it is named by its id. Called by the API, failover,
//! drills. Calls the store.

mod index;
mod select;

pub use crate::store::{PointState, PointSummary};
pub use index::SledIndex;
pub use select::{Selector, select};

use crate::store::{Ask, Store, StoreError};
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
            vms.push(self.summary(vm, own).await);
        }
        Ok(vms)
    }

    async fn summary(&self, vm: VmId, own: &[PointSummary]) -> VmSummary {
        let latest = own.last().cloned();
        let damaged = own.iter().filter(|point| point.state != PointState::Ok);
        VmSummary {
            vm,
            name: name_of(vm, latest.as_ref()),
            generation: self.store.generation(vm).await,
            points: own.len() as u64,
            damaged_points: damaged.count() as u64,
            stored_bytes: own.iter().map(|point| point.stored_bytes).sum(),
            latest,
        }
    }

    /// The VM with this id or name. Of each VM the newest point is looked at.
    pub async fn which(&self, given: &str) -> Result<VmId, CatalogError> {
        let id: Option<VmId> = given.parse().ok();
        let mut known = Vec::new();
        for vm in self.store.vms() {
            known.push((vm, name_of(vm, self.store.find(vm, Ask::Newest).await?.as_ref())));
        }
        let list = |vms: &[&(VmId, String)]| {
            let shown: Vec<_> = vms.iter().take(8).map(|(vm, name)| format!("{name} ({vm})")).collect();
            if shown.is_empty() { "none".into() } else { shown.join(", ") }
        };
        let found: Vec<_> = known.iter().filter(|(vm, name)| Some(*vm) == id || name == given).collect();
        match found.as_slice() {
            [(vm, _)] => Ok(*vm),
            [] => {
                let known = list(&known.iter().collect::<Vec<_>>());
                Err(CatalogError::NoVm { given: given.into(), known })
            }
            several => Err(CatalogError::ManyVms { given: given.into(), choices: list(several) }),
        }
    }

    /// The VM with this id or name, and what its points come to.
    pub async fn find_vm(&self, given: &str) -> Result<VmSummary, CatalogError> {
        let vm = self.which(given).await?;
        Ok(self.summary(vm, &self.points(vm).await?).await)
    }

    /// The points of a VM, oldest first.
    pub async fn points(&self, vm: VmId) -> Result<Vec<PointSummary>, CatalogError> {
        Ok(self.store.points(Some(vm)).await?)
    }

    /// The point that an operator means by `latest`, the beginning of an id, or a time.
    pub async fn find(&self, vm: VmId, given: &str) -> Result<PointSummary, CatalogError> {
        let selector = Selector::parse(given, self.store.clock().now())?;
        select(&self.store, vm, &selector).await
    }
}

/// As its newest point calls it.
fn name_of(vm: VmId, latest: Option<&PointSummary>) -> String {
    latest.map_or_else(|| vm.to_string(), |latest| latest.name.clone())
}

#[cfg(test)]
mod tests;
