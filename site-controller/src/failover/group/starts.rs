//! Starting the members of a group in the order of its runbook, and waiting until each is up.
//! Promises: a member starts only after those it waits for; one that can't be started holds back only those. A wait that
//! runs out is a warning, and the next ones start: on the worst day a service that answers late is better than none.

use super::{GroupError, Groups, record::GroupRecord, world::Replicas};
use crate::{
    failover::{progress::Watcher, runbook::FailoverError},
    group::spec::WaitFor,
};
use lifeboat::id::VmId;
use std::{collections::BTreeSet, time::Duration};

const LOOK: Duration = Duration::from_millis(250);

impl Groups {
    /// Starts all; the inner error says which do not run, and why.
    pub(super) async fn start_all(
        &self,
        record: &mut GroupRecord,
        watcher: &Watcher,
    ) -> Result<Result<(), Vec<String>>, GroupError> {
        let spec = record.group.spec.clone();
        let rows = spec.starts().map_err(|error| GroupError::Script(error.to_string()))?;
        let (mut failed, mut held) = (Vec::new(), BTreeSet::new());
        for name in rows.iter().flatten() {
            let Some(part) = record.parts.iter().find(|part| part.name == *name).cloned() else { continue };
            let after = spec.runbook.vm.get(name).map(|steps| steps.after.clone()).unwrap_or_default();
            if let Some(before) = after.iter().find(|before| held.contains(*before)) {
                failed.push(format!("{name}: waits for {before}"));
                held.insert(name.clone());
                continue;
            }
            let watcher = watcher.of(name);
            match self.replicas.start(part.vm, &watcher).await {
                Ok(_) => self.wait(record, &part, &watcher).await,
                Err(error) => {
                    failed.push(format!("{name}: {error}"));
                    held.insert(name.clone());
                    // Where nobody knows whether it runs, nothing else is done that can't be taken back.
                    if !matches!(self.replicas.is_active(part.vm).await, Ok(false)) {
                        return Ok(Err(failed));
                    }
                }
            }
        }
        Ok(if failed.is_empty() { Ok(()) } else { Err(failed) })
    }

    async fn wait(&self, record: &mut GroupRecord, part: &super::record::Part, watcher: &Watcher) {
        let Ok((waits, at_most)) = record.group.spec.waits(&part.name) else { return };
        for wait in waits {
            watcher.step(format!("waiting: {wait:?}"));
            if let Err(why) = wait_for(&*self.replicas, part.vm, &wait, at_most).await {
                self.warn(record, watcher, format!("{}: {why}", part.name));
            }
        }
    }
}

/// Returns once what is waited for is there; or else why not.
pub async fn wait_for(
    replicas: &dyn Replicas,
    replica: VmId,
    wait: &WaitFor,
    at_most: Duration,
) -> Result<(), String> {
    let up = async {
        if let WaitFor::Delay(span) = wait {
            tokio::time::sleep(*span).await;
            return Ok(());
        }
        while !replicas.is_up(replica, wait).await? {
            tokio::time::sleep(LOOK).await;
        }
        Ok::<(), FailoverError>(())
    };
    match tokio::time::timeout(at_most, up).await {
        Ok(done) => done.map_err(|error| format!("{wait:?}: {error}")),
        Err(_) => Err(format!("{wait:?} did not come within {} s", at_most.as_secs())),
    }
}
