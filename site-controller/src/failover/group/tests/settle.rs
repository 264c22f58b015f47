//! Sources that are told later.

use super::*;

#[tokio::test]
async fn a_source_that_is_not_reached_stands_until_it_is_and_is_told_then() {
    let dir = tempfile::tempdir().unwrap();
    let world = world();
    world.0.lock().unwrap().unreached = true;
    let groups = controller(&world, dir.path());
    let report = groups.planned(shop(), CUT, &Watcher::nobody()).await.unwrap();
    assert_eq!(report.sources_left.len(), 3);
    let again = groups.planned(shop(), CUT, &Watcher::nobody()).await;
    assert!(matches!(again, Err(GroupError::DoneBefore(_))), "{again:?}");
    world.0.lock().unwrap().unreached = false;
    groups.take_up(shop().id, &Watcher::nobody()).await.unwrap();
    assert!(one_site(&world));
}

/// A planned failover that can't tell its sources yet is asked for again and again, by somebody without patience.
#[tokio::test(start_paused = true)]
async fn however_often_a_failover_is_asked_for_one_task_tells_its_sources() {
    let (dir, world) = (tempfile::tempdir().unwrap(), world());
    world.0.lock().unwrap().unreached = true;
    let groups = controller(&world, dir.path());
    groups.planned(shop(), CUT, &Watcher::nobody()).await.unwrap();
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            tokio::spawn({
                let groups = groups.clone();
                async move { groups.settle(shop().id).await }
            })
        })
        .collect();
    let told = |world: &World| std::mem::take(&mut world.0.lock().unwrap().told);
    told(&world);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let tries = told(&world) / 3;
    assert!((20..=40).contains(&tries), "each source was to be told {tries} times in a minute");
    world.0.lock().unwrap().unreached = false;
    for task in tasks {
        task.await.unwrap();
    }
    assert!(one_site(&world));
    assert!(groups.settling.lock().unwrap().is_empty(), "what is to be settled from now on is");
}
