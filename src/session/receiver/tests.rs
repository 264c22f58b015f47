//! The site's half of the conversation: committed once and whole, and only for the current generation (I-4).

use super::*;
use crate::format::manifest::{Consistency, Image, ImageKind, PointStats};

const VM: VmId = VmId::from_bytes([1; 16]);
const POINT: PointId = PointId::from_bytes([2; 16]);
const FRESH: Held = Held { generation: Generation(1), latest: None, raised_since_latest: false };

fn meta() -> Box<PointMeta> {
    let image = Image { no: 0, kind: ImageKind::Disk, name: "vda".into(), bytes: 1 << 20, full: true };
    Box::new(PointMeta {
        cut_at: UnixMs(5),
        images: vec![image],
        consistency: Consistency::Crash,
        cut: None,
        was_running: true,
        stats: PointStats::default(),
    })
}

fn open() -> Receiver {
    let mut receiver = Receiver::new(VM);
    let todo = receiver.begin(FRESH, Generation(1), POINT, None);
    assert_eq!(todo, [Do::Open { generation: Generation(1), point: POINT, parent: None }]);
    receiver.opened(Generation(1), POINT, None);
    receiver
}

fn commits(todo: &[Do]) -> bool {
    todo.iter().any(|action| matches!(action, Do::Commit { .. }))
}

#[test]
fn a_point_is_committed_once_and_only_when_all_its_frames_are_there_in_whatever_order() {
    let mut receiver = open();
    assert!(!commits(&receiver.end(POINT, 3, meta())));
    for seq in [2, 0] {
        assert_eq!(receiver.frame(POINT, seq), [Do::Append { seq }]);
        assert!(!commits(&receiver.appended(POINT, seq)));
    }
    assert!(!matches!(receiver.frame(POINT, 2).as_slice(), [Do::Append { .. }]), "a repeat is stored once");
    assert!(commits(&receiver.appended(POINT, 1)));
    assert!(receiver.end(POINT, 3, meta()).is_empty(), "a repeated end commits nothing again");
    let told = receiver.committed(POINT, Seq(1), UnixMs(9), Digest::of(b"m"));
    assert!(matches!(told.as_slice(), [Do::Reply(SiteMessage::Durable { point: POINT, .. })]));
}

#[test]
fn an_older_generation_is_refused_at_every_door() {
    let held = Held { generation: Generation(2), latest: None, raised_since_latest: true };
    let mut receiver = open();
    assert!(matches!(receiver.watch(held, Some(Generation(1))), SiteMessage::VmRefused { .. }));
    assert!(matches!(receiver.watch(held, None), SiteMessage::VmRefused { .. }));
    let ahead = receiver.watch(FRESH, Some(Generation(9)));
    assert!(
        matches!(ahead, SiteMessage::VmRefused { refusal: Refusal::Invalid { .. }, .. }),
        "no failover was here"
    );
    let todo = receiver.begin(held, Generation(1), POINT, None);
    assert!(matches!(
        todo.as_slice(),
        [
            Do::Discard { point: POINT },
            Do::Reply(SiteMessage::PointRefused { refusal: Refusal::Fenced { .. }, .. })
        ]
    ));
    let mut receiver = open();
    assert!(matches!(receiver.fence(Generation(2)).as_slice(), [Do::Discard { point: POINT }, Do::Reply(_)]));
}

#[test]
fn a_point_taken_up_again_is_told_what_is_there_and_a_new_one_replaces_a_left_over() {
    let mut receiver = open();
    receiver.appended(POINT, 0);
    receiver.appended(POINT, 2);
    let Some(Do::Reply(SiteMessage::Opened { have, .. })) =
        receiver.begin(FRESH, Generation(1), POINT, None).pop()
    else {
        panic!("not taken up")
    };
    assert_eq!(have, [FrameRange { first: 0, end: 1 }, FrameRange { first: 2, end: 3 }]);
    let other = PointId::from_bytes([3; 16]);
    let todo = receiver.begin(FRESH, Generation(1), other, None);
    assert!(matches!(todo.as_slice(), [Do::Discard { point: POINT }, Do::Open { .. }]));
}

#[test]
fn a_delta_over_a_point_that_is_not_the_newest_is_refused() {
    let mut receiver = Receiver::new(VM);
    let todo = receiver.begin(FRESH, Generation(1), POINT, Some(PointId::from_bytes([7; 16])));
    assert!(matches!(
        todo.as_slice(),
        [Do::Reply(SiteMessage::PointRefused { refusal: Refusal::WrongParent { latest: None }, .. })]
    ));
}

#[test]
fn more_frames_than_announced_are_refused() {
    let mut receiver = open();
    receiver.appended(POINT, 5);
    assert!(matches!(
        receiver.end(POINT, 2, meta()).as_slice(),
        [Do::Discard { point: POINT }, Do::Reply(_)]
    ));
}

const NEXT: PointId = PointId::from_bytes([3; 16]);

/// A receiver with a point open, and one over it that is there, whole, and has ended.
fn overlapping() -> Receiver {
    let mut receiver = open();
    let todo = receiver.begin(FRESH, Generation(1), NEXT, Some(POINT));
    assert!(matches!(todo.as_slice(), [Do::Open { point: NEXT, parent: Some(POINT), .. }]));
    receiver.opened(Generation(1), NEXT, Some(POINT));
    assert!(!commits(&receiver.appended(NEXT, 0)));
    assert!(!commits(&receiver.end(NEXT, 1, meta())), "not before the one that it is over");
    receiver
}

#[test]
fn a_point_over_one_that_is_not_durable_is_committed_after_it() {
    let mut receiver = overlapping();
    receiver.appended(POINT, 0);
    assert!(commits(&receiver.end(POINT, 1, meta())));
    assert!(receiver.is_committing() && receiver.continues(NEXT, Some(POINT)));
    let todo = receiver.committed(POINT, Seq(1), UnixMs(9), Digest::of(b"m"));
    let told = matches!(&todo[0], Do::Reply(SiteMessage::Durable { point: POINT, .. }));
    assert!(told && matches!(&todo[1], Do::Commit { point: NEXT, frames: 1, .. }), "{todo:?}");
}

#[test]
fn a_point_that_is_given_up_takes_those_over_it_along() {
    let both = [Do::Discard { point: POINT }, Do::Discard { point: NEXT }];
    let refusal = Refusal::UnknownPoint;
    assert_eq!(overlapping().failed(POINT, refusal)[..2], both);
    assert_eq!(overlapping().abort(POINT), both);
    assert_eq!(overlapping().abort(NEXT), both[1..]);
    assert_eq!(overlapping().fence(Generation(2))[..2], both);
    let other = PointId::from_bytes([4; 16]);
    assert_eq!(overlapping().begin(FRESH, Generation(1), other, None)[..2], both, "what a dead agent left");
    // Another one over the same point: an agent that could not finish the first.
    let todo = overlapping().begin(FRESH, Generation(1), other, Some(POINT));
    assert!(matches!(todo.as_slice(), [Do::Discard { point: NEXT }, Do::Open { parent: Some(POINT), .. }]));
}

#[test]
fn no_more_than_so_many_points_are_under_way() {
    let mut receiver = open();
    let id = |no: usize| PointId::from_bytes([no as u8 + 10; 16]);
    let mut parent = POINT;
    for no in 1..POINTS_MAX {
        receiver.begin(FRESH, Generation(1), id(no), Some(parent));
        receiver.opened(Generation(1), id(no), Some(parent));
        parent = id(no);
    }
    let todo = receiver.begin(FRESH, Generation(1), id(99), Some(parent));
    let invalid = |refusal: &Refusal| matches!(refusal, Refusal::Invalid { .. });
    assert!(matches!(&todo[..], [Do::Reply(SiteMessage::PointRefused { refusal, .. })] if invalid(refusal)));
}
