//! What is remembered of drills: one folder each, with `drill.json`, which is its journal while it runs and its report
//! afterwards, and the evidence beside it. Promises: a record is synced when `save` returns. Called by the room only, and
//! read by `api`.

use crate::{
    failover::{journal::Placed, outcome::Afterwards, replica_xml::Isolated},
    group::{addresses::AddressRules, spec::NetworkHere},
};
use lifeboat::{
    durable,
    id::{GroupId, PointId, VmId},
    units::{Seq, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrillState {
    Running,
    /// Its replicas still run, as was asked for.
    Kept,
    Done,
    /// Its controller ended in the middle.
    Interrupted,
}

/// The network that its replicas are on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TrialNetwork {
    pub name: String,
    /// Made by the drill, and removed with it.
    pub ours: bool,
    /// There is none: the cables of all cards are out.
    pub missing: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrillMember {
    pub vm: VmId,
    pub name: String,
    pub point: PointId,
    pub seq: Seq,
    pub cut_at: UnixMs,
    /// What the replica for trial is called.
    pub as_vm: VmId,
    pub as_name: String,
    /// Where the site has several hosts, that at which the replica runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Placed>,
    /// It goes on with its memory, rather than boots.
    pub resumes: bool,
    /// The VM was off: its disks are restored, and nothing is started.
    #[serde(default)]
    pub left_off: bool,
    /// Since the drill began: its images were complete, it ran, it was up as the runbook says.
    pub restored_ms: Option<u64>,
    pub running_ms: Option<u64>,
    pub up_ms: Option<u64>,
    pub after_resume: Vec<Afterwards>,
    /// What the runbook says of its addresses, and what was done of it.
    #[serde(default)]
    pub address_rules: AddressRules,
    #[serde(default)]
    pub addresses: Vec<Afterwards>,
    /// Files beside the record.
    pub console: Option<String>,
    pub screen: Option<String>,
}

/// A command that was to say whether all is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    pub command: Vec<String>,
    /// Why not.
    pub failed: Option<String>,
}

/// One drill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrillRecord {
    pub version: u32,
    pub id: String,
    /// The group's name, or the VM's.
    pub name: String,
    pub group: GroupId,
    /// It began by itself.
    pub scheduled: bool,
    pub state: DrillState,
    /// All ran, and was as the runbook wants it.
    pub passed: bool,
    /// What it is, or was last, about.
    pub step: String,
    pub members: Vec<DrillMember>,
    pub network: Option<TrialNetwork>,
    /// Where disks and memory of the replicas lie.
    pub dir: PathBuf,
    pub cut_at: UnixMs,
    pub started_at: UnixMs,
    pub up_at: Option<UnixMs>,
    pub ended_at: Option<UnixMs>,
    /// Age of the point when it began.
    pub rpo_ms: u64,
    /// From its beginning until all were up.
    pub rto_ms: Option<u64>,
    pub checks: Vec<Check>,
    /// What was not tried, or done otherwise.
    pub notes: Vec<String>,
    pub errors: Vec<String>,
    /// Nothing of it is left but this.
    pub torn_down: bool,
}

/// What a group shows of its last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LastDrill {
    pub id: String,
    pub state: DrillState,
    pub passed: bool,
    pub started_at: UnixMs,
    pub rpo_ms: u64,
    pub rto_ms: Option<u64>,
}

impl DrillRecord {
    pub const VERSION: u32 = 1;

    pub(super) fn isolated(&self, member: &DrillMember) -> Isolated {
        let network = match &self.network {
            Some(network) if !network.missing => NetworkHere::Network(network.name.clone()),
            _ => NetworkHere::Nowhere,
        };
        let dir = self.dir.join(member.vm.to_string());
        Isolated { name: member.as_name.clone(), uuid: member.as_vm, network, dir }
    }

    /// Whether a replica of it was placed at this host.
    pub(super) fn is_at(&self, host: &str) -> bool {
        self.members.iter().any(|member| member.host_name() == Some(host))
    }
}

impl DrillMember {
    pub fn host_name(&self) -> Option<&str> {
        self.host.as_ref().map(|host| host.name.as_str())
    }
}

impl From<DrillRecord> for LastDrill {
    fn from(record: DrillRecord) -> Self {
        let DrillRecord { id, state, passed, started_at, rpo_ms, rto_ms, .. } = record;
        Self { id, state, passed, started_at, rpo_ms, rto_ms }
    }
}

/// All drills of a site.
#[derive(Debug)]
pub struct DrillBook {
    dir: PathBuf,
    /// By the instant of their beginning, and id.
    known: Mutex<BTreeMap<(UnixMs, String), DrillRecord>>,
}

const RECORD: &str = "drill.json";

impl DrillBook {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let mut known = BTreeMap::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path().join(RECORD);
            let read = fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice::<DrillRecord>(&bytes)?));
            match read {
                Ok(record) if record.version == DrillRecord::VERSION => {
                    known.insert((record.started_at, record.id.clone()), record);
                }
                Ok(record) => {
                    tracing::warn!(path = %path.display(), record.version, "a drill of a later release")
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a drill's record can't be read")
                }
            }
        }
        Ok(Self { dir, known: Mutex::new(known) })
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<DrillRecord> {
        self.known().values().cloned().collect()
    }

    pub fn find(&self, id: &str) -> Option<DrillRecord> {
        self.known().values().find(|record| record.id == id).cloned()
    }

    /// The last one of a group, or of a VM by itself.
    pub fn last_of(&self, group: GroupId) -> Option<DrillRecord> {
        self.known().values().rfind(|record| record.group == group).cloned()
    }

    /// Those of a group, or of a VM by itself, oldest first.
    pub fn of(&self, group: GroupId) -> Vec<DrillRecord> {
        self.known().values().filter(|record| record.group == group).cloned().collect()
    }

    /// Where a drill's evidence lies.
    pub fn folder(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// Returns once it would survive a power cut.
    pub fn save(&self, record: &DrillRecord) -> io::Result<()> {
        let folder = self.folder(&record.id);
        if !folder.exists() {
            fs::create_dir(&folder)?;
            sync(&self.dir)?;
        }
        durable::replace(&folder.join(RECORD), &serde_json::to_vec_pretty(record)?, 0o600)?;
        self.known().insert((record.started_at, record.id.clone()), record.clone());
        Ok(())
    }

    /// Forgets a drill of which nothing is left, and its evidence.
    pub fn forget(&self, record: &DrillRecord) -> io::Result<()> {
        fs::remove_dir_all(self.folder(&record.id))?;
        self.known().remove(&(record.started_at, record.id.clone()));
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<(UnixMs, String), DrillRecord>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sync(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}
