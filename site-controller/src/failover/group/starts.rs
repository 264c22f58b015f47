//! Starting the members of a group in the order of its runbook, and waiting until each is up.
//! Promises: a member starts only after those it waits for, and beside those it does not; one that can't be started holds
//! back only those that wait for it. A wait that runs out is a warning, and the next ones start: on the worst day a service
//! that answers late is better than none. Where the runbook says so, one that went on with its memory is booted first, and
//! waited for once more.

use super::{
    GroupError, Groups,
    record::{GroupRecord, Part},
    world::Replicas,
};
use crate::{
    failover::{error::FailoverError, journal::Placed, progress::Watcher},
    group::spec::WaitFor,
};
use futures_util::{StreamExt, stream};
use lifeboat::id::VmId;
use std::{collections::BTreeSet, time::Duration};

const LOOK: Duration = Duration::from_millis(250);
/// Members that are started side by side: each is a QEMU that reads its memory.
const SIDE_BY_SIDE: usize = 4;

/// What came of the start of one.
struct Started {
    name: String,
    /// Of waits that ran out.
    warnings: Vec<String>,
    error: Option<String>,
    /// Nobody knows whether it runs.
    unknown: bool,
}

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
        for row in rows {
            let mut starts = Vec::new();
            for name in row {
                let Some(part) = record.parts.iter().find(|part| part.name == name).cloned() else {
                    continue;
                };
                let after = spec.runbook.vm.get(&name).map(|steps| steps.after.clone()).unwrap_or_default();
                if let Some(before) = after.iter().find(|before| held.contains(*before)) {
                    failed.push(format!("{name}: waits for {before}"));
                    held.insert(name);
                    continue;
                }
                starts.push(self.start_one(record, part, watcher.of(&name)));
            }
            let started: Vec<_> = stream::iter(starts).buffer_unordered(SIDE_BY_SIDE).collect().await;
            let unknown = started.iter().any(|start| start.unknown);
            for Started { name, warnings, error, .. } in started {
                warnings.into_iter().for_each(|warning| record.warn(warning));
                if let Some(error) = error {
                    failed.push(format!("{name}: {error}"));
                    held.insert(name);
                }
            }
            // Nothing else is done that can't be taken back.
            if unknown {
                break;
            }
        }
        Ok(if failed.is_empty() { Ok(()) } else { Err(failed) })
    }

    async fn start_one(&self, record: &GroupRecord, part: Part, watcher: Watcher) -> Started {
        let mut started =
            Started { name: part.name.clone(), warnings: Vec::new(), error: None, unknown: false };
        match self.bring_up(record, &part, &watcher).await {
            Ok(warnings) => {
                started.warnings = warnings.iter().map(|what| format!("{}: {what}", part.name)).collect();
            }
            Err(error) => {
                started.error = Some(error.to_string());
                started.unknown = !matches!(self.replicas.is_active(part.vm).await, Ok(false));
            }
        }
        started
    }

    /// Returns what there is to warn of.
    async fn bring_up(
        &self,
        record: &GroupRecord,
        part: &Part,
        watcher: &Watcher,
    ) -> Result<Vec<String>, FailoverError> {
        let mut report = self.replicas.start(part.vm, watcher).await?;
        // It is off, as its VM was: nobody can wait for it.
        if report.left_off {
            return Ok(Vec::new());
        }
        let spec = &record.group.spec;
        let (waits, at_most) = spec.waits(&part.name).unwrap_or_default();
        let mut missed = self.miss(part.vm, &waits, at_most, watcher).await;
        let boots = spec.runbook.vm.get(&part.name).is_some_and(|steps| steps.boot_if_not_up);
        let late: Vec<&str> =
            missed.iter().filter(|missed| missed.ran_out).map(|missed| missed.why.as_str()).collect();
        if boots && report.resumed && !late.is_empty() {
            let why = format!("it went on and was not up: {}", late.join("; "));
            report = self.replicas.boot_instead(part.vm, &why, watcher).await?;
            if !report.resumed {
                missed = self.miss(part.vm, &waits, at_most, watcher).await;
            }
        }
        let left = report.addresses.iter().filter(|step| !step.done).map(ToString::to_string);
        Ok(left.chain(missed.into_iter().map(|missed| missed.why)).collect())
    }

    /// Waits for all; returns what did not come.
    async fn miss(&self, vm: VmId, waits: &[WaitFor], at_most: Duration, watcher: &Watcher) -> Vec<Missed> {
        let mut all = Vec::new();
        for wait in waits {
            watcher.step(format!("waiting for {wait}"));
            if let Err(missed) = wait_for(&*self.replicas, (vm, None), wait, at_most).await {
                watcher.step(format!("WARNING: {}", missed.why));
                all.push(missed);
            }
        }
        all
    }
}

/// What was waited for, and did not come.
#[derive(Debug)]
pub struct Missed {
    pub why: String,
    /// The time did; otherwise it could not be looked for.
    ran_out: bool,
}

/// Returns once what is waited for is there; or else why not. Of a trial, with its host.
pub async fn wait_for(
    replicas: &dyn Replicas,
    (replica, at): (VmId, Option<&Placed>),
    wait: &WaitFor,
    at_most: Duration,
) -> Result<(), Missed> {
    let up = async {
        if let WaitFor::Delay(span) = wait {
            tokio::time::sleep(*span).await;
            return Ok(());
        }
        while !replicas.is_up(replica, at, wait).await? {
            tokio::time::sleep(LOOK).await;
        }
        Ok::<(), FailoverError>(())
    };
    match tokio::time::timeout(at_most, up).await {
        Ok(done) => done.map_err(|error| Missed { why: format!("{wait}: {error}"), ran_out: false }),
        Err(_) => {
            let why = format!("{wait} did not come within {} s", at_most.as_secs());
            Err(Missed { why, ran_out: true })
        }
    }
}
