//! Frames come back as they were sealed or not at all; golden bytes of version 1.

use super::*;
use proptest::prelude::*;

fn group(first: u64, pages: &[u8]) -> PageGroup {
    let raw: Vec<u8> = pages.iter().flat_map(|fill| vec![*fill; PAGE]).collect();
    PageGroup {
        image: 3,
        runs: vec![PageRun::new(first, pages.len() as u32)],
        content: Content::Bytes(raw.into()),
    }
}

fn encoded(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::new();
    frame.head.encode(&mut out);
    out.extend_from_slice(&frame.body);
    out
}

#[test]
fn a_sealed_group_opens_to_the_same_bytes_and_a_flipped_bit_anywhere_is_refused() {
    let group = group(17, &[1, 2, 3]);
    let frame = Frame::seal(9, &group, 1).unwrap();
    let bytes = encoded(&frame);
    let Content::Bytes(raw) = &group.content else { unreachable!() };
    let mut out = Vec::new();
    frame.open(&mut out).unwrap();
    assert_eq!(out, raw.to_vec());
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let opened =
            FrameHead::decode(&bad).and_then(|(head, len)| super::open(&head, &bad[len..], &mut out));
        // A flip inside zstd's own slack may unpack to the same bytes; it must never unpack to others.
        assert!(opened.is_err() || out == raw.as_ref(), "bit {bit} changed the pages unnoticed");
    }
}

#[test]
fn zero_groups_have_no_body_however_many_pages_they_cover() {
    let zero = PageGroup { image: 0, runs: vec![PageRun::new(0, 1 << 30)], content: Content::Zero };
    let frame = Frame::seal(0, &zero, 1).unwrap();
    assert_eq!(frame.body.len(), 0);
    frame.open(&mut Vec::new()).unwrap();
}

/// Version 1 as it was first shipped: a change here is a new version, not a new expectation.
#[test]
fn golden_bytes_of_version_1() {
    let frame = Frame::seal(
        7,
        &PageGroup { image: 2, runs: vec![PageRun::new(5, 2), PageRun::new(9, 1)], content: Content::Zero },
        1,
    )
    .unwrap();
    let hex: String = encoded(&frame).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        concat!(
            "4c424631",
            "07000000",
            "0200",
            "02",
            "00",
            "00000000",
            "00000000",
            "02000000",
            "7a6db731f3abea6a3014944351acd5c5d57c4d8615ea5112a91b85a4b454b4ed",
            "0500000000000000",
            "02000000",
            "0900000000000000",
            "01000000"
        )
    );
}

proptest! {
    #[test]
    fn decoding_arbitrary_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = FrameHead::decode(&bytes);
        let mut framed = MAGIC.to_vec();
        framed.extend(bytes);
        if let Ok((head, len)) = FrameHead::decode(&framed) {
            let _ = super::open(&head, &framed[len..], &mut Vec::new());
        }
    }

    #[test]
    fn what_is_sealed_decodes_to_the_same_head(first in 0u64..1 << 40, fills in proptest::collection::vec(any::<u8>(), 1..8)) {
        let frame = Frame::seal(1, &group(first, &fills), 1).unwrap();
        let (head, len) = FrameHead::decode(&encoded(&frame)).unwrap();
        prop_assert_eq!(len + head.body_len as usize, frame.encoded_len());
        prop_assert_eq!(head, frame.head);
    }
}
