//! Manifests come back as they were encoded or not at all; golden bytes of both versions.

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
            consistency: Consistency::Memory,
            cut: None,
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

fn bytes(golden: &str) -> Vec<u8> {
    let digits: Vec<u8> = golden.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

/// Version 1 as it was first shipped, which is read for good: a point with memory, and one without.
#[test]
fn a_manifest_of_version_1_is_read_and_says_whether_it_holds_memory() {
    let file = bytes(include_str!("golden_v1.hex"));
    assert_eq!(Manifest::decode(&file), Ok((sample(), Digest::of(&file))));
    let mut disks = sample();
    (disks.meta.consistency, disks.meta.images[0].kind) = (Consistency::Crash, ImageKind::Disk);
    assert_eq!(Manifest::decode(&version_1(&disks)).unwrap().0, disks);
}

/// Version 2 as it was first shipped: a change here is a new version, not a new expectation.
#[test]
fn golden_bytes_of_version_2() {
    let mut app = sample();
    (app.meta.consistency, app.meta.cut) = (Consistency::App, Some(CutId::from_bytes([9; 16])));
    for (manifest, golden) in
        [(sample(), include_str!("golden_v2.hex")), (app, include_str!("golden_v2_app.hex"))]
    {
        let (file, digest) = manifest.encode().unwrap();
        assert_eq!(hex(&file), hex(&bytes(golden)));
        assert_eq!(Manifest::decode(&file), Ok((manifest, digest)));
    }
}

#[test]
fn what_a_point_promises_comes_back_and_an_older_peer_is_told_what_it_knows() {
    for consistency in [Consistency::Memory, Consistency::App, Consistency::Crash] {
        let mut manifest = sample();
        manifest.meta.consistency = consistency;
        manifest.meta.cut = Some(CutId::from_bytes([9; 16]));
        let (file, _) = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(&file).unwrap().0, manifest);
        let told = PointMeta::from(v1::PointMeta::from(manifest.meta.clone()));
        assert_eq!(told.has_memory(), manifest.meta.has_memory());
        assert_eq!(PointMeta { consistency, cut: manifest.meta.cut, ..told }, manifest.meta);
    }
}

/// What a release before version 2 would have written.
fn version_1(manifest: &Manifest) -> Vec<u8> {
    let Manifest { vm, vm_name, generation, point, seq, previous, committed_at, meta, packs, wire_bytes } =
        manifest.clone();
    let meta = meta.into();
    let old =
        v1::Manifest { vm, vm_name, generation, point, seq, previous, committed_at, meta, packs, wire_bytes };
    let body = postcard::to_stdvec(&old).unwrap();
    let body_digest = Digest::of(&body);
    let header = FileHeader { kind: Kind::Manifest, version: 1, body_len: body.len() as u32, body_digest };
    [header.encode().as_slice(), &body].concat()
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
        let _ = Manifest::decode(&body);
        for version in [1, 2, 3] {
            let header = FileHeader { kind: Kind::Manifest, version, body_len: body.len() as u32, body_digest };
            let _ = Manifest::decode(&[header.encode().as_slice(), &body].concat());
        }
        let _ = decode_index(&body);
    }
}
