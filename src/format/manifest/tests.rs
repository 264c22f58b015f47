//! Manifests come back as they were encoded or not at all; golden bytes of version 1.

use super::*;
use crate::{
    format::{
        frame::Frame,
        pack::{IndexEntry, decode_index, encode_index, is_gapless, pack_header},
    },
    id::PackId,
    page::{Content, PageGroup, PageRun},
};
use proptest::prelude::*;

fn sample() -> Manifest {
    Manifest {
        vm: VmId::from_bytes([1; 16]),
        vm_name: "web-1".into(),
        generation: Generation(2),
        point: PointId::from_bytes([3; 16]),
        seq: Seq(300),
        previous: Some(PreviousRef {
            point: PointId::from_bytes([4; 16]),
            manifest: Digest::from_bytes([5; 32]),
        }),
        committed_at: UnixMs(1_700_000_000_000),
        meta: PointMeta {
            cut_at: UnixMs(1_699_999_999_000),
            images: vec![
                Image { no: 0, kind: ImageKind::Ram, name: "pc.ram".into(), bytes: 1 << 29, full: false },
                Image { no: 1, kind: ImageKind::Disk, name: "vda".into(), bytes: 1 << 31, full: false },
                Image { no: 2, kind: ImageKind::Blob, name: "domain.xml".into(), bytes: 700, full: true },
            ],
            has_memory: true,
            was_running: true,
            stats: PointStats { pause_us: 1500, memory_changed_bytes: 8192, disk_changed_bytes: 4096 },
        },
        packs: vec![PackRef {
            id: PackId::from_bytes([6; 16]),
            len: 1000,
            index_offset: 900,
            index_digest: Digest::from_bytes([7; 32]),
            file_digest: Digest::from_bytes([8; 32]),
            frames: 9,
        }],
        wire_bytes: 12345,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Version 1 as it was first shipped: a change here is a new version, not a new expectation.
#[test]
fn golden_bytes_of_version_1() {
    let (file, digest) = sample().encode().unwrap();
    assert_eq!(hex(&file), include_str!("golden_v1.hex").split_whitespace().collect::<String>());
    assert_eq!(Manifest::decode(&file), Ok((sample(), digest)));
}

#[test]
fn golden_bytes_of_a_pack_of_version_1() {
    let mut file = bytes::BytesMut::from(pack_header().as_slice());
    let mut entries = Vec::new();
    for seq in 0..2 {
        let group = PageGroup { image: 2, runs: vec![PageRun::new(5, 2)], content: Content::Zero };
        let frame = Frame::seal(seq, &group, 1).unwrap();
        entries.push(IndexEntry { offset: file.len() as u64, head: frame.head.clone() });
        frame.head.encode(&mut file);
    }
    let index_offset = file.len() as u64;
    let index = encode_index(&entries);
    file.extend_from_slice(&index);
    assert_eq!(hex(&file), include_str!("golden_pack_v1.hex").split_whitespace().collect::<String>());
    assert_eq!(decode_index(&file[index_offset as usize..]), Ok(entries.clone()));
    assert!(is_gapless(&entries, index_offset));
    assert!(!is_gapless(&entries, index_offset + 1) && !is_gapless(&entries[1..], index_offset));
    entries[1].offset = u64::MAX;
    assert!(!is_gapless(&entries, index_offset));
}

#[test]
fn a_flipped_bit_anywhere_or_a_cut_is_refused() {
    let (file, _) = sample().encode().unwrap();
    for bit in 0..file.len() * 8 {
        let mut bad = file.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&bad).is_err(), "bit {bit}");
    }
    for len in 0..file.len() {
        assert!(Manifest::decode(&file[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn a_first_point_that_is_not_complete_is_refused() {
    let mut manifest = sample();
    manifest.previous = None;
    assert!(manifest.encode().is_err());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let body_digest = Digest::of(&body);
        let header = FileHeader { kind: Kind::Manifest, version: 1, body_len: body.len() as u32, body_digest };
        let _ = Manifest::decode(&body);
        let _ = Manifest::decode(&[header.encode().as_slice(), &body].concat());
        let _ = decode_index(&body);
    }
}
