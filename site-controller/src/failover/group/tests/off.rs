//! Members that were off: they are there at the site, and off; nobody waits for them, and they hold nothing back.

use super::*;

#[tokio::test]
async fn members_that_were_off_are_waited_for_by_nobody_and_do_not_keep_a_failover_from_being_called_off() {
    let (dir, world) = (tempfile::tempdir().unwrap(), world());
    let mut group = shop();
    let steps = group.spec.runbook.vm.get_mut("db").unwrap();
    steps.wait_for = vec!["console:login".into()];
    {
        let mut tables = world.0.lock().unwrap();
        tables.off = BTreeSet::from([vm(2), vm(3)]);
        tables.start_fails = BTreeSet::from([vm(1)]);
    }
    // Nothing has run when the only one that ran does not start.
    let groups = controller(&world, dir.path());
    let ended = groups.planned(group.clone(), CUT, &Watcher::nobody()).await;
    assert!(matches!(ended, Err(GroupError::CalledOff { .. })), "{ended:?}");
    assert!(world.0.lock().unwrap().defined.is_empty(), "nothing of them is left here");

    world.0.lock().unwrap().start_fails.clear();
    let report = groups.planned(group.clone(), CUT, &Watcher::nobody()).await.unwrap();
    let left: Vec<bool> = report.members.iter().map(|member| member.left_off).collect();
    assert_eq!((left, report.warnings.len()), (vec![false, true, true], 0));
    {
        let tables = world.0.lock().unwrap();
        assert_eq!(tables.running, BTreeSet::from([vm(1)]));
        assert!(tables.sources.values().all(|source| *source == Source::Off));
    }
    // Of a group that was off altogether it is known as well that it is here.
    world.0.lock().unwrap().has_run.clear();
    let again = groups.planned(group, CUT, &Watcher::nobody()).await;
    assert!(matches!(again, Err(GroupError::DoneBefore(_))), "{again:?}");
}
