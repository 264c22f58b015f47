//! What a failover has done so far, on disk: one JSON file per VM.
//! Promises: a phase is entered in the journal, synced, before the work that must not be done twice; a controller that
//! dies anywhere goes on from the last phase it entered. Called by `runbook` only.

use super::{addresses::plan::Plan, outcome::Afterwards};
use crate::{
    group::{GroupSpec, address_spec::Occasion, addresses::AddressRules, spec::NetworkHere},
    store::PointSummary,
};
use lifeboat::{
    durable,
    id::{PointId, VmId},
    units::{Generation, Seq, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, io, path::PathBuf};

/// How far a failover has come. Each phase says what *has been done*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Decided and checked; the source may still write.
    Begun,
    /// The generation is raised: the source's agent is refused from here on.
    Fenced,
    /// The replica's disks and memory image are complete and synced.
    Restored,
    /// About to start: from here on the disks may be the running replica's.
    Starting,
    /// The replica runs; or, where the VM was off, it is there.
    Running,
}

/// A folder that is kept until the operator may no longer want it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Aside {
    pub dir: PathBuf,
    pub until: UnixMs,
}

/// A replica that ran until an undo took the failover to another point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Earlier {
    pub point: PointId,
    pub cut_at: UnixMs,
    pub started_at: UnixMs,
    pub running_at: UnixMs,
    pub resumed: bool,
    pub cold_boot: Option<String>,
}

/// Images of another point, complete in the folder of the next attempt while the replica runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Staged {
    pub point: PointId,
    /// They are removed then, if nobody has gone on from them.
    pub until: UnixMs,
}

/// The host that was chosen for a replica, of several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Placed {
    pub name: String,
    pub uri: String,
    /// Bytes of ordinary memory, and processors, that it takes there.
    pub memory: u64,
    pub vcpus: u32,
    /// A start was asked for: from then on it may run there, and is started nowhere else.
    pub started: bool,
}

/// What its runbook says of how a replica goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Manner {
    /// A replica whose memory does not go on is left as it is, rather than booted.
    pub no_cold_boot: bool,
    /// The replica of a VM that was off is started all the same. An operator's word, not the runbook's.
    pub start_off: bool,
    /// A program of the guest, with its arguments, that is run in it once it goes on. Without one, the site's.
    pub guest_hook: Vec<String>,
    /// Where networks and bridges of the source lead here.
    pub networks: BTreeMap<String, NetworkHere>,
    /// What its cards, and its guest, have here for addresses.
    pub addresses: AddressRules,
    /// Of several hosts those that it may run at; none: any.
    pub hosts: Vec<String>,
}

impl Manner {
    pub fn of(spec: &GroupSpec, member: &str) -> Self {
        let steps = spec.runbook.vm.get(member);
        Self {
            no_cold_boot: !spec.runbook.cold_boot,
            start_off: false,
            guest_hook: steps.map(|steps| steps.guest_hook.clone()).unwrap_or_default(),
            // What was checked when the group was made.
            networks: spec.networks().unwrap_or_default(),
            addresses: spec.addresses(member, Occasion::Failover).unwrap_or_default(),
            hosts: steps.map(|steps| steps.hosts.clone()).unwrap_or_default(),
        }
    }
}

/// One failover of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    pub version: u32,
    pub vm: VmId,
    pub vm_name: String,
    pub kind: String,
    pub point: PointId,
    /// It was asked for as the newest, not by name.
    #[serde(default)]
    pub newest: bool,
    pub seq: Seq,
    pub cut_at: UnixMs,
    pub generation: Generation,
    /// Whether the replica goes on with its memory, rather than boots.
    pub resumes: bool,
    /// The VM was off, because somebody wanted it so.
    #[serde(default)]
    pub was_off: bool,
    pub phase: Phase,
    /// Counts starts of the work; each has a folder of its own, so that no attempt writes over another's disks.
    pub attempt: u32,
    pub started_at: UnixMs,
    pub running_at: Option<UnixMs>,
    /// Disks of this attempt that are complete.
    pub disks_done: Vec<String>,
    /// Disks and memory image of this attempt are complete: in a planned failover before the source is fenced.
    #[serde(default)]
    pub restored: bool,
    /// Disks of replicas that an undo has replaced.
    #[serde(default)]
    pub aside: Vec<Aside>,
    /// What an undo is about to go on from.
    #[serde(default)]
    pub staged: Option<Staged>,
    /// What ran before each undo, oldest first.
    #[serde(default)]
    pub earlier: Vec<Earlier>,
    /// `fence_command` has ended the source, where there is one, or was to be skipped.
    #[serde(default)]
    pub source_stopped: bool,
    /// What went wrong last, if anything did.
    pub last_error: Option<String>,
    /// Why the replica was booted from the point's disks although the point holds memory.
    #[serde(default)]
    pub cold_boot: Option<String>,
    /// What was said each time that the resume was refused.
    #[serde(default)]
    pub refused: Vec<String>,
    #[serde(default)]
    pub manner: Manner,
    /// Where the site has several hosts, that which was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Placed>,
    /// A replica ran, before its resume was given up or an undo: it may have been heard.
    #[serde(default)]
    pub has_run: bool,
    /// How much its console's file held before it was started.
    #[serde(default)]
    pub console_from: Option<u64>,
    /// What was done for the resumed replica.
    #[serde(default)]
    pub after_resume: Vec<Afterwards>,
    /// What is to become of the guest's addresses; decided before anything of it is done.
    #[serde(default)]
    pub address_plan: Option<Plan>,
    /// What was done of that.
    #[serde(default)]
    pub addresses: Vec<Afterwards>,
}

impl Record {
    pub const VERSION: u32 = 1;

    /// A failover to `point` that was just decided.
    pub fn new(point: &PointSummary, generation: Generation, now: UnixMs) -> Self {
        Self {
            version: Self::VERSION,
            vm: point.vm,
            vm_name: point.name.clone(),
            kind: "emergency".into(),
            point: point.point,
            newest: false,
            seq: point.seq,
            cut_at: point.cut_at,
            generation,
            resumes: point.has_memory,
            was_off: point.stays_off,
            phase: Phase::Begun,
            attempt: 1,
            started_at: now,
            running_at: None,
            disks_done: Vec::new(),
            restored: false,
            aside: Vec::new(),
            staged: None,
            earlier: Vec::new(),
            source_stopped: false,
            last_error: None,
            cold_boot: None,
            refused: Vec::new(),
            manner: Manner::default(),
            host: None,
            has_run: false,
            console_from: None,
            after_resume: Vec::new(),
            address_plan: None,
            addresses: Vec::new(),
        }
    }
}

impl Record {
    /// The replica is defined with its disks, and not started.
    pub fn leaves_off(&self) -> bool {
        self.was_off && !self.manner.start_off
    }
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("failover journal {path}: {source}")]
    Disk { path: PathBuf, source: io::Error },
    #[error("failover journal {path} can't be read ({why}); move it away to start the failover afresh")]
    Malformed { path: PathBuf, why: String },
}

/// The folder of journals.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub fn open(dir: PathBuf) -> Result<Self, JournalError> {
        fs::create_dir_all(&dir).map_err(|source| JournalError::Disk { path: dir.clone(), source })?;
        Ok(Self { dir })
    }

    pub fn load(&self, vm: VmId) -> Result<Option<Record>, JournalError> {
        let path = self.path(vm);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JournalError::Disk { path, source }),
        };
        let record: Record = serde_json::from_str(&text)
            .map_err(|error| JournalError::Malformed { path: path.clone(), why: error.to_string() })?;
        if record.version == Record::VERSION {
            Ok(Some(record))
        } else {
            let why = format!("version {}, this release reads {}", record.version, Record::VERSION);
            Err(JournalError::Malformed { path, why })
        }
    }

    /// Replaces the record; returns once it would survive a power cut.
    pub fn save(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(record.vm);
        let bytes = serde_json::to_vec_pretty(record).map_err(io::Error::from);
        bytes
            .and_then(|bytes| durable::replace(&path, &bytes, 0o600))
            .map_err(|source| JournalError::Disk { path, source })
    }

    /// Forgets a failover that came to nothing.
    pub fn remove(&self, vm: VmId) -> Result<(), JournalError> {
        let path = self.path(vm);
        durable::remove(&path).map_err(|source| JournalError::Disk { path, source })
    }

    /// The VMs that have a record.
    pub fn vms(&self) -> Result<Vec<VmId>, JournalError> {
        let failed = |source| JournalError::Disk { path: self.dir.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            found.extend(name.to_str().and_then(|name| name.strip_suffix(".json")?.parse::<VmId>().ok()));
        }
        Ok(found)
    }

    pub(super) fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// Puts the record of a failover away that is over: the VM went elsewhere. Nothing happens without one.
    pub fn close(&self, vm: VmId) -> Result<(), JournalError> {
        let Some(record) = self.load(vm)? else { return Ok(()) };
        let closed = self.dir.join(CLOSED);
        let (from, to) = (self.path(vm), closed.join(format!("{vm}-{}.json", record.generation)));
        let moved = fs::create_dir_all(&closed).and_then(|()| durable::rename(&from, &to));
        moved.map_err(|source| JournalError::Disk { path: from, source })
    }

    /// The records of a VM's failovers that are over, oldest first. One that can't be read is left out, and said.
    pub fn closed(&self, vm: VmId) -> Result<Vec<Record>, JournalError> {
        let dir = self.dir.join(CLOSED);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(JournalError::Disk { path: dir, source }),
        };
        let (mut found, own) = (Vec::new(), format!("{vm}-"));
        for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&own)) {
            let read = fs::read(entry.path()).and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?));
            match read {
                Ok(record) => found.push(record),
                Err(error) => {
                    tracing::warn!(path = %entry.path().display(), %error, "a closed failover can't be read");
                }
            }
        }
        found.sort_by_key(|record| record.generation);
        Ok(found)
    }

    pub fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.json"))
    }
}

/// The folder of failovers that are over.
const CLOSED: &str = "closed";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn a_runbook_s_word_on_a_resume_reaches_the_member_that_it_is_for() {
        let mut spec = GroupSpec::new("shop", &["web", "db"]);
        spec.runbook.vm.entry("web".into()).or_default().guest_hook = vec!["/bin/resumed".into()];
        let addresses = AddressRules { up_within_s: 120, ..AddressRules::default() };
        assert_eq!(Manner::of(&spec, "db"), Manner { addresses, ..Manner::default() });
        spec.runbook.cold_boot = false;
        spec.runbook.networks.insert("lan".into(), "bridge:br7".into());
        let found = Manner::of(&spec, "web");
        assert!(found.no_cold_boot && found.guest_hook == ["/bin/resumed"]);
        assert_eq!(found.networks.get("lan"), Some(&NetworkHere::Bridge("br7".into())));
    }

    /// One that has come half way.
    pub(crate) fn record() -> Record {
        Record {
            version: Record::VERSION,
            vm: VmId::from_bytes([4; 16]),
            vm_name: "web".into(),
            kind: "emergency".into(),
            point: PointId::from_bytes([5; 16]),
            newest: false,
            seq: Seq(9),
            cut_at: UnixMs(1),
            generation: Generation(2),
            resumes: true,
            was_off: false,
            phase: Phase::Fenced,
            attempt: 1,
            started_at: UnixMs(2),
            running_at: None,
            disks_done: vec!["vda".into()],
            restored: false,
            aside: Vec::new(),
            staged: None,
            earlier: Vec::new(),
            source_stopped: false,
            last_error: None,
            cold_boot: None,
            refused: Vec::new(),
            manner: Manner::default(),
            host: None,
            has_run: false,
            console_from: None,
            after_resume: Vec::new(),
            address_plan: None,
            addresses: Vec::new(),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_saved_and_a_torn_one_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path().join("failovers")).unwrap();
        let vm = VmId::from_bytes([4; 16]);
        assert_eq!(journal.load(vm).unwrap(), None);
        let record = record();
        journal.save(&record).unwrap();
        assert_eq!(journal.load(vm).unwrap(), Some(record.clone()));
        assert_eq!(journal.vms().unwrap(), [vm]);
        journal.close(vm).unwrap();
        assert_eq!(journal.load(vm).unwrap(), None);
        assert!(dir.path().join(format!("failovers/closed/{vm}-2.json")).exists(), "it is kept");
        assert_eq!(journal.closed(vm).unwrap(), std::slice::from_ref(&record));
        journal.close(vm).unwrap();
        fs::write(journal.path(vm), "{\"version\":").unwrap();
        assert!(journal.load(vm).unwrap_err().to_string().contains("move it away"));
        let future = Record { version: 2, ..record };
        journal.save(&future).unwrap();
        assert!(journal.load(vm).is_err());
    }
}
