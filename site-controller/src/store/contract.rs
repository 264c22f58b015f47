//! What every implementation of `Objects` must do, run against the real directory and against the simulated disk.

use super::{LocalObjects, Objects, StoreError, paths, sim::SimDisk};
use bytes::Bytes;
use lifeboat::units::ByteSize;
use std::sync::Arc;

async fn each(check: impl AsyncFn(Arc<dyn Objects>)) {
    let root = tempfile::tempdir().unwrap();
    check(Arc::new(LocalObjects::open(root.path(), ByteSize(0)).await.unwrap())).await;
    check(Arc::new(SimDisk::new(1))).await;
}

fn names(found: Vec<super::ObjectInfo>) -> Vec<(String, u64)> {
    found.into_iter().map(|object| (object.path, object.bytes)).collect()
}

#[tokio::test]
async fn what_was_put_is_read_back_and_nothing_replaces_it() {
    each(async |objects| {
        objects.put_durable("vms/a/one", Bytes::from_static(b"first")).await.unwrap();
        let again = objects.put_durable("vms/a/one", Bytes::from_static(b"second")).await;
        assert!(matches!(again, Err(StoreError::Exists { .. })), "{again:?}");
        assert_eq!(objects.get("vms/a/one", 5).await.unwrap(), "first");
        let larger = objects.get("vms/a/one", 4).await;
        assert!(matches!(larger, Err(StoreError::Damaged { .. })), "{larger:?}");
        for path in ["vms/a/two", "vms/b/one", "nowhere"] {
            let missing = objects.get(path, 9).await;
            assert!(matches!(missing, Err(StoreError::Missing { .. })), "{missing:?}");
            let missing = objects.get_range(path, 0..1).await;
            assert!(matches!(missing, Err(StoreError::Missing { .. })), "{missing:?}");
        }
        assert_eq!(objects.sweep_partials().await.unwrap(), 0, "a put leaves no staging file");
    })
    .await;
}

#[tokio::test]
async fn ranges_are_exact_or_refused() {
    each(async |objects| {
        objects.put_durable("vms/a/one", Bytes::from_static(b"0123456789")).await.unwrap();
        assert_eq!(objects.get_range("vms/a/one", 3..6).await.unwrap(), "345");
        assert_eq!(objects.get_range("vms/a/one", 0..10).await.unwrap(), "0123456789");
        assert_eq!(objects.get_range("vms/a/one", 4..4).await.unwrap(), "");
        for range in [5..11, 10..11, 90..91, 0..u64::MAX] {
            let short = objects.get_range("vms/a/one", range.clone()).await;
            assert!(matches!(short, Err(StoreError::Damaged { .. })), "{range:?}: {short:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn an_upload_is_seen_whole_when_it_is_finished_and_never_before() {
    each(async |objects| {
        let mut upload = objects.create("vms/a/packs/big").await.unwrap();
        upload.write(Bytes::from(vec![1; 70_000])).await.unwrap();
        upload.write(Bytes::from(vec![2; 5])).await.unwrap();
        assert_eq!(names(objects.list("vms").await.unwrap()), vec![]);
        upload.finish_durable().await.unwrap();
        assert_eq!(names(objects.list("vms").await.unwrap()), vec![("vms/a/packs/big".into(), 70_005)]);
        assert_eq!(objects.get_range("vms/a/packs/big", 69_999..70_002).await.unwrap(), [1, 2, 2].as_slice());

        let mut upload = objects.create("vms/a/packs/none").await.unwrap();
        upload.write(Bytes::from(vec![1; 10])).await.unwrap();
        upload.abort().await;
        assert_eq!(objects.list("vms").await.unwrap().len(), 1);
        assert_eq!(objects.sweep_partials().await.unwrap(), 0, "an aborted upload leaves nothing");
    })
    .await;
}

#[tokio::test]
async fn listing_is_sorted_and_keeps_to_its_directory_and_deleting_may_be_repeated() {
    each(async |objects| {
        for path in ["vms/b/x", "vms/a/y", "vms/a/x", "vms/ab/x"] {
            objects.put_durable(path, Bytes::from_static(b".")).await.unwrap();
        }
        let all: Vec<_> = objects.list("vms").await.unwrap().into_iter().map(|object| object.path).collect();
        assert_eq!(all, ["vms/a/x", "vms/a/y", "vms/ab/x", "vms/b/x"]);
        assert_eq!(objects.list("vms/a").await.unwrap().len(), 2);
        assert_eq!(objects.list("elsewhere").await.unwrap(), vec![]);
        for _ in 0..2 {
            objects.delete("vms/a/x").await.unwrap();
            objects.delete("vms/never/there").await.unwrap();
        }
        assert_eq!(names(objects.list("vms/a").await.unwrap()), vec![("vms/a/y".into(), 1)]);
        objects.put_durable("vms/a/x", Bytes::from_static(b"new")).await.unwrap();
        assert_eq!(objects.get("vms/a/x", 3).await.unwrap(), "new");
    })
    .await;
}

async fn full(objects: &dyn Objects, path: &str) {
    let refused = objects.create(path).await.err();
    assert!(refused.as_ref().is_some_and(StoreError::is_full), "{refused:?}");
    assert!(objects.check_room(path).await.is_err_and(|error| error.is_full()));
    // What the reserve is for.
    objects.put_durable(path, Bytes::from_static(b"small")).await.unwrap();
}

#[tokio::test]
async fn uploads_leave_the_reserve_to_what_is_small_and_needed() {
    let root = tempfile::tempdir().unwrap();
    full(&LocalObjects::open(root.path(), ByteSize(1 << 62)).await.unwrap(), "vms/a/one").await;
    let sim = SimDisk::new(1);
    sim.set_capacity(1000, 1001);
    full(&sim, "vms/a/one").await;
}

#[tokio::test]
async fn no_space_is_told_from_other_errors_however_deep_it_lies() {
    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Box<dyn std::error::Error + Send + Sync>);
    let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
    let deep = Outer(Box::new(Outer(Box::new(std::io::Error::other(Outer(Box::new(full)))))));
    assert!(StoreError::disk("a", "writing", deep).is_full());
    let quota = Outer(Box::new(std::io::Error::from_raw_os_error(libc::EDQUOT)));
    assert!(StoreError::disk("a", "writing", quota).is_full());
    let other = Outer(Box::new(std::io::Error::from_raw_os_error(libc::EIO)));
    assert!(!StoreError::disk("a", "writing", other).is_full());
}

#[tokio::test]
async fn staging_files_of_a_dead_process_are_removed_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let objects = LocalObjects::open(root.path(), ByteSize(0)).await.unwrap();
    objects.put_durable("vms/a/packs/kept", Bytes::from_static(b"kept")).await.unwrap();
    std::fs::write(root.path().join("vms/a/packs/kept#1"), "left over").unwrap();
    std::fs::write(root.path().join("vms/a/packs/gone#12"), "left over").unwrap();
    assert_eq!(objects.sweep_partials().await.unwrap(), 2);
    assert_eq!(std::fs::read_dir(root.path().join("vms/a/packs")).unwrap().count(), 1);
}

/// The simulated disk's half of the promises: what a power cut keeps.
#[tokio::test]
async fn a_power_cut_keeps_what_was_acknowledged_and_tears_only_what_was_not() {
    for (seed, cut) in (0..40).flat_map(|seed| (1..=5).map(move |cut| (seed, cut))) {
        let sim = SimDisk::new(seed);
        sim.cut_at(cut);
        let mut told = Vec::new();
        for path in ["vms/a/one", "vms/a/two"] {
            if sim.put_durable(path, Bytes::from_static(b"whole")).await.is_ok() {
                told.push(path.to_owned());
            }
        }
        if sim.is_powered() && sim.delete("vms/a/one").await.is_ok() {
            told.retain(|path| path != "vms/a/one");
        }
        let after = sim.reopen();
        assert!(sim.get("vms/a/one", 9).await.is_err(), "a dead process reaches no disk");
        for path in &told {
            if cut == 5 && path == "vms/a/one" {
                continue;
            }
            assert_eq!(after.get(path, 9).await.unwrap(), "whole", "seed {seed}, cut {cut}");
        }
        for path in after.paths() {
            assert_eq!(after.get(&path, 9).await.unwrap(), "whole", "seed {seed}, cut {cut}");
        }
    }
    assert_eq!(paths::VMS, "vms");
}
