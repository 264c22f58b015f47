//! The decisions of a cut, step by step, and under any words in any order.

use super::*;
use proptest::prelude::*;

const PATIENCE: Patience = Patience { ready_ms: 1000, freeze_ms: 500, stop_ms: 100, end_ms: 10_000 };

fn vm(no: u8) -> VmId {
    VmId::from_bytes([no; 16])
}

fn point(no: u8) -> PointId {
    PointId::from_bytes([no; 16])
}

fn stopped() -> Part {
    Part::Stopped { at: UnixMs(0), ran: true }
}

fn cut_of(no: u8) -> Part {
    Part::Cut { point: point(no), together: true, pause_us: 5 }
}

#[test]
fn a_cut_is_whole_if_all_stood_and_all_have_a_point() {
    let (mut cut, orders) = Cut::begin(CutKind::Group, [vm(1), vm(2)], PATIENCE, UnixMs(0));
    assert_eq!(orders.len(), 2);
    assert!(cut.heard(vm(1), Part::Ready, UnixMs(10), 0).is_empty());
    let stop = CutOrder::Stop { at: UnixMs(20) };
    assert_eq!(cut.heard(vm(2), Part::Ready, UnixMs(20), 0), [(vm(1), stop), (vm(2), stop)]);
    assert!(cut.heard(vm(2), stopped(), UnixMs(21), 21_000).is_empty());
    let go = CutOrder::Go { together: true };
    assert_eq!(cut.heard(vm(1), stopped(), UnixMs(24), 24_500), [(vm(1), go), (vm(2), go)]);
    cut.heard(vm(1), cut_of(1), UnixMs(30), 0);
    assert_eq!(cut.outcome(), None);
    cut.heard(vm(2), cut_of(2), UnixMs(31), 0);
    let points = BTreeMap::from([(vm(1), (point(1), 5)), (vm(2), (point(2), 5))]);
    assert_eq!(cut.outcome(), Some(Outcome::Whole { at: UnixMs(20), skew_us: 3500, points }));
}

#[test]
fn members_of_a_group_do_not_wait_for_one_that_is_late_and_get_points_of_their_own() {
    let (mut cut, _) = Cut::begin(CutKind::Group, [vm(1), vm(2)], PATIENCE, UnixMs(0));
    cut.heard(vm(1), Part::Ready, UnixMs(10), 0);
    assert!(cut.tick(UnixMs(999)).is_empty());
    let orders = cut.tick(UnixMs(1000));
    assert!(orders.contains(&(vm(1), CutOrder::Go { together: false })), "{orders:?}");
    cut.heard(vm(1), Part::Cut { point: point(1), together: false, pause_us: 1 }, UnixMs(1010), 0);
    let Some(Outcome::Partial { why }) = cut.outcome() else { panic!("{cut:?}") };
    assert!(why[&vm(2)].contains("not ready"), "{why:?}");
}

#[test]
fn a_final_cut_is_called_off_for_all_as_soon_as_one_is_out() {
    for after_stop in [false, true] {
        let (mut cut, _) = Cut::begin(CutKind::Final, [vm(1), vm(2)], PATIENCE, UnixMs(0));
        for no in [1, 2] {
            cut.heard(vm(no), Part::Ready, UnixMs(10), 0);
        }
        if after_stop {
            cut.heard(vm(1), stopped(), UnixMs(11), 0);
            cut.heard(vm(2), stopped(), UnixMs(11), 0);
            cut.heard(vm(1), Part::Held { point: point(1) }, UnixMs(12), 0);
        }
        let orders = cut.heard(vm(2), Part::Out { why: "no".into() }, UnixMs(13), 0);
        assert_eq!(orders, [(vm(1), CutOrder::CallOff), (vm(2), CutOrder::CallOff)]);
        assert!(matches!(cut.outcome(), Some(Outcome::Partial { .. })));
    }
}

#[test]
fn a_vm_alone_in_its_group_stands_for_no_round_trip() {
    let (mut cut, _) = Cut::begin(CutKind::Group, [vm(1)], PATIENCE, UnixMs(0));
    let orders = cut.heard(vm(1), Part::Ready, UnixMs(10), 0);
    let at = UnixMs(10);
    assert_eq!(orders, [(vm(1), CutOrder::Stop { at }), (vm(1), CutOrder::Go { together: true })]);
    cut.heard(vm(1), stopped(), UnixMs(11), 0);
    cut.heard(vm(1), cut_of(1), UnixMs(12), 0);
    assert!(matches!(cut.outcome(), Some(Outcome::Whole { .. })));
}

#[test]
fn file_systems_are_frozen_when_all_are_ready_and_nobody_stops_before_they_are() {
    let (cut, _) = Cut::begin(CutKind::Group, [vm(1), vm(2), vm(3)], PATIENCE, UnixMs(0));
    let mut cut = cut.freezing([vm(1), vm(2)]);
    assert!(cut.heard(vm(1), Part::Ready, UnixMs(10), 0).is_empty());
    assert!(cut.heard(vm(1), Part::Frozen, UnixMs(10), 0).is_empty(), "nobody has told it to");
    assert!(cut.heard(vm(2), Part::Ready, UnixMs(10), 0).is_empty());
    let orders = cut.heard(vm(3), Part::Ready, UnixMs(11), 0);
    assert_eq!(orders, [(vm(1), CutOrder::Freeze), (vm(2), CutOrder::Freeze)]);
    assert!(cut.heard(vm(2), Part::Frozen, UnixMs(12), 0).is_empty());
    let stop = CutOrder::Stop { at: UnixMs(13) };
    let orders = cut.heard(vm(1), Part::Frozen, UnixMs(13), 0);
    assert_eq!(orders, [(vm(1), stop), (vm(2), stop), (vm(3), stop)]);
}

#[test]
fn who_does_not_freeze_in_time_is_not_waited_for() {
    let (cut, _) = Cut::begin(CutKind::Group, [vm(1), vm(2)], PATIENCE, UnixMs(0));
    let mut cut = cut.freezing([vm(1)]);
    cut.heard(vm(1), Part::Ready, UnixMs(10), 0);
    cut.heard(vm(2), Part::Ready, UnixMs(10), 0);
    assert!(cut.tick(UnixMs(509)).is_empty());
    let orders = cut.tick(UnixMs(510));
    assert!(orders.contains(&(vm(2), CutOrder::Go { together: false })), "{orders:?}");
}

#[test]
fn one_alone_stays_frozen_for_no_round_trip() {
    let (cut, _) = Cut::begin(CutKind::Group, [vm(1)], PATIENCE, UnixMs(0));
    let orders = cut.freezing([vm(1)]).heard(vm(1), Part::Ready, UnixMs(10), 0);
    let orders: Vec<CutOrder> = orders.into_iter().map(|(_, order)| order).collect();
    let stop = CutOrder::Stop { at: UnixMs(10) };
    assert_eq!(orders, [CutOrder::Freeze, stop, CutOrder::Go { together: true }]);
}

#[test]
fn a_final_cut_is_whole_once_all_are_held() {
    let (mut cut, _) = Cut::begin(CutKind::Final, [vm(1)], PATIENCE, UnixMs(0));
    cut.heard(vm(1), Part::Ready, UnixMs(10), 0);
    cut.heard(vm(1), stopped(), UnixMs(11), 0);
    cut.heard(vm(1), cut_of(1), UnixMs(12), 0);
    assert_eq!(cut.outcome(), None, "it is not durable yet");
    cut.heard(vm(1), Part::Held { point: point(1) }, UnixMs(13), 0);
    assert!(matches!(cut.outcome(), Some(Outcome::Whole { .. })));
}

fn parts() -> impl Strategy<Value = Part> {
    prop_oneof![
        Just(Part::Ready),
        Just(Part::Frozen),
        Just(stopped()),
        (any::<u8>(), any::<bool>()).prop_map(|(no, together)| Part::Cut {
            point: point(no),
            together,
            pause_us: 1
        }),
        any::<u8>().prop_map(|no| Part::Held { point: point(no) }),
        Just(Part::Out { why: "out".into() }),
        Just(Part::HoldEnded { gone: false }),
    ]
}

proptest! {
    /// Whatever agents say in whatever order, a cut ends within its bounds, and is whole only if `Go` for all was said after
    /// all had said that they stand.
    #[test]
    fn any_cut_ends_and_is_whole_only_if_all_stood_at_once(
        words in proptest::collection::vec((0u8..3, parts(), 0u64..300), 0..40),
        last in any::<bool>(),
        freezing in proptest::collection::vec(0u8..4, 0..3),
    ) {
        let kind = if last { CutKind::Final } else { CutKind::Group };
        let (cut, _) = Cut::begin(kind, [vm(0), vm(1), vm(2)], PATIENCE, UnixMs(0));
        let mut cut = cut.freezing(freezing.into_iter().map(vm));
        let (mut now, mut stood, mut went) = (0, [false; 3], None);
        for (no, part, passed) in words {
            now += passed;
            let mut orders = cut.tick(UnixMs(now));
            if went.is_none() && matches!(part, Part::Stopped { .. } | Part::Cut { .. } | Part::Held { .. }) {
                stood[usize::from(no)] = true;
            }
            orders.extend(cut.heard(vm(no), part, UnixMs(now), now * 1000));
            if orders.iter().any(|(_, order)| *order == CutOrder::Go { together: true }) {
                went.get_or_insert(stood);
            }
        }
        if let Some(Outcome::Whole { .. }) = cut.outcome() {
            prop_assert_eq!(went, Some([true; 3]));
        }
        for _ in 0..5 {
            now += PATIENCE.ready_ms + PATIENCE.freeze_ms + PATIENCE.stop_ms + PATIENCE.end_ms;
            cut.tick(UnixMs(now));
        }
        prop_assert!(cut.outcome().is_some(), "{:?}", cut);
    }
}
