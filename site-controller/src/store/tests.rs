use super::{
    sim::SimDisk,
    testing::{Cut, Guest, VM, commit, commit_as, open, restore},
    *,
};
use lifeboat::{
    id::PointId,
    units::{ByteSize, Generation, Seq},
};
use std::sync::Arc;

fn disk(sim: &SimDisk) -> Arc<dyn Objects> {
    Arc::new(sim.clone())
}

/// Commits a full point and then deltas, each over the one before.
async fn history(store: &Store, guest: &mut Guest, points: usize) -> Vec<(Seq, Cut)> {
    let (mut parent, mut done) = (store.latest(guest.vm).await.map(|head| head.point), Vec::new());
    for _ in 0..points {
        let cut = guest.cut(parent);
        let committed = commit(store, guest, &cut).await.unwrap();
        parent = Some(cut.point);
        done.push((committed.seq, cut));
    }
    done
}

async fn assert_restores(objects: &Arc<dyn Objects>, history: &[(Seq, Cut)]) {
    for (seq, cut) in history {
        let found = restore(objects, VM, *seq).await.unwrap();
        assert!(found == cut.content, "point {seq} came back with other bytes");
    }
}

#[tokio::test]
async fn committed_points_come_back_byte_for_byte_from_a_real_directory_that_was_reopened() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a/b/store");
    let mut guest = Guest::new(1);
    let done = {
        let local = Arc::new(LocalObjects::open(&path, ByteSize(0)).await.unwrap());
        let (store, report) = open(local.clone()).await.unwrap();
        assert_eq!(report, ReopenReport::default());
        let refused = LocalObjects::open(&path, ByteSize(0)).await;
        assert!(matches!(refused, Err(StoreError::InUse { .. })));
        history(&store, &mut guest, 6).await
    };
    let local: Arc<dyn Objects> = Arc::new(LocalObjects::open(&path, ByteSize(0)).await.unwrap());
    let (store, report) = open(local.clone()).await.unwrap();
    assert_eq!((report.points, report.damaged_points, report.findings.len()), (6, 0, 0));
    assert_restores(&local, &done).await;
    let more = history(&store, &mut guest, 2).await;
    assert_eq!(more[1].0, Seq(8));
    assert_restores(&local, &more).await;
}
