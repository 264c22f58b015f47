//! What a failover (or a verification) tells while it runs: one line of JSON each, shown by the CLI as steps and bars.

use super::report::{FailoverReport, GroupReport};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// One line of progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// A step begins.
    Step { step: String },
    /// The step has come so far.
    Bytes { step: String, done: u64, total: u64 },
    /// It is done: the last line of a failover that worked.
    Done { report: Box<FailoverReport> },
    /// The same of a group's.
    GroupDone { report: Box<GroupReport> },
    /// A drill is over; its record tells how it went.
    DrillDone { id: String },
}

/// Where progress goes. Telling it never waits: a slow or vanished watcher does not hold up a failover.
#[derive(Clone, Debug)]
pub struct Watcher {
    to: Option<mpsc::Sender<Progress>>,
    /// Whose steps these are, where there are several.
    of: String,
}

impl Watcher {
    pub fn new(to: mpsc::Sender<Progress>) -> Self {
        Self { to: Some(to), of: String::new() }
    }
    /// Nobody watches; steps are logged all the same.
    pub fn nobody() -> Self {
        Self { to: None, of: String::new() }
    }
    /// The same, for the steps of one member of a group.
    pub fn of(&self, name: &str) -> Self {
        Self { to: self.to.clone(), of: format!("{name}: ") }
    }
    pub fn step(&self, step: impl Into<String>) {
        let step = format!("{}{}", self.of, step.into());
        tracing::info!(%step, "failover");
        self.tell(Progress::Step { step });
    }
    pub fn bytes(&self, step: &str, done: u64, total: u64) {
        self.tell(Progress::Bytes { step: format!("{}{step}", self.of), done, total });
    }
    /// The last line; this one waits, for it is the answer.
    pub async fn finish(&self, last: Progress) {
        if let Some(to) = &self.to {
            let _ = to.send(last).await;
        }
    }

    fn tell(&self, progress: Progress) {
        if let Some(to) = &self.to {
            let _ = to.try_send(progress);
        }
    }
}
