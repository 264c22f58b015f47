//! What a failover (or a verification) tells while it runs: one line of JSON each, shown by the CLI as steps and bars.

use super::{afterwards::Afterwards, group::GroupReport, journal::Record};
use lifeboat::{
    id::{PointId, VmId},
    units::{Seq, UnixMs},
};
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

/// What a failover did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FailoverReport {
    pub vm: VmId,
    pub name: String,
    pub kind: String,
    pub point: PointId,
    pub seq: Seq,
    pub cut_at: UnixMs,
    pub generation: u64,
    pub started_at: UnixMs,
    pub running_at: UnixMs,
    /// From the start of the first attempt to the replica running.
    pub rto_ms: u64,
    /// Age of the point when the failover started: at most so much is lost.
    pub rpo_ms: u64,
    /// Whether the replica was resumed with its memory, rather than booted.
    pub resumed: bool,
    /// The VM was off, and so is its replica: it is defined, with its disks, and was not started.
    #[serde(default)]
    pub left_off: bool,
    /// Nothing was done now: this failover had been completed before.
    pub already_done: bool,
    /// Where the site has several hosts, that at which it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Why it was booted although the point holds memory.
    #[serde(default)]
    pub cold_boot: Option<String>,
    /// What was said each time that the resume was refused; after the first it is tried once more.
    #[serde(default)]
    pub refused: Vec<String>,
    /// What was done for the resumed replica, and what was not.
    #[serde(default)]
    pub after_resume: Vec<Afterwards>,
    /// Which addresses it was given here, and which not.
    #[serde(default)]
    pub addresses: Vec<Afterwards>,
}

impl FailoverReport {
    pub fn of(record: &Record, already_done: bool) -> Self {
        let running_at = record.running_at.unwrap_or(record.started_at);
        Self {
            vm: record.vm,
            name: record.vm_name.clone(),
            kind: record.kind.clone(),
            point: record.point,
            seq: record.seq,
            cut_at: record.cut_at,
            generation: record.generation.0,
            started_at: record.started_at,
            running_at,
            rto_ms: running_at.0.saturating_sub(record.started_at.0),
            rpo_ms: record.started_at.0.saturating_sub(record.cut_at.0),
            resumed: record.resumes,
            left_off: record.leaves_off(),
            already_done,
            host: record.host.as_ref().map(|host| host.name.clone()),
            cold_boot: record.cold_boot.clone(),
            refused: record.refused.clone(),
            after_resume: record.after_resume.clone(),
            addresses: record.addresses.clone(),
        }
    }
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
