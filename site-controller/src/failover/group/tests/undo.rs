//! Undoing a group's failover: all members or none, in the same world.

use super::*;

#[tokio::test]
async fn an_undo_takes_every_member_to_the_other_point_once_wherever_the_controller_dies() {
    let window = Duration::from_secs(60);
    let older = || WholePoint { cut: CutId::from_bytes([8; 16]), cut_at: UnixMs(1), ..point(&shop(), CUT) };
    let mut calls = 100;
    for at in 1.. {
        if at > calls {
            break;
        }
        let dir = tempfile::tempdir().unwrap();
        let world = world();
        let groups = controller(&world, dir.path());
        groups.planned(shop(), CUT, &Watcher::nobody()).await.unwrap();
        let before = {
            let mut tables = world.0.lock().unwrap();
            tables.dies_at = Some((tables.calls + at, at % 2 == 0));
            tables.calls
        };
        let task =
            tokio::spawn(async move { groups.undo(shop().id, &older(), window, &Watcher::nobody()).await });
        let first = task.await;
        if first.is_ok() {
            calls = world.0.lock().unwrap_or_else(PoisonError::into_inner).calls - before;
        }
        world.0.lock().unwrap_or_else(PoisonError::into_inner).dies_at = None;
        // Typed again, or taken up by the next start: whatever comes first.
        let groups = controller(&world, dir.path());
        let _ = groups.take_up(shop().id, &Watcher::nobody()).await;
        let _ = groups.undo(shop().id, &older(), window, &Watcher::nobody()).await;
        assert!(one_site(&world), "died at call {at}");
        let record = groups.journal.load_group(shop().id).unwrap().unwrap();
        assert_eq!(
            (record.cut_at, record.rewinds, record.is_over()),
            (Some(UnixMs(1)), None, true),
            "call {at}"
        );
        let tables = world.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(tables.rewound.values().all(|times| *times >= 1) && tables.rewound.len() == 3, "call {at}");
    }
    assert!(calls > 8, "{calls}");
}

#[tokio::test]
async fn an_undo_to_a_point_that_is_damaged_for_one_member_stops_none_and_one_that_got_stuck_takes_another() {
    let window = Duration::from_secs(60);
    let to = |at| WholePoint { cut: CutId::from_bytes([8; 16]), cut_at: UnixMs(at), ..point(&shop(), CUT) };
    let dir = tempfile::tempdir().unwrap();
    let world = world();
    let groups = controller(&world, dir.path());
    groups.planned(shop(), CUT, &Watcher::nobody()).await.unwrap();
    let before = groups.journal.load_group(shop().id).unwrap();
    world.0.lock().unwrap().is_damaged = BTreeSet::from([vm(3)]);
    let refused = groups.undo(shop().id, &to(1), window, &Watcher::nobody()).await.unwrap_err();
    assert!(refused.to_string().contains("nothing was changed"), "{refused}");
    assert_eq!(groups.journal.load_group(shop().id).unwrap(), before);
    {
        let mut tables = world.0.lock().unwrap();
        assert!(tables.rewound.is_empty() && tables.running.len() == 3);
        tables.is_damaged.clear();
        tables.start_fails = BTreeSet::from([vm(2)]);
    }
    let stuck = groups.undo(shop().id, &to(1), window, &Watcher::nobody()).await;
    assert!(matches!(stuck, Err(GroupError::Incomplete { .. })), "{stuck:?}");
    world.0.lock().unwrap().start_fails.clear();
    groups.undo(shop().id, &to(2), window, &Watcher::nobody()).await.unwrap();
    assert!(one_site(&world));
    let record = groups.journal.load_group(shop().id).unwrap().unwrap();
    assert_eq!((record.cut_at, record.is_over()), (Some(UnixMs(2)), true));
}
