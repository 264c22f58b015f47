//! What the site's groups have said of this host's VMs, remembered across restarts.
//! Promises: each actor and the daemon see a change as it comes; what was said holds until something else is, also while
//! there is no link. Written by the link, read by the actors and by the daemon, which protects what is assigned.

use lifeboat::{durable, id::VmId, wire::order::Assignment};
use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;

/// What a group says of one VM; `None`: no group has it.
pub type Said = Option<Assignment>;

/// All VMs'. Clones share one table.
#[derive(Clone, Debug)]
pub struct Assignments {
    dir: Arc<PathBuf>,
    said: Arc<Mutex<BTreeMap<VmId, watch::Sender<Said>>>>,
    /// Bumped with each change.
    changes: watch::Sender<u64>,
}

impl Assignments {
    /// Takes up what was said before. What can't be read is passed over, and said again by the site.
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let mut said = BTreeMap::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(vm) = name.strip_suffix(".json").and_then(|vm| vm.parse().ok()) else { continue };
            let read = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Assignment>(&text).ok());
            if let Some(assignment) = read {
                said.insert(vm, watch::channel(Some(assignment)).0);
            }
        }
        Ok(Self { dir: Arc::new(dir), said: Arc::new(Mutex::new(said)), changes: watch::channel(0).0 })
    }

    /// The site says this now.
    pub fn set(&self, vm: VmId, assignment: Said) {
        let path = self.dir.join(format!("{vm}.json"));
        let changed = self.of(vm).send_if_modified(|said| {
            let changed = *said != assignment;
            said.clone_from(&assignment);
            changed
        });
        if !changed {
            return;
        }
        let kept = match &assignment {
            Some(assignment) => serde_json::to_vec(assignment)
                .map_err(io::Error::from)
                .and_then(|text| durable::replace(&path, &text, 0o600)),
            None => fs::remove_file(&path)
                .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }),
        };
        if let Err(error) = kept {
            tracing::warn!(%vm, %error, "what the site's groups say of this VM could not be remembered");
        }
        tracing::info!(%vm, group = assignment.as_ref().map(|assignment| assignment.group.as_str()), "the site's groups say");
        self.changes.send_modify(|count| *count += 1);
    }

    /// What is said of a VM, now and from now on.
    pub fn watch(&self, vm: VmId) -> watch::Receiver<Said> {
        self.of(vm).subscribe()
    }

    /// Told when anything has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// All VMs that a group has.
    pub fn all(&self) -> BTreeMap<VmId, Assignment> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().filter_map(|(vm, said)| Some((*vm, said.borrow().clone()?))).collect()
    }

    fn of(&self, vm: VmId) -> watch::Sender<Said> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.entry(vm).or_insert_with(|| watch::channel(None).0).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_site_said_outlives_the_agent_and_each_change_is_seen_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("assignments");
        let (vm, other) = (VmId::from_bytes([1; 16]), VmId::from_bytes([2; 16]));
        let shop = Assignment {
            group: "shop".into(),
            interval_ms: 2500,
            memory: Default::default(),
            consistency: Default::default(),
            together: true,
            paused: false,
        };
        let assignments = Assignments::open(folder.clone()).unwrap();
        let (mut seen, changes) = (assignments.watch(vm), assignments.changes());
        assignments.set(vm, Some(shop.clone()));
        assignments.set(vm, Some(shop.clone()));
        assignments.set(other, None);
        assert_eq!((*changes.borrow(), seen.borrow_and_update().clone()), (1, Some(shop.clone())));
        fs::write(folder.join("broken.json"), "{").unwrap();
        let next = Assignments::open(folder.clone()).unwrap();
        assert_eq!(next.all(), BTreeMap::from([(vm, shop)]));
        next.set(vm, None);
        assert!(next.all().is_empty() && Assignments::open(folder).unwrap().all().is_empty());
    }
}
