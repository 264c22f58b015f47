//! What the site says at which the VM runs: that it was failed over to here, and to nowhere else since.

use super::{Claim, HandoverError, Handovers};
use crate::failover::journal::Phase;

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
        let state = match runbook.hosts.whereabouts(vm, Some(&record)).await?.1 {
            Some(state) if state.is_active() => None,
            Some(state) => Some(state.to_string()),
            None => Some("gone".to_owned()),
        };
        if let Some(state) = state {
            return Err(HandoverError::NotRunning { name, state });
        }
        let (site, generation, point) = (self.site.clone(), record.generation, record.point);
        Ok(Claim { site, vm, name, generation, point, running_at: record.running_at })
    }
}
