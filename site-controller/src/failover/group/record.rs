//! What a group's failover has done so far, on disk: `group-<id>.json` beside the journals of its members.
//! Promises: a phase is entered, synced, before what must not be done twice; what a controller does that finds a record
//! after a crash follows from the record alone. Called by `group` only.

use crate::{
    failover::journal::{Journal, JournalError},
    group::Group,
};
use lifeboat::{
    durable,
    id::{CutId, GroupId, PointId, VmId},
    units::{Generation, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{fs, io, path::PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "GroupFailoverKind")]
pub enum Kind {
    /// The sources stand, nothing is lost.
    Planned,
    /// The sources are given up.
    Emergency,
}

/// How far it has come. Each phase says what *has been done*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Decided. Of a planned one: from here on sources may stand at the site's word.
    Begun,
    /// The points are named, and durable; of a planned one, the sources stand.
    Named,
    /// Disks and memory of all members are here (planned only).
    Restored,
    /// The VMs are this site's. Until here a planned failover is called off by whatever goes wrong; from here on it goes
    /// on, unless it is certain that no replica runs.
    Committed,
    /// All replicas run.
    Running,
    /// The sources are off for good, as their agents say.
    Done,
    /// It is called off: nothing starts here any more, and the sources go on.
    Returning,
    /// The sources go on, as their agents say.
    CalledOff,
}

/// One member's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub vm: VmId,
    pub name: String,
    /// Named from [`Phase::Named`] on.
    pub point: Option<PointId>,
    /// The source's generation from its resume on, where it was called off.
    pub back: Option<Generation>,
    /// The agent has said that its hold is over.
    pub hold_ended: bool,
}

/// How an earlier failover of the group, or what an undo has replaced, ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Earlier {
    pub kind: Kind,
    pub undone: bool,
    pub cut_at: Option<UnixMs>,
    pub started_at: UnixMs,
    /// `None`: it was called off, or not completed.
    pub running_at: Option<UnixMs>,
    pub warnings: Vec<String>,
    pub last_error: Option<String>,
}

/// One failover of one group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    pub version: u32,
    pub kind: Kind,
    /// The group as it was then; later changes of it do not count.
    pub group: Group,
    /// Of a planned one: chosen before any source is asked to stand.
    pub cut: Option<CutId>,
    pub cut_at: Option<UnixMs>,
    /// Of an emergency: the point was asked for as the newest, not by name.
    #[serde(default)]
    pub newest: bool,
    pub phase: Phase,
    pub parts: Vec<Part>,
    /// Scripts before the first start that were run.
    pub before_done: bool,
    pub after_done: bool,
    /// Replicas that ran are to be taken to the point that is named: seconds for which they are kept aside.
    #[serde(default)]
    pub rewinds: Option<u64>,
    /// It is an undo: the replicas ran before, and what did is aside.
    #[serde(default)]
    pub undone: bool,
    /// The sources are known to be off: the site's `fence_command` is not run.
    #[serde(default)]
    pub skip_fence_command: bool,
    pub started_at: UnixMs,
    pub running_at: Option<UnixMs>,
    /// What did not go as it should, and was gone over.
    pub warnings: Vec<String>,
    /// Why it was called off, or does not go on.
    pub last_error: Option<String>,
    /// Oldest first.
    #[serde(default)]
    pub earlier: Vec<Earlier>,
}

impl GroupRecord {
    pub const VERSION: u32 = 1;

    pub fn new(kind: Kind, group: Group, now: UnixMs) -> Self {
        let parts = group.members.iter().map(|member| Part {
            vm: member.vm,
            name: member.name.clone(),
            point: None,
            back: None,
            hold_ended: false,
        });
        Self {
            version: Self::VERSION,
            kind,
            cut: None,
            cut_at: None,
            newest: false,
            phase: Phase::Begun,
            parts: parts.collect(),
            before_done: false,
            after_done: false,
            rewinds: None,
            undone: false,
            skip_fence_command: false,
            started_at: now,
            running_at: None,
            warnings: Vec::new(),
            last_error: None,
            earlier: Vec::new(),
            group,
        }
    }

    /// Of something that is gone over; once.
    pub fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// A new one, which remembers the one before it.
    pub fn after(before: Option<&Self>, kind: Kind, group: Group, now: UnixMs) -> Self {
        Self { earlier: before.map(Self::history).unwrap_or_default(), ..Self::new(kind, group, now) }
    }

    /// What is remembered of it, and of those before it, by the next one.
    pub fn history(&self) -> Vec<Earlier> {
        let own = Earlier {
            kind: self.kind,
            undone: self.undone,
            cut_at: self.cut_at,
            started_at: self.started_at,
            running_at: self.running_at,
            warnings: self.warnings.clone(),
            last_error: self.last_error.clone(),
        };
        let mut all: Vec<_> = self.earlier.iter().cloned().chain([own]).collect();
        all.drain(..all.len().saturating_sub(EARLIER_MAX));
        all
    }

    /// Nothing is left to be done.
    pub fn is_over(&self) -> bool {
        let source_held = self.cut.is_some() && !self.parts.iter().all(|part| part.hold_ended);
        matches!(self.phase, Phase::CalledOff | Phase::Done) && !source_held
    }
}

/// More are not remembered.
const EARLIER_MAX: usize = 100;

impl Journal {
    pub fn load_group(&self, id: GroupId) -> Result<Option<GroupRecord>, JournalError> {
        let path = self.group_path(id);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JournalError::Disk { path, source }),
        };
        match serde_json::from_str::<GroupRecord>(&text) {
            Ok(record) if record.version == GroupRecord::VERSION => Ok(Some(record)),
            Ok(record) => Err(JournalError::Malformed { path, why: format!("version {}", record.version) }),
            Err(error) => Err(JournalError::Malformed { path, why: error.to_string() }),
        }
    }

    /// Returns once it would survive a power cut.
    pub fn save_group(&self, record: &GroupRecord) -> Result<(), JournalError> {
        let path = self.group_path(record.group.id);
        let bytes = serde_json::to_vec_pretty(record).map_err(io::Error::from);
        bytes
            .and_then(|bytes| durable::replace(&path, &bytes, 0o600))
            .map_err(|source| JournalError::Disk { path, source })
    }

    pub fn remove_group(&self, id: GroupId) -> Result<(), JournalError> {
        let path = self.group_path(id);
        durable::remove(&path).map_err(|source| JournalError::Disk { path, source })
    }

    /// Group failovers that are not over.
    pub fn unfinished_groups(&self) -> Result<Vec<GroupRecord>, JournalError> {
        let failed = |source| JournalError::Disk { path: self.dir().clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(self.dir()).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            let id = name.strip_prefix("group-").and_then(|name| name.strip_suffix(".json")?.parse().ok());
            let record = id.map(|id| self.load_group(id)).transpose()?.flatten();
            found.extend(record.filter(|record| !record.is_over()));
        }
        Ok(found)
    }

    fn group_path(&self, id: GroupId) -> PathBuf {
        self.dir().join(format!("group-{id}.json"))
    }
}
