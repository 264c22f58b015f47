//! Reading one disk's point-in-time view: which pages are wanted, many reads in flight, groups of pages out.
//! Promises: extents that are known to be zero are never read; at most [`WINDOW_PAGES`] pages are held; pages of one
//! group are in order. Called by `disk`. Calls `capture::nbd`.

use super::{
    DiskError,
    pages::{Kind, Pager, Segment},
    scratch::Scratch,
};
use crate::capture::nbd::{Client, NbdError, PendingRead, REQUEST_MAX, STATE_DIRTY, STATE_ZERO};
use bytes::{Bytes, BytesMut};
use lifeboat::page::{Content, GROUP_PAGES, PAGE, PageRun, is_zero};
use std::{collections::VecDeque, sync::Arc};

pub(super) struct View {
    target: String,
    bytes: u64,
    /// Serves `base:allocation` and the bytes.
    data: Client,
    /// Serves the dirty bitmap, where only changes are wanted.
    changes: Option<Client>,
    scratch: Arc<Scratch>,
    pager: Pager,
    segments: VecDeque<Segment>,
    /// Changed extents whose allocation has not been looked up yet.
    unrefined: VecDeque<Segment>,
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
    /// `data` and `changes` are connections to the export of a disk of `bytes` bytes.
    pub fn new(
        target: &str,
        bytes: u64,
        data: Client,
        changes: Option<Client>,
        scratch: Arc<Scratch>,
    ) -> Result<Self, DiskError> {
        let sizes_agree =
            data.size() == bytes && changes.as_ref().is_none_or(|changes| changes.size() == bytes);
        if !sizes_agree {
            return Err(DiskError::Reconfigured { target: target.into(), what: "its size changed" });
        }
        Ok(Self {
            target: target.into(),
            bytes,
            data,
            changes,
            scratch,
            pager: Pager::new(0, bytes),
            segments: VecDeque::new(),
            unrefined: VecDeque::new(),
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
            match segment.kind {
                Kind::Data => self.start_reads(segment).await?,
                Kind::Zero => self.note_zero(segment),
                Kind::Skip => {}
            }
            if self.zeros.len() >= ZERO_RUNS && self.groups.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn next_segment(&mut self) -> Result<Option<Segment>, NbdError> {
        loop {
            if let Some(segment) = self.segments.pop_front() {
                return Ok(Some(segment));
            }
            if let Some(changed) = self.unrefined.pop_front() {
                self.refine(changed).await?;
            } else if self.pager.is_done() {
                return Ok(None);
            } else {
                self.look_further().await?;
            }
        }
    }

    /// Asks the server which of the next bytes are wanted.
    async fn look_further(&mut self) -> Result<(), NbdError> {
        let len = request_len(self.bytes - self.pager.at());
        let (client, out) = match &self.changes {
            Some(changes) => (changes, &mut self.unrefined),
            None => (&self.data, &mut self.segments),
        };
        for span in client.status(self.pager.at(), len).await? {
            let flags = span.flags.first().copied().unwrap_or_default();
            let kind = match &self.changes {
                Some(_) if flags & STATE_DIRTY != 0 => Kind::Data,
                Some(_) => Kind::Skip,
                // In a full pass a page that is not told is zero.
                None if flags & STATE_ZERO != 0 => Kind::Skip,
                None => Kind::Data,
            };
            self.pager.take(span.bytes, kind, out);
        }
        Ok(())
    }

    /// Finds the zeros in a changed extent (a discard, for example), where that is cheaper than reading them.
    async fn refine(&mut self, changed: Segment) -> Result<(), NbdError> {
        if changed.count < REFINE_PAGES {
            self.segments.push_back(changed);
            return Ok(());
        }
        let end = (changed.first + changed.count) * PAGE as u64;
        let mut pager = Pager::new(changed.first * PAGE as u64, end.min(self.bytes));
        // One answer at a time: the rest of a long extent waits its turn, so that memory stays bounded.
        for span in self.data.status(pager.at(), request_len(end.min(self.bytes) - pager.at())).await? {
            let zero = span.flags.first().is_some_and(|flags| flags & STATE_ZERO != 0);
            pager.take(span.bytes, if zero { Kind::Zero } else { Kind::Data }, &mut self.segments);
        }
        if !pager.is_done() {
            // The page in which the answer ended was not told yet: begin again with it.
            let first = pager.at() / PAGE as u64;
            if first == changed.first {
                self.segments.push_back(Segment { count: 1, ..changed });
            }
            let first = first.max(changed.first + 1);
            let count = changed.first + changed.count - first;
            if count > 0 {
                self.unrefined.push_front(Segment { kind: Kind::Data, first, count });
            }
        }
        Ok(())
    }

    async fn start_reads(&mut self, mut segment: Segment) -> Result<(), NbdError> {
        let count = segment.count.min((GROUP_PAGES - self.group.pages) as u64);
        let (offset, end) = (segment.first * PAGE as u64, (segment.first + count) * PAGE as u64);
        let read = self.data.read(offset, request_len(end.min(self.bytes) - offset)).await?;
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

    fn note_zero(&mut self, segment: Segment) {
        let (mut first, mut left) = (segment.first, segment.count);
        while left > 0 {
            let count = u32::try_from(left).unwrap_or(u32::MAX);
            self.zeros.push(PageRun::new(first, count));
            first += u64::from(count);
            left -= u64::from(count);
        }
    }

    fn flush_zeros(&mut self) {
        let mut runs = std::mem::take(&mut self.zeros);
        runs.sort_unstable_by_key(|run| run.first);
        self.ready.push_back((runs, Content::Zero));
    }

    /// Waits for a group's bytes and sorts its pages into data and zeros.
    async fn collect(&mut self, group: Group) -> Result<(), NbdError> {
        let mut parts = Vec::with_capacity(group.reads.len());
        for (run, read) in group.reads {
            parts.push((run, padded(read.wait().await?, run)));
        }
        let (mut runs, mut zeros) = (Vec::new(), Vec::new());
        for (run, bytes) in &parts {
            for (page, content) in (run.first..).zip(bytes.chunks(PAGE)) {
                PageRun::push_page(if is_zero(content) { &mut zeros } else { &mut runs }, page);
            }
        }
        let all = zeros.is_empty();
        if self.changes.is_some() {
            self.zeros.extend(zeros);
        }
        if runs.is_empty() {
            return Ok(());
        }
        let bytes = match parts.as_slice() {
            [(_, bytes)] if all => bytes.clone(),
            parts => {
                let pages = parts.iter().flat_map(|(_, bytes)| bytes.chunks(PAGE));
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

/// As much of `left` as one request may ask for.
fn request_len(left: u64) -> u32 {
    u32::try_from(left).unwrap_or(u32::MAX).min(REQUEST_MAX)
}

/// Pages in flight: 8 MiB of a disk.
const WINDOW_PAGES: usize = 2048;
/// A changed extent is looked up before it is read from this size on (256 KiB): below, asking costs as much as reading.
const REFINE_PAGES: u64 = 64;
/// Runs of zeros that are told together.
const ZERO_RUNS: usize = 1024;
