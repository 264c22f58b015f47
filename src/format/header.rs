//! The fixed header that every file of the store starts with.
//! `0 magic "LIFEBOAT" │ 8 kind u16 │ 10 version u16 │ 12 body_len u32 │ 16 body_digest 32 │ 48 zero 12 │ 60 check u32`
//! (little-endian; `check` is the first 4 bytes of the blake3 of bytes 0..60). Promises: legible without the body.

use crate::chunk::digest::Digest;
use std::ops::RangeInclusive;

const MAGIC: [u8; 8] = *b"LIFEBOAT";

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    Manifest = 1,
    Pack = 2,
    Generation = 3,
    Fold = 4,
    Pruned = 5,
    Owner = 6,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHeader {
    pub kind: Kind,
    pub version: u16,
    /// Length of the body where the header can know it; 0 for files that are streamed.
    pub body_len: u32,
    pub body_digest: Digest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("not a file of this store (cut short, wrong magic or damaged header)")]
    Foreign,
    #[error("a file of kind {found}, where kind {expected} belongs")]
    WrongKind { found: u16, expected: u16 },
    #[error(
        "format version {found}, of which this release reads {oldest} to {newest}: use a release that reads it"
    )]
    Version { found: u16, oldest: u16, newest: u16 },
}

impl FileHeader {
    pub const LEN: usize = 8 + 2 + 2 + 4 + 32 + 12 + 4;

    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&(self.kind as u16).to_le_bytes());
        out[10..12].copy_from_slice(&self.version.to_le_bytes());
        out[12..16].copy_from_slice(&self.body_len.to_le_bytes());
        out[16..48].copy_from_slice(self.body_digest.as_bytes());
        let check = check(&out);
        out[60..].copy_from_slice(&check);
        out
    }

    /// Reads the header at the front of `file`, which must be of `kind` and of one of `versions`.
    pub fn decode(file: &[u8], kind: Kind, versions: RangeInclusive<u16>) -> Result<Self, HeaderError> {
        let bytes: &[u8; Self::LEN] =
            file.get(..Self::LEN).and_then(|part| part.try_into().ok()).ok_or(HeaderError::Foreign)?;
        if bytes[..8] != MAGIC || bytes[60..] != check(bytes) {
            return Err(HeaderError::Foreign);
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != kind as u16 {
            return Err(HeaderError::WrongKind { found, expected: kind as u16 });
        }
        let version = u16::from_le_bytes([bytes[10], bytes[11]]);
        if !versions.contains(&version) {
            let (oldest, newest) = versions.into_inner();
            return Err(HeaderError::Version { found: version, oldest, newest });
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[16..48]);
        Ok(Self {
            kind,
            version,
            body_len: u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]),
            body_digest: Digest::from_bytes(digest),
        })
    }
}

const _: () = assert!(FileHeader::LEN == 64);

fn check(header: &[u8; FileHeader::LEN]) -> [u8; 4] {
    let digest = Digest::of(&header[..60]);
    let bytes = digest.as_bytes();
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}
