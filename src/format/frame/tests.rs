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

/// Three pages of which a few words changed, and the pages as they then are.
fn words() -> (words::WordList, Vec<u8>) {
    let old = vec![7u8; 3 * PAGE];
    let mut new = old.clone();
    new[8..16].fill(1);
    new[PAGE - 8..PAGE].fill(2);
    new[2 * PAGE + 80..2 * PAGE + 90].fill(3);
    let mut builder = words::WordsBuilder::default();
    for (at, page) in [(2, 40), (0, 5), (1, 6)] {
        let of = at * PAGE..(at + 1) * PAGE;
        builder.push(page, words::PageWords::between(&old[of.clone()], &new[of], 256).unwrap());
    }
    (builder.finish(2), new)
}

#[test]
fn words_turn_the_old_pages_into_the_new_ones_and_their_checks_tell() {
    let (list, new) = words();
    assert_eq!(list.runs, [PageRun::new(5, 2), PageRun::new(40, 1)]);
    let frame = Frame::seal_words(3, &list, 1).unwrap();
    let mut raw = Vec::new();
    frame.open(&mut raw).unwrap();
    let view = words::WordView::of(3, &raw).unwrap();
    for at in 0..3 {
        let mut page = vec![7; PAGE];
        view.apply(at, &mut page);
        assert_eq!(page, new[at * PAGE..(at + 1) * PAGE]);
        assert_eq!(view.check(at), crate::chunk::digest::page_check(&page));
    }
    assert!(words::PageWords::between(&[0; PAGE], &[1; PAGE], 511).is_none());
    assert_eq!(words::PageWords::between(&[0; PAGE], &[1; PAGE], 512).unwrap().count(), 512);
}

#[test]
fn lists_whose_parts_contradict_each_other_are_refused() {
    let (list, _) = words();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut raw = list.raw.to_vec();
        change(&mut raw);
        Frame::seal_words(3, &words::WordList { raw: raw.into(), ..list.clone() }, 1)
    };
    assert!(with(&|_| ()).is_ok());
    assert!(with(&|raw| raw[24] ^= 0x10).is_err(), "a bit more than there are words");
    assert!(with(&|raw| raw.truncate(raw.len() - 8)).is_err());
    assert!(with(&|raw| raw.push(0)).is_err());
    assert!(with(&|raw| raw.clear()).is_err());
    let many = (0..MADE_PAGES_MAX as u64 + 1).map(|page| (page, refs::PageRef { check: 0, image: 0, page }));
    assert!(Frame::seal_refs(0, &refs::RefList::of(1, many.collect()), 1).is_err());
}

#[test]
fn golden_bytes_of_words_and_references() {
    let refs = refs::RefList::of(
        3,
        vec![
            (9, refs::PageRef { check: 0x0102_0304_0506_0708, image: 1, page: 0x55 }),
            (4, refs::PageRef { check: 0x1112_1314_1516_1718, image: 0, page: 0x1_0000_0000 }),
        ],
    );
    let mut list = words().0;
    // One page alone, so that it is written out here in full.
    list.runs = vec![PageRun::new(5, 1)];
    let mut raw = vec![0xaa; 8];
    raw.extend([[0u8; 63].as_slice(), &[0x80], &[0xcc; 8]].concat());
    list.raw = raw.into();
    let frames = [Frame::seal_words(1, &list, 1).unwrap(), Frame::seal_refs(2, &refs, 1).unwrap()];
    let hex = frames.map(|frame| {
        let mut raw = Vec::new();
        frame.open(&mut raw).unwrap();
        let mut head = BytesMut::new();
        frame.head.encode(&mut head);
        // Without the length of the body, which is zstd's to choose.
        head[16..20].fill(0);
        [head.as_ref(), &raw].concat().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    });
    assert_eq!(hex[0], GOLDEN_WORDS);
    assert_eq!(hex[1], GOLDEN_REFS);
}

const GOLDEN_WORDS: &str = concat!(
    "4c424631",
    "01000000",
    "0200",
    "03",
    "00",
    "50000000",
    "00000000",
    "01000000",
    "54ebc84b1254ae8317ab20a346cd8051f03c14a020dcbf264d86a1f963cd6771",
    "0500000000000000",
    "01000000",
    "aaaaaaaaaaaaaaaa",
    "00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000080",
    "cccccccccccccccc",
);
const GOLDEN_REFS: &str = concat!(
    "4c424631",
    "02000000",
    "0300",
    "04",
    "00",
    "24000000",
    "00000000",
    "02000000",
    "5433dfe74e5c31844b8afacb1cce070c6a65bd4219e5fa38f4e142f8cda60300",
    "0400000000000000",
    "01000000",
    "0900000000000000",
    "01000000",
    "1817161514131211",
    "0807060504030201",
    "0000000001000000",
    "5500000000000000",
    "0000",
    "0100",
);

proptest! {
    /// Goal: whatever bytes claim to be a list, they are refused or can be applied. Method: bytes with a sound digest.
    #[test]
    fn hostile_lists_are_refused_or_harmless(
        pages in 1u32..5, codec in 3u8..5, mut raw in proptest::collection::vec(any::<u8>(), 0..700), sparse: bool,
    ) {
        if sparse {
            // Bitmaps of few words, so that some lists are whole.
            raw.iter_mut().skip(8 * pages as usize).for_each(|byte| *byte = u8::from(*byte == 7));
        }
        let mut head = FrameHead {
            seq: 0,
            image: 0,
            codec: Codec::from_byte(codec).unwrap(),
            raw_len: raw.len() as u32,
            body_len: raw.len() as u32,
            digest: Digest::of(&[]),
            runs: vec![PageRun::new(0, pages)],
        };
        head.digest = head.digest_over(&raw);
        let mut out = Vec::new();
        let sound = head.check().is_ok();
        if super::open(&head, &raw, &mut out).is_ok() && sound {
            match head.codec {
                Codec::Words => {
                    let view = words::WordView::of(pages as usize, &out).unwrap();
                    (0..pages as usize).for_each(|at| view.apply(at, &mut [0; PAGE]));
                }
                _ => prop_assert_eq!(refs::RefView::of(pages as usize, &out).unwrap().iter().count(), pages as usize),
            }
        }
    }

    #[test]
    fn words_between_any_two_pages_make_the_second_of_the_first(
        writes in proptest::collection::vec((0usize..4090, any::<u8>()), 0..60),
    ) {
        let old: Vec<u8> = (0..PAGE).map(|at| (at % 251) as u8).collect();
        let mut new = old.clone();
        writes.iter().for_each(|(at, byte)| new[*at] = *byte);
        let mut builder = words::WordsBuilder::default();
        builder.push(1, words::PageWords::between(&old, &new, 512).unwrap());
        let list = builder.finish(0);
        let mut page = old.clone();
        words::WordView::of(1, &list.raw).unwrap().apply(0, &mut page);
        prop_assert_eq!(page, new);
    }

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
