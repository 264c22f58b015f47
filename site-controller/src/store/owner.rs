//! Which agent writes a VM's history, made to last: a record for each change, of which the highest number holds.
//! Promises: returns once the change is on stable storage; a record that can't be read is an error, never nobody. Called
//! by `intake::slot`, one at a time for each VM.

use crate::store::{
    error::StoreError,
    objects::Objects,
    paths::{self, Named},
    site::{Store, apart},
};
use lifeboat::{
    format::owner::{self, Owner, OwnerRecord},
    id::VmId,
};

impl Store {
    /// `None` if nobody has written a point of this VM since there are such records.
    pub async fn owner(&self, vm: VmId) -> Result<Option<Owner>, StoreError> {
        let objects = self.objects();
        let Some(no) = numbers(objects.as_ref(), vm).await?.pop() else { return Ok(None) };
        let path = paths::owner(vm, no);
        let file = objects.get(&path, owner::FILE_MAX).await?;
        match OwnerRecord::decode(&file) {
            Ok(record) if record.vm == vm && record.no == no => Ok(Some(record.owner)),
            Ok(_) => Err(StoreError::damaged(&path, "it is the record of another VM or another time")),
            Err(error) => Err(StoreError::damaged(&path, error)),
        }
    }

    /// Returns once it would survive a power cut. Not undone by cancelling.
    pub async fn set_owner(&self, vm: VmId, owner: Owner) -> Result<(), StoreError> {
        let (objects, made_at) = (self.objects().clone(), self.clock().now());
        apart(vm, async move {
            let older = numbers(objects.as_ref(), vm).await?;
            let mut no = older.last().map_or(1, |no| no.saturating_add(1));
            loop {
                let path = paths::owner(vm, no);
                let record = OwnerRecord { vm, no, owner: owner.clone(), made_at };
                let file = record.encode().map_err(|error| StoreError::damaged(&path, error))?;
                match objects.put_durable(&path, file.into()).await {
                    Ok(()) => break,
                    // A former attempt failed, but not without a trace.
                    Err(StoreError::Exists { .. }) if no < u64::MAX => no += 1,
                    Err(error) => return Err(error),
                }
            }
            for old in older {
                // One that stays is passed over: the highest number holds.
                let _ = objects.delete(&paths::owner(vm, old)).await;
            }
            Ok(())
        })
        .await
    }
}

/// Ascending.
async fn numbers(objects: &dyn Objects, vm: VmId) -> Result<Vec<u64>, StoreError> {
    let listed = objects.list(&paths::owners_of(vm)).await?;
    let number = |path: &str| match paths::parse(path) {
        Named::Owner(of, no) if of == vm => Some(no),
        _ => None,
    };
    let mut numbers: Vec<u64> = listed.iter().filter_map(|object| number(&object.path)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryIndex, SeededIds, StoreOptions, sim::SimDisk};
    use lifeboat::clock::SystemClock;
    use std::sync::Arc;

    const VM: VmId = VmId::from_bytes([4; 16]);

    async fn open(disk: SimDisk) -> Store {
        let (clock, ids) = (Arc::new(SystemClock), Arc::new(SeededIds::new(1)));
        let index = Arc::new(MemoryIndex::default());
        let options = StoreOptions::default();
        let (store, report) = Store::open(Arc::new(disk), clock, ids, index, options).await.unwrap();
        assert_eq!(report.findings, Vec::new());
        store
    }

    /// Goal: a power cut anywhere leaves the old owner or the new one, and the new one where it was said.
    #[tokio::test]
    async fn a_change_of_owner_survives_a_power_cut_as_soon_as_it_was_said() {
        let all = [
            Owner::Agent("a".into()),
            Owner::Left("a".into()),
            Owner::Agent("b".into()),
            Owner::Released("b".into()),
        ];
        for (seed, cut) in (0..4).flat_map(|seed| (1..=30).map(move |cut| (seed, cut))) {
            let disk = SimDisk::new(seed);
            let store = open(disk.clone()).await;
            disk.cut_at(cut);
            let (mut said, mut tried) = (None, None);
            for owner in &all {
                tried = Some(owner.clone());
                if store.set_owner(VM, owner.clone()).await.is_err() {
                    break;
                }
                said = tried.clone();
            }
            let found = open(disk.reopen()).await.owner(VM).await.unwrap();
            assert!(found == said || found == tried, "seed {seed}, cut {cut}: {found:?}, said {said:?}");
        }
    }

    #[tokio::test]
    async fn a_record_that_can_not_be_read_is_not_taken_for_nobody() {
        let disk = SimDisk::new(1);
        let store = open(disk.clone()).await;
        assert_eq!(store.owner(VM).await.unwrap(), None);
        store.set_owner(VM, Owner::Agent("a".into())).await.unwrap();
        disk.put_durable(&paths::owner(VM, 9), b"LIFEBOAT?".as_slice().into()).await.unwrap();
        assert!(store.owner(VM).await.is_err());
        store.set_owner(VM, Owner::Released("a".into())).await.unwrap();
        assert_eq!(store.owner(VM).await.unwrap(), Some(Owner::Released("a".into())));
        assert_eq!(numbers(store.objects().as_ref(), VM).await.unwrap(), [10]);
    }
}
