//! What is remembered of groups: a JSON file for each, replaced whole.
//! Promises: a change is durable before it is answered; a VM is in one group at most; a file that can't be read is never
//! taken for a group that is not there; a group that was deleted is put away, and one that is made under its name is that
//! group again, with its history. Called by `api` and by the coordinator of cuts.

use super::spec::{GroupSpec, SpecError};
use lifeboat::{
    durable,
    id::{GroupId, VmId},
    units::UnixMs,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

/// A group as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Group {
    pub version: u32,
    pub id: GroupId,
    pub spec: GroupSpec,
    /// In the order of `spec.vms`.
    pub members: Vec<MemberVm>,
    /// No points for now.
    pub paused: bool,
    pub created_at: UnixMs,
    pub changed_at: UnixMs,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct MemberVm {
    pub vm: VmId,
    /// As the group's specification names it.
    pub name: String,
}

#[derive(Debug, thiserror::Error)]
pub enum BookError {
    #[error("{}: {source}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    #[error("{}: can't be read as a group ({why}); mend it, or move it away and create the group again", path.display())]
    Malformed { path: PathBuf, why: String },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("there is no group `{0}`; `lifeboat group list` shows those there are")]
    Unknown(String),
    #[error("there is a group `{0}` already")]
    NameTaken(String),
    #[error("{vm} is in group `{group}` already; a VM can be in one group only")]
    Member { vm: String, group: String },
    #[error("{0} is meant twice: by its name and by its UUID")]
    Twice(String),
    #[error("no more than {GROUPS_MAX} groups")]
    TooMany,
}

/// All groups of a site.
#[derive(Debug)]
pub struct Book {
    dir: PathBuf,
    groups: Mutex<BTreeMap<GroupId, Group>>,
    /// Bumped with each change.
    changes: watch::Sender<u64>,
}

impl Group {
    pub const VERSION: u32 = 1;

    /// A VM that is in no group, as a group of one.
    pub fn alone(vm: VmId, name: &str, now: UnixMs) -> Self {
        Self {
            version: Self::VERSION,
            id: GroupId::from_bytes(*vm.as_bytes()),
            spec: GroupSpec::new(name, &[name]),
            members: vec![MemberVm { vm, name: name.into() }],
            paused: false,
            created_at: now,
            changed_at: now,
        }
    }

    pub fn has(&self, vm: VmId) -> bool {
        self.members.iter().any(|member| member.vm == vm)
    }
}

impl Book {
    pub fn open(dir: PathBuf) -> Result<Self, BookError> {
        let failed = |source| BookError::Disk { path: dir.clone(), source };
        fs::create_dir_all(&dir).map_err(failed)?;
        let mut groups = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if is_file_of_a_group(&path) {
                let group = read(&path)?;
                groups.insert(group.id, group);
            }
        }
        Ok(Self { dir, groups: Mutex::new(groups), changes: watch::channel(0).0 })
    }

    /// Told when any group has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub fn get(&self, id: GroupId) -> Option<Group> {
        self.groups().get(&id).cloned()
    }

    pub fn list(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = self.groups().values().cloned().collect();
        groups.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        groups
    }

    /// By name or id.
    pub fn find(&self, given: &str) -> Result<Group, BookError> {
        let groups = self.groups();
        let named = groups.values().find(|group| group.spec.name == given);
        let found = named.or_else(|| groups.get(&given.parse().ok()?));
        found.cloned().ok_or_else(|| BookError::Unknown(given.escape_debug().to_string()))
    }

    pub fn group_of(&self, vm: VmId) -> Option<Group> {
        self.groups().values().find(|group| group.has(vm)).cloned()
    }

    /// A new group, or the one that last had this name; returns once it would survive a power cut. Blocks.
    pub fn create(&self, spec: GroupSpec, members: Vec<MemberVm>, now: UnixMs) -> Result<Group, BookError> {
        let before = self.put_away()?.into_iter().filter(|group| group.spec.name == spec.name);
        let before = before.max_by_key(|group| group.changed_at).map(|group| group.id);
        let id = before.unwrap_or_else(|| GroupId::from_bytes(*uuid::Uuid::new_v4().as_bytes()));
        let group = Group {
            version: Group::VERSION,
            id,
            spec,
            members,
            paused: false,
            created_at: now,
            changed_at: now,
        };
        let mut groups = self.groups();
        if groups.len() >= GROUPS_MAX {
            return Err(BookError::TooMany);
        }
        let made = self.put(&mut groups, group)?;
        if before.is_some() {
            let path = self.away(id);
            durable::remove(&path).map_err(|source| BookError::Disk { path, source })?;
        }
        Ok(made)
    }

    /// Replaces a group by what `change` makes of it; the id stays. Blocks.
    pub fn change(
        &self,
        id: GroupId,
        now: UnixMs,
        change: impl FnOnce(&mut Group),
    ) -> Result<Group, BookError> {
        let mut groups = self.groups();
        let before = groups.get(&id).cloned().ok_or_else(|| BookError::Unknown(id.to_string()))?;
        let mut group = before.clone();
        change(&mut group);
        if group == before {
            return Ok(group);
        }
        (group.id, group.changed_at) = (id, now);
        self.put(&mut groups, group)
    }

    /// Puts a group away; its members' points stay. Returns those that were put away long ago and are forgotten for good.
    /// Blocks.
    pub fn delete(&self, id: GroupId, now: UnixMs) -> Result<Vec<GroupId>, BookError> {
        let mut groups = self.groups();
        let mut group = groups.get(&id).cloned().ok_or_else(|| BookError::Unknown(id.to_string()))?;
        group.changed_at = now;
        let (path, away) = (self.path(id), self.away(id));
        let failed = |source| BookError::Disk { path: away.clone(), source };
        fs::create_dir_all(self.dir.join(AWAY)).map_err(failed)?;
        write(&away, &group)?;
        durable::remove(&path).map_err(|source| BookError::Disk { path, source })?;
        groups.remove(&id);
        self.changes.send_modify(|count| *count += 1);
        drop(groups);
        self.forget_old()
    }

    /// Beyond a bound the oldest are forgotten.
    fn forget_old(&self) -> Result<Vec<GroupId>, BookError> {
        let mut away = self.put_away()?;
        away.sort_by_key(|group| group.changed_at);
        let old = away.len().saturating_sub(AWAY_MAX);
        let forget = |group: Group| {
            let path = self.away(group.id);
            durable::remove(&path).map_err(|source| BookError::Disk { path, source }).map(|()| group.id)
        };
        away.into_iter().take(old).map(forget).collect()
    }

    /// Those that were deleted. One that can't be read is as good as forgotten.
    fn put_away(&self) -> Result<Vec<Group>, BookError> {
        let dir = self.dir.join(AWAY);
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| BookError::Disk { path: dir, source })?,
        };
        let known = self.groups().keys().copied().collect::<Vec<_>>();
        let files = entries.flatten().map(|entry| entry.path()).filter(|path| is_file_of_a_group(path));
        let found = files.filter_map(|path| {
            read(&path).inspect_err(|error| tracing::warn!(%error, "a group that was deleted")).ok()
        });
        // One that a power cut kept from being removed is alive.
        Ok(found.filter(|group| !known.contains(&group.id)).collect())
    }

    fn put(
        &self,
        groups: &mut MutexGuard<'_, BTreeMap<GroupId, Group>>,
        group: Group,
    ) -> Result<Group, BookError> {
        group.spec.check()?;
        let others = || groups.values().filter(|other| other.id != group.id);
        if others().any(|other| other.spec.name == group.spec.name) {
            return Err(BookError::NameTaken(group.spec.name));
        }
        for (at, member) in group.members.iter().enumerate() {
            if let Some(other) = others().find(|other| other.has(member.vm)) {
                return Err(BookError::Member { vm: member.name.clone(), group: other.spec.name.clone() });
            }
            if group.members[..at].iter().any(|before| before.vm == member.vm) {
                return Err(BookError::Twice(member.name.clone()));
            }
        }
        write(&self.path(group.id), &group)?;
        groups.insert(group.id, group.clone());
        self.changes.send_modify(|count| *count += 1);
        Ok(group)
    }

    fn path(&self, id: GroupId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    fn away(&self, id: GroupId) -> PathBuf {
        self.dir.join(AWAY).join(format!("{id}.json"))
    }

    fn groups(&self) -> MutexGuard<'_, BTreeMap<GroupId, Group>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hidden one is a draft that a power cut left.
fn is_file_of_a_group(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.extension().is_some_and(|end| end == "json")
}

fn write(path: &Path, group: &Group) -> Result<(), BookError> {
    let bytes = serde_json::to_vec_pretty(group).map_err(io::Error::from);
    let written = bytes.and_then(|bytes| durable::replace(path, &bytes, 0o600));
    written.map_err(|source| BookError::Disk { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<Group, BookError> {
    let malformed = |why: String| BookError::Malformed { path: path.to_owned(), why };
    let text = fs::read(path).map_err(|source| BookError::Disk { path: path.to_owned(), source })?;
    let group: Group = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    if group.version != Group::VERSION {
        let (theirs, ours) = (group.version, Group::VERSION);
        return Err(malformed(format!("version {theirs}, this release reads {ours}")));
    }
    group.spec.check().map_err(|error| malformed(error.to_string()))?;
    Ok(group)
}

const GROUPS_MAX: usize = 1000;
/// Where those that were deleted lie.
const AWAY: &str = "deleted";
const AWAY_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    fn member(no: u8) -> MemberVm {
        MemberVm { vm: VmId::from_bytes([no; 16]), name: format!("vm{no}") }
    }

    fn spec(name: &str, vms: &[u8]) -> (GroupSpec, Vec<MemberVm>) {
        let members: Vec<MemberVm> = vms.iter().map(|no| member(*no)).collect();
        let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        (GroupSpec::new(name, &names), members)
    }

    #[test]
    fn groups_outlive_the_controller_and_a_vm_is_in_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let book = Book::open(dir.path().join("groups")).unwrap();
        let make = |name: &str, vms: &[u8]| {
            let (spec, members) = spec(name, vms);
            book.create(spec, members, UnixMs(1))
        };
        let shop = make("shop", &[1, 2]).unwrap();
        assert!(matches!(make("shop", &[3]), Err(BookError::NameTaken(_))));
        assert!(matches!(make("mail", &[2, 3]), Err(BookError::Member { .. })));
        let mail = make("mail", &[3]).unwrap();
        let joined = book.change(mail.id, UnixMs(2), |group| group.members.push(member(1)));
        assert!(matches!(joined, Err(BookError::Member { .. })), "{joined:?}");
        let paused = book.change(shop.id, UnixMs(3), |group| group.paused = true).unwrap();
        assert_eq!((paused.paused, paused.changed_at), (true, UnixMs(3)));
        let again = book.change(shop.id, UnixMs(4), |group| group.paused = true).unwrap();
        assert_eq!(again.changed_at, UnixMs(3), "nothing was changed");
        let next = Book::open(dir.path().join("groups")).unwrap();
        assert_eq!(next.list(), [mail.clone(), paused]);
        assert_eq!(next.group_of(member(2).vm).unwrap().spec.name, "shop");
        next.delete(mail.id, UnixMs(5)).unwrap();
        assert!(matches!(next.find("mail"), Err(BookError::Unknown(_))));
        assert_eq!(Book::open(dir.path().join("groups")).unwrap().list().len(), 1);
        assert_eq!(next.find(&shop.id.to_string()).unwrap().spec.name, "shop");
    }

    #[test]
    fn a_group_that_is_made_again_under_its_name_is_the_one_that_was_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let book = Book::open(dir.path().join("groups")).unwrap();
        let make = |book: &Book, name: &str, vms: &[u8]| {
            let (spec, members) = spec(name, vms);
            book.create(spec, members, UnixMs(1)).unwrap()
        };
        let shop = make(&book, "shop", &[1, 2]);
        assert_eq!(book.delete(shop.id, UnixMs(2)).unwrap(), []);
        assert_ne!(make(&book, "mail", &[3]).id, shop.id);
        let book = Book::open(dir.path().join("groups")).unwrap();
        assert_eq!(book.list().len(), 1, "it is gone");
        let again = make(&book, "shop", &[1]);
        assert_eq!((again.id, again.members.len()), (shop.id, 1), "its history is its own again");
        book.change(again.id, UnixMs(3), |group| group.spec.name = "store".into()).unwrap();
        assert_ne!(make(&book, "shop", &[2]).id, shop.id, "that one is alive under another name");
        // Of many the oldest are forgotten, and said.
        let mut forgotten = Vec::new();
        for no in 0..=AWAY_MAX {
            let many = make(&book, &format!("many{no}"), &[9]);
            forgotten.extend(book.delete(many.id, UnixMs(10 + no as u64)).unwrap());
        }
        assert_eq!(forgotten.len(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_told_and_a_draft_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("groups");
        let book = Book::open(folder.clone()).unwrap();
        let (spec, members) = spec("shop", &[1]);
        let shop = book.create(spec, members, UnixMs(1)).unwrap();
        fs::write(folder.join(".draft.json.1"), "{").unwrap();
        assert_eq!(Book::open(folder.clone()).unwrap().list().len(), 1);
        let file = folder.join(format!("{}.json", shop.id));
        let text = fs::read_to_string(&file).unwrap();
        for broken in ["{".to_owned(), text.replace("\"version\": 1", "\"version\": 9")] {
            fs::write(&file, broken).unwrap();
            assert!(Book::open(folder.clone()).unwrap_err().to_string().contains("mend it"));
        }
    }
}
