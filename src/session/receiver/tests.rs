//! The site's half of the conversation: committed once and whole, and only for the current generation (I-4).

use super::*;
use crate::format::manifest::{Image, ImageKind, PointStats};

const VM: VmId = VmId::from_bytes([1; 16]);
const POINT: PointId = PointId::from_bytes([2; 16]);
const FRESH: Held = Held { generation: Generation(1), latest: None, raised_since_latest: false };

fn meta() -> Box<PointMeta> {
    let image = Image { no: 0, kind: ImageKind::Disk, name: "vda".into(), bytes: 1 << 20, full: true };
    Box::new(PointMeta {
        cut_at: UnixMs(5),
        images: vec![image],
        has_memory: false,
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
        assert!(!commits(&receiver.appended(seq)));
    }
    assert!(!matches!(receiver.frame(POINT, 2).as_slice(), [Do::Append { .. }]), "a repeat is stored once");
    assert!(commits(&receiver.appended(1)));
    assert!(receiver.end(POINT, 3, meta()).is_empty(), "a repeated end commits nothing again");
    let told = receiver.committed(Seq(1), UnixMs(9), Digest::of(b"m"));
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
        [Do::Discard, Do::Reply(SiteMessage::PointRefused { refusal: Refusal::Fenced { .. }, .. })]
    ));
    let mut receiver = open();
    assert!(matches!(receiver.fence(Generation(2)).as_slice(), [Do::Discard, Do::Reply(_)]));
}

#[test]
fn a_point_taken_up_again_is_told_what_is_there_and_a_new_one_replaces_a_left_over() {
    let mut receiver = open();
    receiver.appended(0);
    receiver.appended(2);
    let Some(Do::Reply(SiteMessage::Opened { have, .. })) =
        receiver.begin(FRESH, Generation(1), POINT, None).pop()
    else {
        panic!("not taken up")
    };
    assert_eq!(have, [FrameRange { first: 0, end: 1 }, FrameRange { first: 2, end: 3 }]);
    let other = PointId::from_bytes([3; 16]);
    let todo = receiver.begin(FRESH, Generation(1), other, None);
    assert!(matches!(todo.as_slice(), [Do::Discard, Do::Open { .. }]));
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
    receiver.appended(5);
    assert!(matches!(receiver.end(POINT, 2, meta()).as_slice(), [Do::Discard, Do::Reply(_)]));
}
