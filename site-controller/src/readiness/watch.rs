//! Looks by itself each minute, and says what has changed; whoever shows a group or a VM takes the last verdict from here.
//! Promises: a question of an operator's is answered by a fresh look. Started by the daemon; asked by `api`.

use super::{FAILED_OVER, Readiness, UNDER_WAY, Verdict, judge::Judge};
use crate::catalog::CatalogError;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

const EVERY: Duration = Duration::from_secs(60);

pub struct Watch {
    judge: Judge,
    last: Mutex<BTreeMap<String, Readiness>>,
}

impl Watch {
    pub fn new(judge: Judge) -> Self {
        Self { judge, last: Mutex::default() }
    }

    /// Until told to stop.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            if let Err(error) = self.all().await {
                tracing::warn!(%error, "whether failovers would work could not be looked at");
            }
        }
    }

    pub async fn all(&self) -> Result<Vec<Readiness>, CatalogError> {
        let found = self.judge.all().await?;
        let names = found.iter().map(|readiness| readiness.name.clone()).collect::<Vec<_>>();
        self.last.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| names.contains(name));
        found.iter().for_each(|readiness| self.note(readiness));
        Ok(found)
    }

    pub async fn one(&self, name: &str) -> Result<Readiness, CatalogError> {
        let found = self.judge.one(name).await?;
        self.note(&found);
        Ok(found)
    }

    /// What was found last, if anybody has looked yet.
    pub fn last(&self, name: &str) -> Option<Verdict> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.get(name).map(|readiness| readiness.verdict)
    }

    fn note(&self, now: &Readiness) {
        let found = |code: &str| now.findings.iter().any(|finding| finding.code == code);
        // It will be another in a moment.
        if found(UNDER_WAY) {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.insert(now.name.clone(), now.clone()).map(|before| before.verdict);
        drop(last);
        if before == Some(now.verdict) {
            return;
        }
        let why = now.findings.first().map(|finding| finding.what.as_str()).unwrap_or_default();
        match now.verdict {
            Verdict::Ready => tracing::info!(name = %now.name, "a failover would work"),
            Verdict::Degraded => tracing::warn!(name = %now.name, %why, "a failover would work, but"),
            Verdict::NotReady if found(FAILED_OVER) => {
                tracing::info!(name = %now.name, %why, "it is failed over")
            }
            Verdict::NotReady => tracing::error!(name = %now.name, %why, "a failover would NOT work"),
        }
    }
}
