//! Structured replies: what comes back, chunk by chunk, put together and checked against what was asked.
//! Promises: a read is complete and without overlap; an extent list is well-formed. No I/O. Called by `client`.

use super::NbdError;
use bytes::{Bytes, BytesMut};

/// A read in flight: its bytes so far.
#[derive(Debug)]
pub(super) struct ReadInFlight {
    offset: u64,
    len: u32,
    /// Empty until the first data came: a hole costs nothing.
    bytes: BytesMut,
    /// Ranges that came, as (start, end) within `bytes`.
    came: Vec<(u32, u32)>,
}

impl ReadInFlight {
    pub fn new(offset: u64, len: u32) -> Self {
        Self { offset, len, bytes: BytesMut::new(), came: Vec::new() }
    }

    /// Where `len` bytes of the export from `offset` belong. Refused if they were not asked for.
    pub fn place(&mut self, offset: u64, len: u32) -> Result<&mut [u8], NbdError> {
        let (start, end) = self.claim(offset, len)?;
        if self.bytes.is_empty() {
            self.bytes = BytesMut::zeroed(self.len as usize);
        }
        Ok(&mut self.bytes[start as usize..end as usize])
    }

    /// Notes that `len` bytes of the export from `offset` are zero.
    pub fn claim(&mut self, offset: u64, len: u32) -> Result<(u32, u32), NbdError> {
        let outside = NbdError::Protocol("data outside of what was asked for");
        let start = offset.checked_sub(self.offset).and_then(|start| u32::try_from(start).ok());
        let Some(start) = start else { return Err(outside) };
        let Some(end) = start.checked_add(len).filter(|end| *end <= self.len) else { return Err(outside) };
        if len == 0 || self.came.len() > (self.len / CHUNK_MIN) as usize {
            return Err(NbdError::Protocol("a read in more pieces than it can have"));
        }
        self.came.push((start, end));
        Ok((start, end))
    }

    /// The bytes; `None` if all of them are a hole.
    pub fn finish(mut self) -> Result<Option<Bytes>, NbdError> {
        self.came.sort_unstable();
        let mut at = 0;
        for (start, end) in self.came {
            if start != at {
                return Err(NbdError::Protocol("a read with a gap or an overlap"));
            }
            at = end;
        }
        if at != self.len {
            return Err(NbdError::Protocol("a read that ended early"));
        }
        Ok((!self.bytes.is_empty()).then(|| self.bytes.freeze()))
    }
}

/// Extents of one meta context: (bytes, flags).
pub(super) type Extents = Vec<(u32, u32)>;

/// A block status in flight: extents of each context, in the order of `contexts`.
#[derive(Debug)]
pub(super) struct StatusInFlight {
    contexts: Vec<u32>,
    extents: Vec<Option<Extents>>,
}

impl StatusInFlight {
    pub fn new(contexts: &[u32]) -> Self {
        Self { contexts: contexts.to_vec(), extents: vec![None; contexts.len()] }
    }

    /// Takes the body of one block-status chunk.
    pub fn take(&mut self, body: &[u8]) -> Result<(), NbdError> {
        let malformed = NbdError::Protocol("a malformed block status");
        let Some((id, list)) = body.split_first_chunk::<4>() else { return Err(malformed) };
        let (pairs, rest) = list.as_chunks::<8>();
        if pairs.is_empty() || !rest.is_empty() {
            return Err(malformed);
        }
        let at = self.contexts.iter().position(|context| *context == u32::from_be_bytes(*id));
        let at = at.ok_or(NbdError::Protocol("a block status of an unknown context"))?;
        let extents: Extents = pairs
            .iter()
            .map(|[a, b, c, d, e, f, g, h]| {
                (u32::from_be_bytes([*a, *b, *c, *d]), u32::from_be_bytes([*e, *f, *g, *h]))
            })
            .collect();
        if extents.iter().any(|(bytes, _)| *bytes == 0) {
            return Err(NbdError::Protocol("an empty extent"));
        }
        match self.extents[at].replace(extents) {
            None => Ok(()),
            Some(_) => Err(NbdError::Protocol("two block statuses of one context")),
        }
    }

    pub fn finish(self) -> Result<Vec<Extents>, NbdError> {
        let all: Option<Vec<_>> = self.extents.into_iter().collect();
        all.ok_or(NbdError::Protocol("a context without a block status"))
    }
}

/// A server has no reason to cut a read smaller than a sector.
const CHUNK_MIN: u32 = 512;
