//! The one home of zstd. Promises: decompression never writes past the length that the caller expects, whatever the
//! input says of itself.

use std::cell::RefCell;

/// The bytes were not a compressed chunk of the expected length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("compressed bytes do not unpack to the {expected} bytes they claim")]
pub struct CodecError {
    pub expected: usize,
}

thread_local! {
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses `raw`; `None` where that would not make it smaller (or zstd could not get memory), or `level` is [`PLAIN`].
pub fn compress(raw: &[u8], level: i32) -> Option<Vec<u8>> {
    if level == PLAIN {
        return None;
    }
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(at, _)| *at != level) {
            *slot = zstd::bulk::Compressor::new(level).ok().map(|made| (level, made));
        }
        let (_, compressor) = slot.as_mut()?;
        compressor.compress(raw).ok().filter(|packed| packed.len() < raw.len())
    })
}

/// Unpacks into `out`, which is cleared first and then holds exactly `expected` bytes.
pub fn decompress(packed: &[u8], expected: usize, out: &mut Vec<u8>) -> Result<(), CodecError> {
    out.clear();
    out.reserve(expected);
    let unpacked = DECOMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Decompressor::new().ok();
        }
        // `decompress_to_buffer` is bounded by the vector's capacity, which may exceed what was asked for.
        slot.as_mut().and_then(|unpacker| unpacker.decompress_to_buffer(packed, out).ok())
    });
    if unpacked == Some(expected) { Ok(()) } else { Err(CodecError { expected }) }
}

/// The level that leaves everything as it is: for links that are faster than the compressor.
pub const PLAIN: i32 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bomb_is_refused_and_an_honest_chunk_comes_back() {
        let raw = vec![7u8; 1 << 20];
        let packed = compress(&raw, 1).unwrap();
        let mut out = Vec::new();
        decompress(&packed, raw.len(), &mut out).unwrap();
        assert_eq!(out, raw);
        assert!(decompress(&packed, 4096, &mut Vec::new()).is_err());
        assert!(decompress(&packed[..packed.len() / 2], raw.len(), &mut Vec::new()).is_err());
        assert!(decompress(b"not zstd at all", 16, &mut Vec::new()).is_err());
    }
}
