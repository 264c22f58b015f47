//! Reading one disk's point-in-time view: which pages are wanted, many reads in flight, groups of pages out.
//! Promises: at most [`WINDOW_PAGES`] pages are held; pages of one group are in order. Called by `disk`. Calls
//! `capture::nbd`.
//!
//! No request crosses a border between [`CLUSTER`]s. QEMU 7.2 needs that: `hbitmap_status` there says "clean" of a range
//! that begins dirty and ends clean, and `copy-before-write` then reads the guest's *new* data in a cluster that it has
//! kept, if one request goes on into a cluster that it has not. Within one cluster all is kept or nothing is. For the
//! same reason `base:allocation` of a view is never asked: what is unallocated or zero QEMU finds out itself when it
//! is asked to read, and answers with a hole, without reading or sending it.

use super::{
    DiskError,
    pages::{Kind, Pager, Segment},
    scratch::Scratch,
};
use crate::capture::nbd::{Client, NbdError, PendingRead, REQUEST_MAX, STATE_DIRTY};
use bytes::{Bytes, BytesMut};
use lifeboat::page::{Content, GROUP_PAGES, PAGE, PageRun, is_zero};
use std::{collections::VecDeque, sync::Arc};

pub(super) struct View {
    target: String,
    bytes: u64,
    client: Client,
    /// Everything is wanted but zeros; otherwise what the dirty bitmap says, zeros included.
    full: bool,
    scratch: Arc<Scratch>,
    pager: Pager,
    segments: VecDeque<Segment>,
    group: Group,
    groups: VecDeque<Group>,
    pages_in_flight: usize,
    zeros: Vec<PageRun>,
    ready: VecDeque<(Vec<PageRun>, Content)>,
}

/// A group of pages being read.
#[derive(Default)]
struct Group {
    reads: Vec<(PageRun, PendingRead)>,
    pages: usize,
}

impl View {
    /// `client` is connected to the export of a disk of `bytes` bytes; with its dirty bitmap unless `full`.
    pub fn new(
        target: &str,
        bytes: u64,
        full: bool,
        client: Client,
        scratch: Arc<Scratch>,
    ) -> Result<Self, DiskError> {
        if client.size() != bytes {
            return Err(DiskError::Reconfigured { target: target.into(), what: "its size changed" });
        }
        Ok(Self {
            target: target.into(),
            bytes,
            client,
            full,
            scratch,
            pager: Pager::new(0, bytes),
            segments: VecDeque::new(),
            group: Group::default(),
            groups: VecDeque::new(),
            pages_in_flight: 0,
            zeros: Vec::new(),
            ready: VecDeque::new(),
        })
    }

    /// The next pages; `None` once all were told. Not cancel-safe: a view whose read was given up is closed.
    pub async fn next(&mut self) -> Result<Option<(Vec<PageRun>, Content)>, DiskError> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Ok(Some(ready));
            }
            self.scratch.check()?;
            let target = self.target.clone();
            let view = |source| DiskError::View { target, source };
            match self.advance().await {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) => return Err(view(error)),
            }
        }
    }

    /// Does one step; `false` when there is nothing left to do.
    async fn advance(&mut self) -> Result<bool, NbdError> {
        self.fill().await?;
        if let Some(group) = self.groups.pop_front() {
            self.pages_in_flight -= group.pages;
            self.collect(group).await?;
        } else if self.zeros.is_empty() {
            return Ok(false);
        } else {
            self.flush_zeros();
        }
        if self.zeros.len() >= ZERO_RUNS {
            self.flush_zeros();
        }
        Ok(true)
    }

    /// Keeps the window full of reads.
    async fn fill(&mut self) -> Result<(), NbdError> {
        while self.pages_in_flight < WINDOW_PAGES {
            let Some(segment) = self.next_segment().await? else {
                self.close_group();
                return Ok(());
            };
            self.start_reads(segment).await?;
        }
        Ok(())
    }

    async fn next_segment(&mut self) -> Result<Option<Segment>, NbdError> {
        loop {
            if let Some(segment) = self.segments.pop_front() {
                return Ok(Some(segment));
            }
            if self.pager.is_done() {
                return Ok(None);
            }
            self.look_further().await?;
        }
    }

    /// Finds out which of the next bytes are wanted.
    async fn look_further(&mut self) -> Result<(), NbdError> {
        let left = self.bytes - self.pager.at();
        if self.full {
            self.pager.take(left, Kind::Data, &mut self.segments);
            return Ok(());
        }
        let len = u32::try_from(left).unwrap_or(u32::MAX).min(REQUEST_MAX);
        for span in self.client.status(self.pager.at(), len).await? {
            let dirty = span.flags.first().is_some_and(|flags| flags & STATE_DIRTY != 0);
            self.pager.take(span.bytes, if dirty { Kind::Data } else { Kind::Skip }, &mut self.segments);
        }
        Ok(())
    }

    async fn start_reads(&mut self, mut segment: Segment) -> Result<(), NbdError> {
        let room = (GROUP_PAGES - self.group.pages) as u64;
        let in_cluster = CLUSTER_PAGES - segment.first % CLUSTER_PAGES;
        let count = segment.count.min(room).min(in_cluster);
        let (offset, end) = (segment.first * PAGE as u64, (segment.first + count) * PAGE as u64);
        let read = self.client.read(offset, (end.min(self.bytes) - offset) as u32).await?;
        self.group.reads.push((PageRun::new(segment.first, count as u32), read));
        self.group.pages += count as usize;
        self.pages_in_flight += count as usize;
        if self.group.pages == GROUP_PAGES {
            self.close_group();
        }
        segment.first += count;
        segment.count -= count;
        if segment.count > 0 {
            self.segments.push_front(segment);
        }
        Ok(())
    }

    fn close_group(&mut self) {
        if self.group.pages > 0 {
            self.groups.push_back(std::mem::take(&mut self.group));
        }
    }

    fn flush_zeros(&mut self) {
        let mut runs = std::mem::take(&mut self.zeros);
        runs.sort_unstable_by_key(|run| run.first);
        self.ready.push_back((runs, Content::Zero));
    }

    /// Waits for a group's bytes and sorts its pages into data and zeros.
    async fn collect(&mut self, group: Group) -> Result<(), NbdError> {
        let (mut runs, mut zeros, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for (run, read) in group.reads {
            let pages = run.first..run.first + u64::from(run.count);
            let Some(bytes) = read.wait().await? else {
                pages.for_each(|page| PageRun::push_page(&mut zeros, page));
                continue;
            };
            let bytes = padded(bytes, run);
            for (page, content) in pages.zip(bytes.chunks(PAGE)) {
                PageRun::push_page(if is_zero(content) { &mut zeros } else { &mut runs }, page);
            }
            parts.push(bytes);
        }
        let all = zeros.is_empty();
        if !self.full {
            self.zeros.extend(zeros);
        }
        if runs.is_empty() {
            return Ok(());
        }
        let bytes = match parts.as_slice() {
            [bytes] if all => bytes.clone(),
            parts => {
                let pages = parts.iter().flat_map(|bytes| bytes.chunks(PAGE));
                let mut joined = BytesMut::with_capacity(group.pages * PAGE);
                pages.filter(|page| all || !is_zero(page)).for_each(|page| joined.extend_from_slice(page));
                joined.freeze()
            }
        };
        self.ready.push_back((runs, Content::Bytes(bytes)));
        Ok(())
    }
}

/// The last page of a disk may be cut short: pads it with zeros.
fn padded(bytes: Bytes, run: PageRun) -> Bytes {
    let whole = run.bytes() as usize;
    if bytes.len() == whole {
        return bytes;
    }
    let mut padded = BytesMut::zeroed(whole);
    padded[..bytes.len()].copy_from_slice(&bytes);
    padded.freeze()
}

/// Pages in flight: 8 MiB of a disk.
const WINDOW_PAGES: usize = 2048;
/// `copy-before-write` keeps this much at once (64 KiB is its least, and nothing about our scratch makes it more).
const CLUSTER: usize = 64 << 10;
const CLUSTER_PAGES: u64 = (CLUSTER / PAGE) as u64;
/// Runs of zeros that are told together.
const ZERO_RUNS: usize = 1024;
