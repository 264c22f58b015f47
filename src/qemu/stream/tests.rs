//! Goal: what is composed is what is parsed, and nothing that is parsed can hurt.

use super::*;
use proptest::prelude::*;
use std::{collections::BTreeMap, io::Read};

const CONFIG: &[u8] = b"\x07\0\0\0\x04q35x\x05\x12configuration/uuid\0\0\0\x010123456789abcdef";
const DEVICES: &[u8] = b"\x04\0\0\0\x05opaque\0";

fn blocks() -> Vec<RamBlock> {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), bytes: pages * PAGE as u64 };
    vec![block("pc.ram", 16), block("0000:00:02.0/vga.vram", 4), block("/rom@etc/acpi/tables", 2)]
}

/// Pages by (block, page) as a stream leaves them, and the bytes after its RAM.
/// Pages by block and number.
type Pages = BTreeMap<(usize, u64), Vec<u8>>;

fn parse(stream: &[u8]) -> Result<(Pages, Vec<u8>), StreamError> {
    let mut reader = StreamReader::begin(stream)?;
    let mut pages = BTreeMap::new();
    loop {
        match reader.next_event()? {
            Event::Page { block, page, bytes } => pages.insert((block, page), bytes.to_vec()),
            Event::Filled { block, page, byte } => pages.insert((block, page), vec![byte; PAGE]),
            Event::SectionEnd => None,
            Event::Devices => break,
        };
    }
    let mut rest = Vec::new();
    reader.into_rest().read_to_end(&mut rest)?;
    Ok((pages, rest))
}

#[test]
fn a_composed_stream_has_the_bytes_that_qemu_reads() {
    let block = RamBlock { name: "pc.ram".into(), bytes: 2 * PAGE as u64 };
    let mut writer = StreamWriter::begin(Vec::new(), b"\x07\0\0\0\x02pc", vec![block]).unwrap();
    writer.pages(0, 1, &[7; PAGE]).unwrap();
    writer.zero(0, 0, 1).unwrap();
    let stream = writer.finish(DEVICES).unwrap();
    let mut golden = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec();
    golden.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    golden.extend_from_slice(b"\0\0\0\0\0\0\x20\x04\x06pc.ram\0\0\0\0\0\0\x20\0");
    golden.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02");
    golden.extend_from_slice(b"\0\0\0\0\0\0\x10\x08\x06pc.ram");
    golden.extend_from_slice(&[7; PAGE]);
    golden.extend_from_slice(b"\0\0\0\0\0\0\0\x22\0");
    golden.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    golden.extend_from_slice(DEVICES);
    golden.extend_from_slice(b"\x06\0\0\0\x02{}");
    assert_eq!(stream, golden);
}

#[test]
fn blocks_other_than_main_memory_are_completed_with_zeros() {
    let mut writer = StreamWriter::begin(Vec::new(), CONFIG, blocks()).unwrap();
    writer.pages(1, 2, &[1; PAGE]).unwrap();
    let (pages, rest) = parse(&writer.finish(DEVICES).unwrap()).unwrap();
    assert_eq!(pages.keys().filter(|(block, _)| *block == 0).count(), 0);
    assert_eq!(pages.keys().filter(|(block, _)| *block == 1).count(), 4);
    assert_eq!(pages[&(1, 2)], vec![1; PAGE]);
    assert_eq!(pages[&(2, 0)], vec![0; PAGE]);
    assert!(rest.starts_with(DEVICES));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut writer = StreamWriter::begin(Vec::new(), CONFIG, blocks()).unwrap();
    assert!(matches!(writer.pages(0, 16, &[1; PAGE]), Err(StreamError::OutsideBlock { .. })));
    assert!(matches!(writer.zero(0, u64::MAX, 2), Err(StreamError::OutsideBlock { .. })));
    assert!(writer.pages(9, 0, &[1; PAGE]).is_err());
    assert!(writer.pages(0, 0, &[1; 100]).is_err());
    assert!(writer.finish(b"not sections").is_err());
    let odd = RamBlock { name: "pc.ram".into(), bytes: 100 };
    assert!(StreamWriter::begin(Vec::new(), CONFIG, vec![odd]).is_err());
}

#[test]
fn sections_of_a_held_bitmap_are_skipped() {
    let mut stream = MAGIC.to_vec();
    stream.extend_from_slice(CONFIG);
    stream.extend_from_slice(b"\x01\0\0\0\x01\x0cdirty-bitmap\0\0\0\0\0\0\0\x01");
    stream.extend_from_slice(b"\x1c\x01n\x01b\0\0\x02\0\0\x01\x7e\0\0\0\x01");
    stream.extend_from_slice(b"\x02\0\0\0\x01\x01\x7e\0\0\0\x01\0");
    let mut reader = StreamReader::begin(&stream[..]).unwrap();
    assert_eq!(reader.next_event().unwrap(), Event::SectionEnd);
    assert_eq!(reader.next_event().unwrap(), Event::SectionEnd);
    assert_eq!(reader.next_event().unwrap(), Event::Devices);
}

#[test]
fn a_stream_cut_anywhere_is_an_error_and_nothing_else() {
    let mut writer = StreamWriter::begin(Vec::new(), CONFIG, blocks()).unwrap();
    writer.pages(0, 3, &[9; PAGE]).unwrap();
    let stream = writer.finish(DEVICES).unwrap();
    let ram_end = stream.len() - DEVICES.len() - 7;
    for len in (0..=ram_end).filter(|len| len % 97 == 0 || *len < 256 || *len > ram_end - 64) {
        assert!(parse(&stream[..len]).is_err(), "cut at {len}");
    }
}

proptest! {
    #[test]
    fn pages_in_any_order_come_back(records in prop::collection::vec((0usize..3, 0u64..16, any::<u8>()), 0..64)) {
        let mut writer = StreamWriter::begin(Vec::new(), CONFIG, blocks()).unwrap();
        let mut expected = BTreeMap::new();
        for (block, page, byte) in records {
            let page = page % blocks()[block].pages();
            if byte == 0 { writer.zero(block, page, 1).unwrap() } else { writer.pages(block, page, &[byte; PAGE]).unwrap() }
            expected.insert((block, page), vec![byte; PAGE]);
        }
        let stream = writer.finish(DEVICES).unwrap();
        let reader = StreamReader::begin(&stream[..]).unwrap();
        prop_assert_eq!(reader.config(), CONFIG);
        let (mut pages, _) = parse(&stream).unwrap();
        pages.retain(|place, bytes| expected.contains_key(place) || bytes.iter().any(|byte| *byte != 0));
        prop_assert_eq!(pages, expected);
    }

    #[test]
    fn arbitrary_bytes_never_panic(noise in prop::collection::vec(any::<u8>(), 0..4096), valid_head in any::<bool>()) {
        let mut stream = if valid_head { [&MAGIC[..], CONFIG].concat() } else { Vec::new() };
        stream.extend_from_slice(&noise);
        let _ = parse(&stream);
    }

    #[test]
    fn a_flipped_byte_never_panics(at in 0usize..500, byte in any::<u8>()) {
        let writer = StreamWriter::begin(Vec::new(), CONFIG, blocks()).unwrap();
        let mut stream = writer.finish(DEVICES).unwrap();
        let at = at % stream.len();
        stream[at] = byte;
        let _ = parse(&stream);
    }
}
