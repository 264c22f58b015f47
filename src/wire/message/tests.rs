//! Golden bytes of every control message of version 1; arbitrary bytes never panic.

use super::*;
use crate::chunk::fingerprint::{Fingerprint, FingerprintKey};
use crate::format::manifest::{Consistency, Image, ImageKind, PointStats};
use crate::wire::compare::{Fingerprints, Level, Reply, Span};
use crate::wire::order::{ConsistencyWish, CutKind, MemoryWish};
use proptest::prelude::*;

const VM: VmId = VmId::from_bytes([0xaa; 16]);
const POINT: PointId = PointId::from_bytes([0xbb; 16]);
const CUT: CutId = CutId::from_bytes([0xcc; 16]);

fn hex(value: &impl Serialize) -> String {
    postcard::to_stdvec(value).unwrap().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The golden text, with the ids written as `V`, `P` and `C`.
fn shown(value: &impl Serialize) -> String {
    let ids = [("aa", "V"), ("bb", "P"), ("cc", "C")];
    ids.iter().fold(hex(value), |text, (byte, short)| text.replace(&format!("10{}", byte.repeat(16)), short))
}

fn assignment() -> Assignment {
    Assignment {
        group: "g".into(),
        interval_ms: 300,
        memory: MemoryWish::Off,
        consistency: ConsistencyWish::App,
        together: true,
        paused: false,
    }
}

fn question() -> Question {
    let (kind, image) = (ImageKind::Disk, "vda".to_owned());
    Question { no: 7, point: POINT, kind, image, level: Level::Pages, first: 640, count: 32 }
}

fn compared(reply: Reply) -> SiteMessage {
    SiteMessage::Compared { vm: VM, answer: Answer { no: 7, reply } }
}

fn fingerprints() -> Reply {
    let one = Fingerprint::from_bytes([2; 16]);
    let key = FingerprintKey::from_bytes([1; 32]);
    let spans = vec![Span { zeros: 3, then: vec![one] }];
    Reply::Fingerprints(Fingerprints { key, image_bytes: 4096, end: 644, spans })
}

fn meta() -> Box<PointMeta> {
    let image = Image { no: 1, kind: ImageKind::Disk, name: "vda".into(), bytes: 4096, full: true };
    let stats = PointStats { pause_us: 3, memory_changed_bytes: 4, disk_changed_bytes: 5 };
    Box::new(PointMeta {
        cut_at: UnixMs(2),
        images: vec![image],
        consistency: Consistency::App,
        cut: Some(CUT),
        was_running: true,
        stats,
    })
}

/// Version 1 as it was first shipped: a change here is a new protocol version, not a new expectation.
#[test]
fn golden_bytes_of_every_agent_message_of_version_1() {
    let report = VmReport { state: VmState::Protected, reason: None, interval_ms: 5, memory: None };
    let cases = [
        (AgentMessage::Hello { host: "h".into(), release: "r".into() }, "0001680172"),
        (AgentMessage::Watch { vm: VM, name: "w".into(), generation: Some(Generation(3)) }, "01V01770103"),
        (
            AgentMessage::Begin { vm: VM, generation: Generation(1), point: POINT, parent: Some(POINT) },
            "02V01P01P",
        ),
        (
            AgentMessage::End { vm: VM, point: POINT, frames: 300, meta: meta() }.before_version_5(),
            "03VPac0202010101037664618020010001030405",
        ),
        (AgentMessage::Abort { vm: VM, point: POINT }, "04VP"),
        (AgentMessage::Report { vm: VM, report }, "05V02000500"),
        (AgentMessage::Compare { vm: VM, question: question() }, "06V07P010376646101800520"),
        (AgentMessage::Place { vm: VM, place: Place::Here { migrated: true } }, "07V0001"),
        (AgentMessage::Place { vm: VM, place: Place::NotHere }, "07V01"),
        (AgentMessage::Place { vm: VM, place: Place::Left }, "07V02"),
        (
            AgentMessage::Inventory { vms: vec![Offered { vm: VM, name: "w".into(), running: true }] },
            "0801V017701",
        ),
        (AgentMessage::Part { vm: VM, cut: CUT, part: Part::Ready }, "09VC00"),
        (
            AgentMessage::End { vm: VM, point: POINT, frames: 300, meta: meta() },
            "0aVPac020201010103766461802001010103040501C",
        ),
        (AgentMessage::Alive { vm: VM, generation: Generation(3), no: 300 }, "0bV03ac02"),
    ];
    for (message, golden) in cases {
        assert_eq!(shown(&message), golden, "{message:?}");
    }
}

#[test]
fn golden_bytes_of_every_site_message_of_version_1() {
    let latest = Some(Latest { point: POINT, seq: Seq(7), cut_at: UnixMs(8), committed_at: UnixMs(9) });
    let ranges = vec![FrameRange { first: 0, end: 2 }];
    let refusal = Refusal::SiteFull { detail: "d".into() };
    let durable = SiteMessage::Durable {
        vm: VM,
        point: POINT,
        seq: Seq(1),
        committed_at: UnixMs(2),
        manifest: Digest::from_bytes([0; 32]),
    };
    let zeros = "00".repeat(32);
    let cases = [
        (
            SiteMessage::Welcome { site: "s".into(), release: "r".into(), window: 5 },
            "000173017205".to_owned(),
        ),
        (SiteMessage::Vm { vm: VM, generation: Generation(1), latest }, "01V0101P070809".to_owned()),
        (
            SiteMessage::VmRefused { vm: VM, refusal: Refusal::Fenced { current: Generation(2) } },
            "02V0002".to_owned(),
        ),
        (SiteMessage::Opened { vm: VM, point: POINT, have: ranges.clone() }, "03VP010002".to_owned()),
        (SiteMessage::Taken { vm: VM, point: POINT, frames: ranges }, "04VP010002".to_owned()),
        (durable, format!("05VP0102{zeros}")),
        (SiteMessage::PointRefused { vm: VM, point: POINT, refusal }, "06VP010164".to_owned()),
        (compared(Reply::Reading { done_bytes: 5, total_bytes: 300 }), "07V070005ac02".to_owned()),
        (compared(fingerprints()), format!("07V0701{}80208405010301{}", "01".repeat(32), "02".repeat(16))),
        (compared(Reply::Refused { why: "w".into() }), "07V07020177".to_owned()),
        (SiteMessage::Assign { vm: VM, assignment: None }, "08V00".to_owned()),
        (SiteMessage::Assign { vm: VM, assignment: Some(assignment()) }, "08V010167ac0202010100".to_owned()),
        (SiteMessage::Cut { vm: VM, cut: CUT, order: CutOrder::CallOff }, "09VC03".to_owned()),
        (SiteMessage::Adopt { vm: VM, generation: Generation(3) }, "0aV03".to_owned()),
        (SiteMessage::Alive { vm: VM, no: 300, for_ms: 5 }, "0bVac0205".to_owned()),
    ];
    for (message, golden) in cases {
        assert_eq!(shown(&message), golden, "{message:?}");
    }
}

/// Of version 5; `Frozen` and `Freeze` of version 6.
#[test]
fn golden_bytes_of_every_part_of_a_cut_and_every_order() {
    let (at, generation) = (UnixMs(300), Generation(2));
    let parts = [
        (Part::Ready, "00"),
        (Part::Stopped { at, ran: true }, "01ac0201"),
        (Part::Cut { point: POINT, together: true, pause_us: 5 }, "02P0105"),
        (Part::Out { why: "w".into() }, "030177"),
        (Part::Held { point: POINT }, "04P"),
        (Part::HoldEnded { gone: true }, "0501"),
        (Part::Frozen, "06"),
    ];
    for (part, golden) in parts {
        assert_eq!(shown(&part), golden, "{part:?}");
    }
    let orders = [
        (CutOrder::Prepare { kind: CutKind::Group, within_ms: 300 }, "0000ac02"),
        (CutOrder::Prepare { kind: CutKind::Final, within_ms: 300 }, "0001ac02"),
        (CutOrder::Stop { at }, "01ac02"),
        (CutOrder::Go { together: true }, "0201"),
        (CutOrder::CallOff, "03"),
        (CutOrder::Resume { generation }, "0402"),
        (CutOrder::ShutOff { generation }, "0502"),
        (CutOrder::Freeze, "06"),
    ];
    for (order, golden) in orders {
        assert_eq!(shown(&order), golden, "{order:?}");
    }
}

/// States and refusals by their numbers: what a later version added stands behind what was there.
#[test]
fn golden_bytes_of_every_state_and_refusal() {
    let states = ["connecting", "seeding", "protected", "degraded", "not-running", "refused", "fenced"];
    let states = states.into_iter().chain(["comparing", "yielding", "moved"]);
    for (no, name) in states.enumerate() {
        let state: VmState = postcard::from_bytes(&[no as u8]).unwrap();
        assert_eq!((state.as_str(), hex(&state)), (name, format!("{no:02x}")));
    }
    assert!(postcard::from_bytes::<VmState>(&[10]).is_err());
    let detail = || "d".to_owned();
    let cases = [
        (Refusal::Fenced { current: Generation(2) }, "0002"),
        (Refusal::SiteFull { detail: detail() }, "010164"),
        (Refusal::WrongParent { latest: None }, "0200"),
        (Refusal::UnknownPoint, "03"),
        (Refusal::Invalid { detail: detail() }, "040164"),
        (Refusal::Internal { detail: detail() }, "050164"),
        (Refusal::HeldElsewhere { why: detail() }, "060164"),
    ];
    for (refusal, golden) in cases {
        assert_eq!(hex(&refusal), golden, "{refusal:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_a_message_or_an_error_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = postcard::from_bytes::<AgentMessage>(&bytes);
        let _ = postcard::from_bytes::<SiteMessage>(&bytes);
    }
}
