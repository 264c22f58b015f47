//! Whether a failover would work, asked before it is needed: of each group, and of each VM that is in none.
//! Promises: *ready* is said only where every check that a failover makes itself has just passed; what stands in its way
//! is named with what to do. Asking changes nothing. [`judge`] looks, also at what `drills` showed and `hosts` have,
//! [`watch`] does so by itself and says what has changed. Called by `api`.

mod drills;
mod hosts;
pub mod judge;
mod rules;
pub mod watch;

use lifeboat::units::UnixMs;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// In a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// A failover now works, and loses no more than the RPO.
    Ready,
    /// A failover now works; something is not as it should be.
    Degraded,
    NotReady,
}

/// Codes of findings that somebody has brought about.
const FAILED_OVER: &str = "failed-over";
const UNDER_WAY: &str = "failover-under-way";

/// What one finding means for a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// Worth knowing.
    Note,
    Degrades,
    Blocks,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ReadinessFinding")]
pub struct Finding {
    pub weight: Weight,
    /// Stable, for programs: `network-missing`.
    pub code: String,
    /// The VM that it is about; `None`: all, or the site.
    pub vm: Option<String>,
    /// What is so, and what to do, in a sentence.
    pub what: String,
}

/// Of one group, or one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Readiness {
    pub name: String,
    pub is_group: bool,
    pub verdict: Verdict,
    /// Heaviest first.
    pub findings: Vec<Finding>,
    /// Age of the newest point, milliseconds.
    pub rpo_ms: Option<u64>,
    /// Memory and disk that the replicas take.
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub checked_at: UnixMs,
}

impl Readiness {
    /// Puts findings in order, and draws the conclusion.
    fn concluded(mut self) -> Self {
        self.findings.sort_by(|a, b| (b.weight, &a.vm, &a.code).cmp(&(a.weight, &b.vm, &b.code)));
        self.verdict = match self.findings.first().map(|finding| finding.weight) {
            Some(Weight::Blocks) => Verdict::NotReady,
            Some(Weight::Degrades) => Verdict::Degraded,
            _ => Verdict::Ready,
        };
        self
    }
}

impl Finding {
    fn new(weight: Weight, code: &str, vm: Option<&str>, what: impl Into<String>) -> Self {
        Self { weight, code: code.into(), vm: vm.map(Into::into), what: what.into() }
    }
}
