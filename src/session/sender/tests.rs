//! The agent's half of the conversation: nothing lost or repeated over a cut link, one outcome for each point (I-1).

use super::*;
use crate::{
    chunk::digest::Digest,
    format::manifest::{Consistency, Image, ImageKind, PointStats},
    page::{Content, PageGroup, PageRun},
    wire::message::FrameRange,
};

const VM: VmId = VmId::from_bytes([1; 16]);
const POINT: PointId = PointId::from_bytes([2; 16]);

fn frame(seq: u32) -> Frame {
    let group = PageGroup {
        image: 0,
        runs: vec![PageRun::new(u64::from(seq), 1)],
        content: Content::Bytes(vec![9; 4096].into()),
    };
    Frame::seal(seq, &group, 1).unwrap()
}

fn meta() -> PointMeta {
    let image = Image { no: 0, kind: ImageKind::Disk, name: "vda".into(), bytes: 1 << 20, full: true };
    PointMeta {
        cut_at: UnixMs(5),
        images: vec![image],
        consistency: Consistency::Crash,
        cut: None,
        was_running: true,
        stats: PointStats::default(),
    }
}

fn standing(latest: Option<PointId>) -> SiteMessage {
    let latest =
        latest.map(|point| Latest { point, seq: Seq(1), cut_at: UnixMs(1), committed_at: UnixMs(2) });
    SiteMessage::Vm { vm: VM, generation: Generation(1), latest }
}

fn opened(have: &[(u32, u32)]) -> SiteMessage {
    let have = have.iter().map(|(first, end)| FrameRange { first: *first, end: *end }).collect();
    SiteMessage::Opened { vm: VM, point: POINT, have }
}

fn shipped(actions: &[Action]) -> Vec<u32> {
    let seq =
        |action: &Action| if let Action::Ship { frame, .. } = action { Some(frame.head.seq) } else { None };
    actions.iter().filter_map(seq).collect()
}

/// A sender with a link, an open point and `frames` frames on their way.
fn flowing(frames: u32) -> Sender {
    let mut sender = Sender::new(VM, "web".into(), None);
    sender.link_up(1 << 20);
    sender.on_message(standing(None));
    sender.begin(POINT, None);
    sender.on_message(opened(&[]));
    for seq in 0..frames {
        assert_eq!(shipped(&sender.push(frame(seq))), [seq]);
    }
    sender
}

#[test]
fn after_a_cut_link_only_what_the_site_lacks_is_sent_again() {
    let mut sender = flowing(4);
    sender.on_message(SiteMessage::Taken {
        vm: VM,
        point: POINT,
        frames: vec![FrameRange { first: 0, end: 1 }],
    });
    sender.end(meta());
    sender.link_down();
    sender.link_up(1 << 20);
    sender.on_message(standing(None));
    let actions = sender.on_message(opened(&[(0, 1), (2, 3)]));
    assert_eq!(shipped(&actions), [1, 3]);
    assert!(matches!(actions.last(), Some(Action::Tell(AgentMessage::End { frames: 4, .. }))));
}

#[test]
fn a_site_that_forgot_a_taken_frame_loses_the_point() {
    let mut sender = flowing(2);
    sender.on_message(SiteMessage::Taken {
        vm: VM,
        point: POINT,
        frames: vec![FrameRange { first: 0, end: 2 }],
    });
    sender.link_down();
    sender.link_up(1 << 20);
    sender.on_message(standing(None));
    let actions = sender.on_message(opened(&[]));
    assert_eq!(actions, [Action::Ended(Outcome::Lost { point: POINT, why: Refusal::UnknownPoint })]);
}

#[test]
fn a_lost_acknowledgement_is_found_again_at_the_next_contact() {
    let mut sender = flowing(1);
    sender.end(meta());
    sender.link_down();
    sender.link_up(1 << 20);
    let actions = sender.on_message(standing(Some(POINT)));
    assert!(matches!(actions.as_slice(), [Action::Ended(Outcome::Durable { point: POINT, .. })]));
    // Said once: a late `Durable` of the same point means nothing any more.
    let digest = Digest::of(b"");
    let late =
        SiteMessage::Durable { vm: VM, point: POINT, seq: Seq(1), committed_at: UnixMs(3), manifest: digest };
    assert!(sender.on_message(late).is_empty());
}

#[test]
fn a_raised_generation_fences_this_source_for_good() {
    let mut sender = flowing(1);
    sender.link_down();
    sender.link_up(1 << 20);
    let raised = SiteMessage::Vm { vm: VM, generation: Generation(2), latest: None };
    let actions = sender.on_message(raised);
    assert!(matches!(actions.as_slice(), [Action::Ended(Outcome::Lost { why: Refusal::Fenced { .. }, .. })]));
    assert!(matches!(sender.standing(), Standing::Refused(Refusal::Fenced { .. })));
}

#[test]
fn a_hand_over_lets_a_fenced_source_go_on_under_the_newer_generation_and_an_old_one_changes_nothing() {
    let mut sender = flowing(1);
    sender.on_message(SiteMessage::VmRefused { vm: VM, refusal: Refusal::Fenced { current: Generation(2) } });
    assert!(sender.refresh().is_empty(), "it asks no more by itself");
    for old in [0, 1] {
        assert!(sender.on_message(SiteMessage::Adopt { vm: VM, generation: Generation(old) }).is_empty());
    }
    assert!(matches!(sender.standing(), Standing::Refused(Refusal::Fenced { .. })));
    let actions = sender.on_message(SiteMessage::Adopt { vm: VM, generation: Generation(3) });
    let [Action::Tell(AgentMessage::Watch { generation, .. })] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(*generation, Some(Generation(3)));
    assert_eq!(*sender.standing(), Standing::Unknown);
    sender.on_message(SiteMessage::Vm { vm: VM, generation: Generation(3), latest: None });
    let Some(Action::Tell(AgentMessage::Begin { generation, .. })) = sender.begin(POINT, None).pop() else {
        panic!("it begins nothing")
    };
    assert_eq!(generation, Generation(3));
}

#[test]
fn bytes_on_their_way_stay_within_the_window_by_one_frame_at_most() {
    let mut sender = flowing(0);
    sender.window = 200;
    let mut pushed = 0;
    while sender.has_room(u64::MAX) {
        sender.push(frame(pushed));
        pushed += 1;
    }
    assert!(pushed >= 2);
    assert!(!sender.has_room(u64::MAX));
    assert!(sender.held_bytes() < 200 + frame(0).encoded_len() as u64);
    sender.on_message(SiteMessage::Taken {
        vm: VM,
        point: POINT,
        frames: vec![FrameRange { first: 0, end: u32::MAX }],
    });
    assert!(sender.has_room(u64::MAX));
    sender.push(frame(pushed));
    assert!(!sender.has_room(1), "less was granted than the window is");
}

const NEXT: PointId = PointId::from_bytes([3; 16]);

/// A sender with a point that was sent over `POINT`, which is the site's newest, and a next one over that.
fn overlapping() -> Sender {
    let mut sender = Sender::new(VM, "web".into(), None);
    let base = PointId::from_bytes([1; 16]);
    sender.link_up(1 << 20);
    sender.on_message(standing(Some(base)));
    sender.begin(POINT, Some(base));
    sender.on_message(opened(&[]));
    sender.push(frame(0));
    sender.end(meta());
    let begun = sender.begin(NEXT, Some(POINT));
    assert!(matches!(begun.as_slice(), [Action::Tell(AgentMessage::Begin { parent: Some(POINT), .. })]));
    sender.on_message(SiteMessage::Opened { vm: VM, point: NEXT, have: Vec::new() });
    sender.push(frame(0));
    sender
}

fn durable(point: PointId) -> SiteMessage {
    let manifest = Digest::of(b"");
    SiteMessage::Durable { vm: VM, point, seq: Seq(2), committed_at: UnixMs(3), manifest }
}

fn ended(actions: &[Action]) -> Vec<PointId> {
    let of = |action: &Action| match action {
        Action::Ended(Outcome::Durable { point, .. }) => Some(*point),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

#[test]
fn points_under_way_become_durable_one_after_the_other() {
    let mut sender = overlapping();
    assert!(sender.begin(PointId::from_bytes([4; 16]), Some(POINT)).is_empty(), "only over the newest");
    assert_eq!(ended(&sender.on_message(durable(POINT))), [POINT]);
    sender.end(meta());
    assert_eq!(ended(&sender.on_message(durable(NEXT))), [NEXT]);
    let Standing::Open { latest: Some(latest), .. } = sender.standing() else { panic!() };
    assert_eq!(latest.point, NEXT);
}

#[test]
fn after_a_cut_link_points_under_way_go_on_from_what_the_site_holds() {
    let base = PointId::from_bytes([1; 16]);
    for (latest, durable, begun) in [
        (base, vec![], vec![POINT, NEXT]),
        (POINT, vec![POINT], vec![NEXT]),
        (NEXT, vec![POINT, NEXT], vec![]),
    ] {
        let mut sender = overlapping();
        sender.link_down();
        sender.link_up(1 << 20);
        let actions = sender.on_message(standing(Some(latest)));
        assert_eq!(ended(&actions), durable);
        let told = actions.iter().filter_map(|action| match action {
            Action::Tell(AgentMessage::Begin { point, .. }) => Some(*point),
            _ => None,
        });
        assert_eq!(told.collect::<Vec<_>>(), begun);
    }
    let mut sender = overlapping();
    sender.link_down();
    sender.link_up(1 << 20);
    let actions = sender.on_message(standing(Some(PointId::from_bytes([9; 16]))));
    assert!(matches!(actions.as_slice(), [Action::Ended(Outcome::Lost { point: POINT, .. })]), "{actions:?}");
    assert_eq!(sender.points().len(), 0, "the next one is lost with it");
}

#[test]
fn a_point_that_is_refused_takes_the_others_with_it_and_one_that_is_given_up_only_those_after_it() {
    for point in [POINT, NEXT] {
        let mut sender = overlapping();
        let detail = String::new();
        let refused = SiteMessage::PointRefused { vm: VM, point, refusal: Refusal::SiteFull { detail } };
        let actions = sender.on_message(refused);
        assert!(matches!(actions.last(), Some(Action::Ended(Outcome::Lost { point: POINT, .. }))));
        let told = actions.iter().any(|action| matches!(action, Action::Tell(AgentMessage::Abort { .. })));
        assert_eq!(told, point == NEXT, "the site still has the one before");
        assert_eq!(sender.points().len(), 0);
    }
    let mut sender = overlapping();
    let told = sender.abort_newest();
    assert_eq!(told, [Action::Tell(AgentMessage::Abort { vm: VM, point: NEXT })]);
    assert_eq!(sender.points().collect::<Vec<_>>(), [POINT]);
}
