//! Waiting for members to be up, and what comes of it where they are not.

use super::*;

#[tokio::test]
async fn an_emergency_asks_no_source_and_a_wait_that_runs_out_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let world = world();
    let mut group = shop();
    for source in world.0.lock().unwrap().sources.values_mut() {
        *source = Source::Off;
    }
    let steps = group.spec.runbook.vm.get_mut("db").unwrap();
    steps.wait_for = vec!["agent".into(), "console:login".into()];
    steps.wait_at_most = "10ms".into();
    let report = controller(&world, dir.path())
        .emergency(group.clone(), named(&point(&group, CUT)), false, &Watcher::nobody())
        .await
        .unwrap();
    assert_eq!((report.warnings.len(), report.rpo_ms), (1, 5), "{report:?}");
    assert_eq!(world.0.lock().unwrap().starts, [vm(3), vm(2), vm(1)]);
    let mut older = point(&group, CUT);
    older.members.pop();
    let other = tempfile::tempdir().unwrap();
    let refused = controller(&world, other.path())
        .emergency(group, named(&older), false, &Watcher::nobody())
        .await
        .unwrap_err();
    assert!(matches!(refused, GroupError::NoPoint(_)), "{refused}");
}

fn waits_for(group: &mut Group, wait: &str) {
    let steps = group.spec.runbook.vm.get_mut("db").unwrap();
    (steps.wait_for, steps.wait_at_most, steps.boot_if_not_up) = (vec![wait.into()], "10ms".into(), true);
}

/// The controller dies at each call, before and after, and another one goes on.
#[tokio::test]
async fn a_member_that_is_not_up_in_time_is_booted_once_wherever_the_controller_dies_and_waited_for_again() {
    let mut died = 0;
    for (at, after) in (1..).flat_map(|at| [(at, false), (at, true)]) {
        let (dir, world) = (tempfile::tempdir().unwrap(), world());
        let mut group = shop();
        waits_for(&mut group, "console:login");
        {
            let mut tables = world.0.lock().unwrap();
            tables.sources.values_mut().for_each(|source| *source = Source::Off);
            tables.dies_at = Some((at, after));
        }
        let fail_over = || {
            let (groups, group) = (controller(&world, dir.path()), group.clone());
            tokio::spawn(async move {
                let whole = point(&group, CUT);
                groups.emergency(group, named(&whole), false, &Watcher::nobody()).await
            })
        };
        let first = fail_over().await;
        let has_died = first.is_err();
        let report = match first {
            Ok(done) => done,
            Err(_) => {
                world.0.clear_poison();
                fail_over().await.unwrap()
            }
        };
        match report {
            Ok(report) => assert_eq!(report.warnings, Vec::<String>::new(), "{at} {after}"),
            // It died when all was done.
            Err(error) => assert!(matches!(error, GroupError::DoneBefore(_)), "{at} {after}: {error}"),
        }
        let tables = world.0.lock().unwrap();
        assert_eq!(tables.booted, BTreeSet::from([vm(2)]), "{at} {after}");
        assert_eq!(tables.running.len(), 3, "{at} {after}");
        drop(tables);
        if !has_died {
            break;
        }
        died += 1;
    }
    assert!(died > 20, "{died}");
}

#[tokio::test]
async fn only_one_that_went_on_with_its_memory_is_booted_for_being_late() {
    let (dir, world) = (tempfile::tempdir().unwrap(), world());
    let mut group = shop();
    waits_for(&mut group, "agent");
    world.0.lock().unwrap().sources.values_mut().for_each(|source| *source = Source::Off);
    let whole = point(&group, CUT);
    let groups = controller(&world, dir.path());
    groups.emergency(group, named(&whole), false, &Watcher::nobody()).await.unwrap();
    assert!(world.0.lock().unwrap().booted.is_empty(), "it was up");
}
