//! Which point a failover takes that is asked for again.

use super::*;

fn newest(point: &WholePoint) -> Chosen<'_> {
    Chosen { point, newest: true }
}

/// What a controller leaves that dies between the commit and the first fence.
fn committed(groups: &Groups, world: &World, chosen: Chosen<'_>) {
    let mut record = GroupRecord::new(Kind::Emergency, shop(), UnixMs(1));
    (record.newest, record.cut_at, record.phase) =
        (chosen.newest, Some(chosen.point.cut_at), Phase::Committed);
    for (part, (_, point)) in record.parts.iter_mut().zip(&chosen.point.members) {
        part.point = Some(*point);
        world.0.lock().unwrap().prepared.insert(part.vm, *point);
    }
    groups.journal.save_group(&record).unwrap();
}

/// The controller dies at a call; then there is a newer point, and the newest is asked for again, as the API does it.
#[tokio::test]
async fn a_failover_takes_the_newest_point_as_long_as_no_source_is_fenced_and_its_own_from_then_on() {
    let old = point(&shop(), CUT);
    let members = old.members.iter().map(|(vm, _)| (*vm, PointId::from_bytes([8; 16]))).collect();
    let new = WholePoint { cut: CutId::from_bytes([4; 16]), cut_at: UnixMs(9), members };
    let (mut took_new, mut took_old) = (0, 0);
    // Before each call's effect, and after it.
    for turn in 2.. {
        let (at, after) = (turn / 2, turn % 2 == 1);
        let (dir, world) = (tempfile::tempdir().unwrap(), world());
        {
            let mut tables = world.0.lock().unwrap();
            tables.sources.values_mut().for_each(|source| *source = Source::Off);
            tables.dies_at = Some((at, after));
        }
        let groups = controller(&world, dir.path());
        let first = old.clone();
        let nobody = Watcher::nobody();
        let died =
            tokio::spawn(async move { groups.emergency(shop(), newest(&first), false, &nobody).await });
        if died.await.is_ok() {
            break;
        }
        let fenced = {
            let tables = world.0.lock().unwrap_or_else(PoisonError::into_inner);
            tables.generations.values().any(|generation| *generation > Generation(1))
        };
        world.0.clear_poison();
        let groups = controller(&world, dir.path());
        let begun = groups.goes_on_with(shop().id, true).await.unwrap();
        assert_eq!(begun, fenced.then_some(UnixMs(5)).filter(|_| begun.is_some()), "call {at}");
        let chosen = if begun.is_some() { &old } else { &new };
        match groups.emergency(shop(), newest(chosen), false, &Watcher::nobody()).await {
            Ok(report) => assert_eq!(report.cut_at, Some(UnixMs(if fenced { 5 } else { 9 })), "call {at}"),
            // It had come to its end.
            Err(GroupError::DoneBefore(_)) => assert!(fenced),
            Err(error) => panic!("call {at}: {error}"),
        }
        let tables = world.0.lock().unwrap();
        let taken = if fenced { &old } else { &new };
        assert_eq!(tables.prepared, taken.members.iter().copied().collect(), "call {at}");
        if fenced { took_old += 1 } else { took_new += 1 }
    }
    assert!(took_new > 5 && took_old > 5, "{took_new} {took_old}");
}

/// Another one by name, where no source is fenced.
#[tokio::test]
async fn a_failover_that_fenced_nobody_is_taken_to_another_point_by_name_and_not_by_chance() {
    let old = point(&shop(), CUT);
    let other = WholePoint { cut_at: UnixMs(3), ..old.clone() };
    for (first, again, takes) in [
        (named(&old), named(&other), 3),
        (newest(&old), named(&other), 3),
        (newest(&old), newest(&other), 5),
        (named(&old), newest(&WholePoint { cut_at: UnixMs(9), ..old.clone() }), 5),
    ] {
        let (dir, world) = (tempfile::tempdir().unwrap(), world());
        world.0.lock().unwrap().sources.values_mut().for_each(|source| *source = Source::Off);
        let groups = controller(&world, dir.path());
        committed(&groups, &world, first);
        let report = groups.emergency(shop(), again, false, &Watcher::nobody()).await.unwrap();
        assert_eq!(report.cut_at, Some(UnixMs(takes)));
    }
}

/// The newer point can't be restored, and is refused: nothing is left of either try.
#[tokio::test]
async fn a_newer_point_that_can_not_be_taken_leaves_nothing_begun() {
    let old = point(&shop(), CUT);
    let new = WholePoint { cut_at: UnixMs(9), ..old.clone() };
    let (dir, world) = (tempfile::tempdir().unwrap(), world());
    let groups = controller(&world, dir.path());
    committed(&groups, &world, newest(&old));
    world.0.lock().unwrap().prepare_fails = BTreeSet::from([vm(3)]);
    groups.emergency(shop(), newest(&new), false, &Watcher::nobody()).await.unwrap_err();
    assert_eq!(groups.journal.load_group(shop().id).unwrap(), None);
    assert!(world.0.lock().unwrap().prepared.is_empty());
}

/// It would lose what came after the point.
#[tokio::test]
async fn a_planned_failover_does_not_go_on_with_an_emergency_that_was_broken_off() {
    let old = point(&shop(), CUT);
    let (dir, world) = (tempfile::tempdir().unwrap(), world());
    let groups = controller(&world, dir.path());
    committed(&groups, &world, newest(&old));
    let refused = groups.planned(shop(), CUT, &Watcher::nobody()).await;
    assert!(matches!(refused, Err(GroupError::GivenUp)), "{refused:?}");
    let tables = world.0.lock().unwrap();
    assert!(tables.sources.values().all(|source| *source == Source::Runs) && tables.running.is_empty());
}
