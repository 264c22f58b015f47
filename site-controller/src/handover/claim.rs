//! What the site says at which the VM runs: that it was failed over to here, and to nowhere else since.

use super::{Claim, HandoverError, Handovers};
use crate::failover::journal::Phase;
use lifeboat::hypervisor::libvirt::HypervisorError;
use std::io;

impl Handovers {
    /// Refused unless the VM runs here, by a failover after which this site gave it to nobody.
    pub async fn claim(&self, given: &str) -> Result<Claim, HandoverError> {
        let runbook = &self.runbook;
        let found = runbook.catalog.find_vm(given).await?;
        let (vm, name) = (found.vm, found.name);
        let record = runbook.journal.load(vm)?.filter(|record| record.phase == Phase::Running);
        let record = record.ok_or_else(|| HandoverError::NotHere { name: name.clone() })?;
        let now = runbook.store.generation(vm).await;
        if now > record.generation {
            return Err(HandoverError::GivenAway { name, ours: record.generation, now });
        }
        let hypervisor = runbook.hypervisor.clone();
        let state = tokio::task::spawn_blocking(move || hypervisor.domain_by_uuid(vm)?.state()).await;
        let state = match state.map_err(|panic| HandoverError::Died(io::Error::other(panic)))? {
            Ok(state) if state.is_active() => None,
            Ok(state) => Some(state.to_string()),
            Err(HypervisorError::NotFound { .. }) => Some("gone".to_owned()),
            Err(error) => return Err(error.into()),
        };
        if let Some(state) = state {
            return Err(HandoverError::NotRunning { name, state });
        }
        let (site, generation, point) = (self.site.clone(), record.generation, record.point);
        Ok(Claim { site, vm, name, generation, point, running_at: record.running_at })
    }
}
