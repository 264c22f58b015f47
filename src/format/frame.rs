//! Frames: one group of pages, compressed and digested. The same bytes travel on the wire and rest in packs.
//! Promises: `open` returns the very bytes that were sealed, or an error; the digest covers what they are *and* where
//! they belong. A frame holds pages, or says how to make them: changed words ([`super::words`]) over what older frames
//! make of the page, or where in the same point the content stands ([`super::refs`]).
//! Called by the agent's pipeline, the site's intake, restore and verify.
//!
//! Layout (little-endian), `HEAD_LEN` bytes, then the runs, then the body:
//! `0 magic "LBF1" │ 4 seq u32 │ 8 image u16 │ 10 codec u8 │ 11 zero u8 │ 12 raw_len u32 │ 16 body_len u32 │ 20 runs u32 │
//! 24 digest 32`, then per run `first u64 │ count u32`.

pub(super) mod bounds;

pub use bounds::{FRAME_MAX, FrameError, HEAD_LEN, MADE_PAGES_MAX, RAW_MAX, RUN_LEN, RUNS_MAX};

use crate::{
    chunk::{codec, digest::Digest},
    format::{refs, words},
    page::{Content, PAGE, PageGroup, PageRun},
};
use bytes::{BufMut, Bytes, BytesMut};

const MAGIC: [u8; 4] = *b"LBF1";
/// How a frame's body is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// The pages as they are.
    Plain = 0,
    Zstd = 1,
    /// No body: every page of the runs is zero.
    Zero = 2,
    /// Changed words over what the frames below this one (lower seq, then older points) make of each page: a
    /// [`words`] list. Packed by zstd if the body is shorter than that list.
    Words = 3,
    /// Each page equals a page of a RAM image of the same point: a [`refs`] list, packed like `Words`.
    Refs = 4,
}

impl Codec {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Plain, Self::Zstd, Self::Zero, Self::Words, Self::Refs]
            .into_iter()
            .find(|codec| *codec as u8 == byte)
    }

    /// Whether the content of the pages stands in other frames, at least in part.
    pub fn leans_on_others(self) -> bool {
        match self {
            Self::Plain | Self::Zstd | Self::Zero => false,
            Self::Words | Self::Refs => true,
        }
    }
}

/// What a frame says of itself; readable without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// Place in its point: 0, 1, 2 … Where two frames of a point hold the same page, the higher one counts.
    pub seq: u32,
    pub image: u16,
    pub codec: Codec,
    pub raw_len: u32,
    pub body_len: u32,
    pub digest: Digest,
    pub runs: Vec<PageRun>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub head: FrameHead,
    pub body: Bytes,
}

impl Frame {
    /// Packs a group at zstd `level`; keeps it plain where compression does not pay, or at level 0.
    pub fn seal(seq: u32, group: &PageGroup, level: i32) -> Result<Self, FrameError> {
        let (codec, raw, body) = match &group.content {
            Content::Zero => (Codec::Zero, Bytes::new(), Bytes::new()),
            Content::Bytes(raw) => match codec::compress(raw, level) {
                Some(packed) => (Codec::Zstd, raw.clone(), Bytes::from(packed)),
                None => (Codec::Plain, raw.clone(), raw.clone()),
            },
        };
        Self::of(seq, group.image, group.runs.clone(), codec, &raw, body)
    }

    /// Packs a list of changed words.
    pub fn seal_words(seq: u32, made: &words::WordList, level: i32) -> Result<Self, FrameError> {
        words::check(made.pages(), &made.raw)?;
        Self::of_list(seq, made.image, made.runs.clone(), Codec::Words, &made.raw, level)
    }

    /// Packs a list of references.
    pub fn seal_refs(seq: u32, made: &refs::RefList, level: i32) -> Result<Self, FrameError> {
        refs::check(made.pages(), &made.raw)?;
        Self::of_list(seq, made.image, made.runs.clone(), Codec::Refs, &made.raw, level)
    }

    fn of_list(
        seq: u32,
        image: u16,
        runs: Vec<PageRun>,
        codec: Codec,
        raw: &Bytes,
        level: i32,
    ) -> Result<Self, FrameError> {
        let body = codec::compress(raw, level).map_or_else(|| raw.clone(), Bytes::from);
        Self::of(seq, image, runs, codec, raw, body)
    }

    fn of(
        seq: u32,
        image: u16,
        runs: Vec<PageRun>,
        codec: Codec,
        raw: &[u8],
        body: Bytes,
    ) -> Result<Self, FrameError> {
        let mut head = FrameHead {
            seq,
            image,
            codec,
            raw_len: u32::try_from(raw.len()).map_err(|_| FrameError::Malformed("too many bytes"))?,
            body_len: u32::try_from(body.len()).map_err(|_| FrameError::Malformed("too many bytes"))?,
            digest: Digest::from_bytes([0; 32]),
            runs,
        };
        head.check()?;
        head.digest = head.digest_over(raw);
        Ok(Self { head, body })
    }

    /// Unpacks and verifies; `out` then holds the pages' bytes (nothing for a zero frame), or the checked list that says
    /// how to make them.
    pub fn open(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        open(&self.head, &self.body, out)
    }

    pub fn encoded_len(&self) -> usize {
        self.head.encoded_len() + self.body.len()
    }
}

/// Unpacks and verifies `body` as the body of the frame that `head` describes; see [`Frame::open`].
pub fn open(head: &FrameHead, body: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    out.clear();
    if body.len() != head.body_len as usize {
        return Err(FrameError::Malformed("its body is cut short"));
    }
    match head.codec {
        Codec::Zero => {}
        Codec::Words | Codec::Refs if head.body_len == head.raw_len => out.extend_from_slice(body),
        Codec::Plain => out.extend_from_slice(body),
        Codec::Zstd | Codec::Words | Codec::Refs => codec::decompress(body, head.raw_len as usize, out)
            .map_err(|source| FrameError::Unpack { seq: head.seq, source })?,
    }
    if head.digest_over(out) != head.digest {
        return Err(FrameError::Corrupt { seq: head.seq });
    }
    match head.codec {
        Codec::Zero | Codec::Plain | Codec::Zstd => Ok(()),
        Codec::Words => words::check(head.pages() as usize, out),
        Codec::Refs => refs::check(head.pages() as usize, out),
    }
}

impl FrameHead {
    pub fn encoded_len(&self) -> usize {
        HEAD_LEN + self.runs.len() * RUN_LEN
    }

    pub fn encode(&self, out: &mut BytesMut) {
        out.reserve(self.encoded_len());
        out.put_slice(&MAGIC);
        out.put_slice(&self.identity());
        out.put_u32_le(self.body_len);
        out.put_u32_le(self.runs.len() as u32);
        out.put_slice(self.digest.as_bytes());
        self.encode_runs(out);
    }

    /// Decodes the fixed part; the caller then reads [`Prefix::runs_len`] bytes and calls [`Prefix::with_runs`].
    pub fn decode_prefix(bytes: &[u8; HEAD_LEN]) -> Result<Prefix, FrameError> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != MAGIC {
            return Err(FrameError::Malformed("wrong magic"));
        }
        let codec = Codec::from_byte(bytes[10])
            .ok_or(FrameError::Malformed("unknown codec: a newer release may know it"))?;
        if bytes[11] != 0 {
            return Err(FrameError::Malformed("reserved byte is set"));
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[24..56]);
        let runs = u32_at(20) as usize;
        let head = FrameHead {
            seq: u32_at(4),
            image: u16::from_le_bytes([bytes[8], bytes[9]]),
            codec,
            raw_len: u32_at(12),
            body_len: u32_at(16),
            digest: Digest::from_bytes(digest),
            runs: Vec::new(),
        };
        if runs == 0 || runs > RUNS_MAX {
            return Err(FrameError::Malformed("no runs or too many"));
        }
        if head.raw_len as usize > RAW_MAX || head.body_len as usize > RAW_MAX {
            return Err(FrameError::Malformed("larger than a frame may be"));
        }
        Ok(Prefix { head, runs })
    }

    /// Decodes a whole head from the front of `bytes`; also returns the head's length.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), FrameError> {
        let short = FrameError::Malformed("cut short");
        let fixed: &[u8; HEAD_LEN] =
            bytes.get(..HEAD_LEN).and_then(|part| part.try_into().ok()).ok_or(short.clone())?;
        let prefix = Self::decode_prefix(fixed)?;
        let len = HEAD_LEN + prefix.runs_len();
        let head = prefix.with_runs(bytes.get(HEAD_LEN..len).ok_or(short)?)?;
        Ok((head, len))
    }

    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count)).sum()
    }

    /// Bytes 4..16 of the encoding: all that says what the frame is, except how well it packed.
    fn identity(&self) -> [u8; 12] {
        let mut out = [0; 12];
        out[..4].copy_from_slice(&self.seq.to_le_bytes());
        out[4..6].copy_from_slice(&self.image.to_le_bytes());
        out[6] = self.codec as u8;
        out[8..].copy_from_slice(&self.raw_len.to_le_bytes());
        out
    }

    fn encode_runs(&self, out: &mut BytesMut) {
        for run in &self.runs {
            out.put_u64_le(run.first);
            out.put_u32_le(run.count);
        }
    }

    fn digest_over(&self, raw: &[u8]) -> Digest {
        let mut runs = BytesMut::with_capacity(self.runs.len() * RUN_LEN);
        self.encode_runs(&mut runs);
        Digest::of_parts(&[&self.identity(), &runs, raw])
    }

    /// Runs ascend without overlap and cover exactly `raw_len` bytes.
    fn check(&self) -> Result<(), FrameError> {
        if self.runs.is_empty() || self.runs.len() > RUNS_MAX {
            return Err(FrameError::Malformed("no runs or too many"));
        }
        let (mut next, mut bytes) = (0u64, 0u64);
        for run in &self.runs {
            let end = run.end().ok_or(FrameError::Malformed("a run is empty or wraps"))?;
            // Offsets in bytes must fit as well, for whoever multiplies.
            if run.first < next || end > i64::MAX as u64 / PAGE as u64 {
                return Err(FrameError::Malformed("runs overlap, descend or reach too far"));
            }
            next = end;
            bytes = bytes.saturating_add(run.bytes());
        }
        let raw = u64::from(self.raw_len);
        match self.codec {
            Codec::Zero if raw == 0 && self.body_len == 0 => Ok(()),
            Codec::Plain if raw == bytes && self.body_len == self.raw_len && bytes <= RAW_MAX as u64 => {
                Ok(())
            }
            Codec::Zstd if raw == bytes && bytes <= RAW_MAX as u64 => Ok(()),
            Codec::Words | Codec::Refs => {
                let pages = bytes / PAGE as u64;
                let fits = match self.codec {
                    Codec::Words => words::may_be_as_long(pages, raw),
                    _ => refs::is_as_long(pages, raw),
                };
                if pages <= MADE_PAGES_MAX as u64 && fits && self.body_len <= self.raw_len {
                    Ok(())
                } else {
                    Err(FrameError::Malformed("its lengths contradict each other"))
                }
            }
            _ => Err(FrameError::Malformed("its lengths contradict each other")),
        }
    }
}

/// The fixed part of a head, checked; its runs still to be read.
#[derive(Debug)]
pub struct Prefix {
    head: FrameHead,
    runs: usize,
}

impl Prefix {
    pub fn runs_len(&self) -> usize {
        self.runs * RUN_LEN
    }
    pub fn body_len(&self) -> usize {
        self.head.body_len as usize
    }
    pub fn with_runs(mut self, bytes: &[u8]) -> Result<FrameHead, FrameError> {
        if bytes.len() != self.runs_len() {
            return Err(FrameError::Malformed("cut short"));
        }
        self.head.runs = bytes
            .chunks_exact(RUN_LEN)
            .map(|run| {
                let (mut first, mut count) = ([0; 8], [0; 4]);
                first.copy_from_slice(&run[..8]);
                count.copy_from_slice(&run[8..]);
                PageRun::new(u64::from_le_bytes(first), u32::from_le_bytes(count))
            })
            .collect();
        self.head.check()?;
        Ok(self.head)
    }
}

#[cfg(test)]
mod tests;
