//! The agent's half of the conversation: nothing lost or repeated over a cut link, one outcome for each point (I-1).

use super::*;
use crate::{
    chunk::digest::Digest,
    format::manifest::{Image, ImageKind, PointStats},
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
        has_memory: false,
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
    assert!(sender.open.as_ref().unwrap().held_bytes < 200 + frame(0).encoded_len() as u64);
    sender.on_message(SiteMessage::Taken {
        vm: VM,
        point: POINT,
        frames: vec![FrameRange { first: 0, end: u32::MAX }],
    });
    assert!(sender.has_room(u64::MAX));
    sender.push(frame(pushed));
    assert!(!sender.has_room(1), "less was granted than the window is");
}
