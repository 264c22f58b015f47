//! What a plan is made of: packs, frames in them, and the pages that are used of each; and how much of a pack is read at once.

use crate::store::PointRef;
use lifeboat::{
    format::{frame::FrameHead, pack::IndexEntry, refs::PageRef},
    id::PackId,
};
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct PlannedPack {
    pub id: PackId,
    pub path: String,
    pub point: PointRef,
}

/// Frames are numbered from the newest to the oldest: of two that hold the same page, the one with the higher number
/// lies below. A frame of references stands above all frames of RAM of its point.
#[derive(Debug)]
pub(super) struct PlannedFrame {
    /// Index into the plan's packs.
    pub pack: u32,
    pub body_offset: u64,
    pub head: FrameHead,
}

/// `count` pages of the image from `first`, which stand in a frame from its page `raw_page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub frame: u32,
    pub raw_page: u32,
    pub first: u64,
    pub count: u32,
}

/// A pack, where it lies, and what it holds.
pub type PackIndex = (PackId, String, Vec<IndexEntry>);

/// The opened references of a point's frames, by frame seq.
pub type RefsBySeq = BTreeMap<u32, Vec<PageRef>>;

/// Bytes of pages, and bytes of a pack, in one segment at the most (a frame has 256 KiB at the most).
pub(super) const SEGMENT: u64 = 8 << 20;
/// Unneeded bytes that are read along to save a request.
pub(super) const GAP_MAX: u64 = 256 << 10;
