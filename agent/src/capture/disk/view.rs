//! Reading one disk's point-in-time view: which pages are wanted, many reads in flight, groups of pages out.
//! Promises: at most [`WINDOW_PAGES`] pages are held; pages of one group are in order. Called by `disk`. Calls
//! `capture::nbd`.
//!
//! No read crosses a border between [`CLUSTER`]s. QEMU 7.2 needs that: `hbitmap_status` there says "clean" of a range
//! that begins dirty and ends clean, and `copy-before-write` then reads the guest's *new* data in a cluster that it has
//! kept, if one request goes on into a cluster that it has not. Within one cluster all is kept or nothing is.
//!
//! For the same reason `base:allocation` of a view may tell what is zero *now*. It is believed where our scratch holds no
//! data, looked at after the answer: what was not zero at the cut was kept there before it changed. So a disk
//! costs what is in it, however large it is.

use super::{
    DiskError,
    pages::{Kind, Pager, Segment},
    scratch::Scratch,
};
use bytes::{Bytes, BytesMut};
use lifeboat::nbd::{Client, NbdError, PendingRead, STATE_DIRTY, STATE_ZERO, STATUS_SPAN_MAX};
use lifeboat::page::{Content, GROUP_PAGES, PAGE, PageRun, is_zero};
use std::{collections::VecDeque, sync::Arc};

pub(super) struct View {
    target: String,
    bytes: u64,
    client: Client,
    /// What changed is wanted, zeros included; without it everything is but zeros.
    changes: Option<Client>,
    scratch: Arc<Scratch>,
    pager: Pager,
    /// What is known of the bytes that the pager takes next: how many, and whether they are wanted.
    known: VecDeque<(u64, bool)>,
    /// Bytes of the next question what is zero.
    span: u64,
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
    /// Connected to the export of a disk of `bytes` bytes: `client` with its allocation, `changes` with its dirty bitmap.
    pub fn new(
        target: &str,
        bytes: u64,
        client: Client,
        changes: Option<Client>,
        scratch: Arc<Scratch>,
    ) -> Result<Self, DiskError> {
        if client.size() != bytes {
            return Err(DiskError::Reconfigured { target: target.into(), what: "its size changed" });
        }
        Ok(Self {
            target: target.into(),
            bytes,
            client,
            // Of a whole disk nothing needs to be asked.
            known: changes.is_none().then_some((bytes, true)).into_iter().collect(),
            changes,
            scratch,
            pager: Pager::new(0, bytes),
            span: SPAN_MIN,
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
            if !self.advance().await? {
                return Ok(None);
            }
        }
    }

    /// Does one step; `false` when there is nothing left to do.
    async fn advance(&mut self) -> Result<bool, DiskError> {
        self.fill().await?;
        if let Some(group) = self.groups.pop_front() {
            self.pages_in_flight -= group.pages;
            self.collect(group).await.map_err(|source| self.failed(source))?;
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
    async fn fill(&mut self) -> Result<(), DiskError> {
        while self.pages_in_flight < WINDOW_PAGES && self.zeros.len() < ZERO_RUNS {
            let Some(segment) = self.next_segment().await? else {
                self.close_group();
                return Ok(());
            };
            if segment.zero {
                self.push_zeros(segment);
                continue;
            }
            self.start_reads(segment).await.map_err(|source| self.failed(source))?;
        }
        Ok(())
    }

    async fn next_segment(&mut self) -> Result<Option<Segment>, DiskError> {
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

    /// Finds out which of the next bytes are wanted, and which of these are zero.
    async fn look_further(&mut self) -> Result<(), DiskError> {
        let Some((bytes, wanted)) = self.known.pop_front() else { return self.ask_for_changes().await };
        if !wanted {
            self.pager.take(bytes, Kind::Skip, &mut self.segments);
            return Ok(());
        }
        // What is small is read without asking.
        if bytes < ALLOCATION_FROM && self.changes.is_some() {
            self.pager.take(bytes, Kind::Data, &mut self.segments);
            return Ok(());
        }
        let (at, len) = (self.pager.at(), bytes.min(self.span));
        let spans = self.client.status(at, len as u32).await.map_err(|source| self.failed(source))?;
        let told: u64 = spans.iter().map(|span| span.bytes).sum();
        if told < bytes {
            self.known.push_front((bytes - told, true));
        }
        // QEMU's search keeps its main thread busy: far only where there is nothing to be found.
        let alike = spans.len() == 1 && told == len;
        self.span = if alike { (2 * self.span).min(SPAN_MAX) } else { SPAN_MIN };
        for span in spans {
            if span.flags.first().is_some_and(|flags| flags & STATE_ZERO != 0) {
                self.take_zeros(span.bytes)?;
            } else {
                self.pager.take(span.bytes, Kind::Data, &mut self.segments);
            }
        }
        Ok(())
    }

    async fn ask_for_changes(&mut self) -> Result<(), DiskError> {
        let Some(changes) = &self.changes else { return Ok(()) };
        let len = u32::try_from(self.bytes - self.pager.at()).unwrap_or(u32::MAX).min(STATUS_SPAN_MAX);
        let spans = changes.status(self.pager.at(), len).await.map_err(|source| self.failed(source))?;
        let is_dirty = |flags: &[u32]| flags.first().is_some_and(|flags| flags & STATE_DIRTY != 0);
        self.known.extend(spans.into_iter().map(|span| (span.bytes, is_dirty(&span.flags))));
        Ok(())
    }

    /// The next `bytes` are said to be zero, and were so at the cut but for what was kept.
    fn take_zeros(&mut self, bytes: u64) -> Result<(), DiskError> {
        let kind = if self.changes.is_some() { Kind::Zero } else { Kind::Skip };
        let end = self.pager.at() + bytes;
        for kept in self.scratch.kept(self.pager.at(), end)? {
            self.pager.take(kept.start - self.pager.at(), kind, &mut self.segments);
            self.pager.take(kept.end - kept.start, Kind::Data, &mut self.segments);
        }
        self.pager.take(end - self.pager.at(), kind, &mut self.segments);
        Ok(())
    }

    fn push_zeros(&mut self, segment: Segment) {
        let (mut first, end) = (segment.first, segment.first + segment.count);
        while first < end {
            let count = u32::try_from(end - first).unwrap_or(u32::MAX);
            self.zeros.push(PageRun::new(first, count));
            first += u64::from(count);
        }
    }

    fn failed(&self, source: NbdError) -> DiskError {
        DiskError::View { target: self.target.clone(), source }
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
        if self.changes.is_some() {
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

/// The first question what is zero is about so many bytes, and each one after an answer that was not all alike …
const SPAN_MIN: u64 = 32 << 20;
/// … and about twice as many after each that was, up to this.
const SPAN_MAX: u64 = 128 << 20;
/// A stretch of changed bytes that is worth the question.
const ALLOCATION_FROM: u64 = 8 << 20;
/// Pages in flight: 8 MiB of a disk.
const WINDOW_PAGES: usize = 2048;
/// `copy-before-write` keeps this much at once (64 KiB is its least, and nothing about our scratch makes it more).
const CLUSTER: usize = 64 << 10;
const CLUSTER_PAGES: u64 = (CLUSTER / PAGE) as u64;
/// Runs of zeros that are told together.
const ZERO_RUNS: usize = 1024;
