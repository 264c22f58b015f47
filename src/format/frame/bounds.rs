//! How large a frame may be, and what is wrong with bytes that are none.

use crate::{
    chunk::codec::CodecError,
    page::{GROUP_PAGES, PAGE},
};

/// Bytes of a frame before its runs.
pub const HEAD_LEN: usize = 56;
/// Bytes of one run.
pub const RUN_LEN: usize = 12;
/// Runs in one frame at the most.
pub const RUNS_MAX: usize = 4096;
/// Bytes in one frame at the most, unpacked: of pages, or of what says how to make them.
pub const RAW_MAX: usize = GROUP_PAGES * PAGE;
/// Bytes of one encoded frame at the most.
pub const FRAME_MAX: usize = HEAD_LEN + RUNS_MAX * RUN_LEN + RAW_MAX;
/// Pages in one frame of words or references at the most.
pub const MADE_PAGES_MAX: usize = 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("not a frame: {0}")]
    Malformed(&'static str),
    #[error("frame {seq}: its pages do not match their digest")]
    Corrupt { seq: u32 },
    #[error("frame {seq}: {source}")]
    Unpack { seq: u32, source: CodecError },
}
