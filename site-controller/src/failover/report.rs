//! What a failover did, of one VM or of a group: the last line that its watcher is told, and what the API answers.

use super::{
    group::record::{GroupRecord, Kind},
    journal::Record,
    outcome::Afterwards,
};
use lifeboat::{
    id::{PointId, VmId},
    units::{Seq, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

/// What a group's failover did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GroupReport {
    pub group: String,
    pub kind: Kind,
    pub cut_at: Option<UnixMs>,
    pub started_at: UnixMs,
    pub running_at: Option<UnixMs>,
    pub rto_ms: u64,
    /// What is lost at most; a planned one loses nothing.
    pub rpo_ms: u64,
    pub members: Vec<FailoverReport>,
    pub warnings: Vec<String>,
    /// Sources that were not told yet that they are off for good. They stand, and are told when they are reached.
    pub sources_left: Vec<String>,
}

impl GroupReport {
    pub fn of(record: &GroupRecord, members: Vec<FailoverReport>, sources_left: Vec<String>) -> Self {
        let since = |at: UnixMs, before: UnixMs| at.0.saturating_sub(before.0);
        let lost = |cut_at| if record.kind == Kind::Planned { 0 } else { since(record.started_at, cut_at) };
        Self {
            group: record.group.spec.name.clone(),
            kind: record.kind,
            cut_at: record.cut_at,
            started_at: record.started_at,
            running_at: record.running_at,
            rto_ms: record.running_at.map_or(0, |at| since(at, record.started_at)),
            rpo_ms: record.cut_at.map_or(0, lost),
            members,
            warnings: record.warnings.clone(),
            sources_left,
        }
    }
}
