//! A small file of the store: header, then a postcard body that the header digests.
//! Promises: what is read is what was written, or refused; bounded by [`BODY_MAX`]. Called by `fold` and `pruned`.

use crate::{
    chunk::digest::Digest,
    format::header::{FileHeader, HeaderError, Kind},
};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes of a record's body at the most: refused before it is read.
pub const BODY_MAX: u32 = 16 << 20;
/// Bytes of a record's whole file at the most.
pub const FILE_MAX: u64 = BODY_MAX as u64 + FileHeader::LEN as u64;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("record: {0}")]
    Header(#[from] HeaderError),
    #[error("record: its bytes do not match their digest")]
    Corrupt,
    #[error("record: {0}")]
    Malformed(String),
}

pub(super) fn seal<T: Serialize>(kind: Kind, version: u16, body: &T) -> Result<Vec<u8>, RecordError> {
    let body = postcard::to_stdvec(body).map_err(|error| RecordError::Malformed(error.to_string()))?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len <= BODY_MAX);
    let body_len = len.ok_or_else(|| RecordError::Malformed("too large".into()))?;
    let header = FileHeader { kind, version, body_len, body_digest: Digest::of(&body) };
    Ok([header.encode().as_slice(), &body].concat())
}

pub(super) fn open<T: DeserializeOwned>(kind: Kind, version: u16, file: &[u8]) -> Result<T, RecordError> {
    let header = FileHeader::decode(file, kind, 1..=version)?;
    let body = &file[FileHeader::LEN..];
    if header.body_len > BODY_MAX
        || body.len() != header.body_len as usize
        || Digest::of(body) != header.body_digest
    {
        return Err(RecordError::Corrupt);
    }
    let (value, rest) =
        postcard::take_from_bytes(body).map_err(|error| RecordError::Malformed(error.to_string()))?;
    if rest.is_empty() { Ok(value) } else { Err(RecordError::Malformed("bytes follow its end".into())) }
}
