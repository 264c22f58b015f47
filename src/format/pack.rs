//! Packs: frames back to back, then their index. One pack belongs to one point; a point may have several.
//! Layout: `FileHeader` (kind pack, body_len 0, digest of nothing) │ frames │ index. The index is, per frame,
//! `offset u64 │ frame head`; its place and digest stand in the manifest, so that nothing in a pack is believed that
//! the manifest's chain does not vouch for. Promises: pure; decoding is bounded by the bytes given.

use crate::{
    chunk::digest::Digest,
    format::frame::{FrameError, FrameHead},
    format::header::{FileHeader, Kind},
    id::PackId,
};
use bytes::{BufMut, BytesMut};
use serde::{Deserialize, Serialize};

/// A manifest's word for one pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRef {
    pub id: PackId,
    /// Bytes of the whole file.
    pub len: u64,
    pub index_offset: u64,
    pub index_digest: Digest,
    /// Digest of the whole file as it lies on disk. Frame digests cover pages; this one covers every byte, also those
    /// whose change would go unnoticed when unpacked.
    pub file_digest: Digest,
    pub frames: u32,
}

impl PackRef {
    pub fn index_len(&self) -> Option<u64> {
        self.len.checked_sub(self.index_offset)
    }
}

/// One frame in a pack: where its encoding starts, and its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    pub offset: u64,
    pub head: FrameHead,
}

impl IndexEntry {
    /// Where the frame's body starts in the pack.
    pub fn body_offset(&self) -> u64 {
        self.offset + self.head.encoded_len() as u64
    }
}

/// The header that a pack file starts with.
pub fn pack_header() -> [u8; FileHeader::LEN] {
    FileHeader { kind: Kind::Pack, version: 1, body_len: 0, body_digest: Digest::of(&[]) }.encode()
}

pub fn encode_index(entries: &[IndexEntry]) -> BytesMut {
    let mut out = BytesMut::new();
    for entry in entries {
        out.put_u64_le(entry.offset);
        entry.head.encode(&mut out);
    }
    out
}

/// Whether `entries` lie back to back from the header to `index_offset`, so that no byte is unaccounted for.
pub fn is_gapless(entries: &[IndexEntry], index_offset: u64) -> bool {
    let end = entries.iter().try_fold(FileHeader::LEN as u64, |at, entry| {
        let len = entry.head.encoded_len() as u64 + u64::from(entry.head.body_len);
        (entry.offset == at).then(|| at.checked_add(len)).flatten()
    });
    end == Some(index_offset)
}

/// Decodes an index whose digest the caller has checked.
pub fn decode_index(mut bytes: &[u8]) -> Result<Vec<IndexEntry>, FrameError> {
    let mut entries = Vec::new();
    while !bytes.is_empty() {
        let Some((offset, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(FrameError::Malformed("an index entry is cut short"));
        };
        let (head, len) = FrameHead::decode(rest)?;
        entries.push(IndexEntry { offset: u64::from_le_bytes(*offset), head });
        bytes = &rest[len..];
    }
    Ok(entries)
}
