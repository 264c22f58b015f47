//! Drills that begin by themselves, as their groups want it.
//! Promises: one that could not begin is tried again a minute later; one that failed is tried again when it is due. Called
//! by `daemon`.

use super::run::{Driller, Request};
use crate::{
    failover::{progress::Watcher, runbook::LATEST},
    group::Group,
};
use lifeboat::{calendar::Zone, error::chain, id::GroupId, units::UnixMs};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::watch;

const LOOK: Duration = Duration::from_secs(5);
const TRY_AGAIN_MS: u64 = 60_000;

impl Driller {
    /// Until the daemon stops. First of all, what a controller before left is removed.
    pub async fn keep_schedule(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut tried = BTreeMap::<GroupId, UnixMs>::new();
        loop {
            self.sweep().await;
            for group in self.coordinator.book.list() {
                let now = self.runbook.clock.now();
                let lately = tried.get(&group.id).is_some_and(|at| now.0.saturating_sub(at.0) < TRY_AGAIN_MS);
                if group.paused || lately || !self.is_due(&group, now) {
                    continue;
                }
                tried.insert(group.id, now);
                let request = Request {
                    name: group.id.to_string(),
                    point: LATEST.into(),
                    keep: false,
                    scheduled: true,
                };
                match self.run(&request, &Watcher::nobody()).await {
                    Ok(record) if record.passed => {
                        tracing::info!(group = group.spec.name, drill = record.id, "a drill passed");
                    }
                    Ok(record) => {
                        let errors = record.errors.join("; ");
                        tracing::warn!(
                            group = group.spec.name,
                            drill = record.id,
                            errors,
                            "a drill did not pass"
                        );
                    }
                    Err(error) => {
                        tracing::warn!(
                            group = group.spec.name,
                            error = chain(&error),
                            "a drill could not begin"
                        );
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    fn is_due(&self, group: &Group, now: UnixMs) -> bool {
        let Ok(Some(every)) = group.spec.drill.every() else { return false };
        let last = self.book.last_of(group.id).map_or(group.created_at, |record| record.started_at);
        every.is_due(last, now, &Zone::local())
    }
}
