//! One point being cut, step by step. Promises: one that is dropped counts as put back, and what that leaves undone
//! in QEMU is made up for at the next `begin`.

use super::{Owned, barrier, blobs::Blob, blocking, failed, frozen, look::Begun};
use crate::capture::{
    meeting::Meeting,
    source::{CaptureError, Cut},
};
use async_trait::async_trait;
use lifeboat::{
    fault,
    format::manifest::{Image, PointMeta},
    id::PointId,
    page::{PAGE, PageGroup},
};
use std::{collections::VecDeque, sync::Arc};

pub struct GuestCut {
    /// `None` only while a blocking step has it, or after one panicked.
    state: Option<Owned>,
    point: PointId,
    begun: Arc<Begun>,
    phase: Phase,
    memory_bytes: u64,
    disk_bytes: u64,
}

/// How far it has come. Only ever moves down this list. Disks are handed over first: while their views are open, what
/// the guest writes costs scratch space; memory that is staged costs nothing more.
enum Phase {
    Running,
    /// Past the instant: what is still to be handed over.
    Cut {
        blobs: Vec<Blob>,
        first_disk: u16,
    },
    Disks {
        blobs: Vec<Blob>,
        first_disk: u16,
    },
    Memory {
        blobs: Vec<Blob>,
    },
    Blobs {
        groups: VecDeque<PageGroup>,
    },
    HandedOver,
    /// A step failed: only putting back is left.
    Broken,
}

impl GuestCut {
    pub fn new(state: Option<Owned>, point: PointId, begun: Begun) -> Self {
        let begun = Arc::new(begun);
        Self { state, point, begun, phase: Phase::Running, memory_bytes: 0, disk_bytes: 0 }
    }

    fn has_memory(&self) -> bool {
        !self.begun.ram.is_empty()
    }

    /// Runs one step on a blocking thread.
    async fn step<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut super::State) -> Result<T, CaptureError> + Send + 'static,
    ) -> Result<T, CaptureError> {
        let state = self.state.take().ok_or_else(|| failed("a step of this cut was cut short"))?;
        let (state, outcome) = blocking(state, work).await;
        self.state = state;
        outcome
    }

    fn disks(&mut self) -> Result<Option<&mut crate::capture::disk::Disks>, CaptureError> {
        let state = self.state.as_mut().ok_or_else(|| failed("a step of this cut was cut short"))?;
        Ok(state.disks.as_mut().map(|attached| &mut attached.disks))
    }

    async fn hand_over(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        loop {
            match &mut self.phase {
                Phase::Running => return Err(failed("pages after the instant were asked for before it")),
                Phase::Broken => return Err(failed("this cut has failed already")),
                Phase::HandedOver => return Ok(None),
                Phase::Cut { blobs, first_disk } => {
                    let (blobs, first_disk) = (std::mem::take(blobs), *first_disk);
                    if let Some(disks) = self.disks()? {
                        disks.open_views().await.map_err(super::look::disk_error)?;
                    }
                    fault::point("cut.views-open");
                    self.phase = Phase::Disks { blobs, first_disk };
                }
                Phase::Disks { blobs, first_disk } => {
                    let (blobs, first_disk) = (std::mem::take(blobs), *first_disk);
                    let group = self.next_of_disks(first_disk).await?;
                    if group.is_some() {
                        self.phase = Phase::Disks { blobs, first_disk };
                        return Ok(group);
                    }
                    self.phase = Phase::Memory { blobs };
                }
                Phase::Memory { blobs } => {
                    let blobs = std::mem::take(blobs);
                    if self.has_memory()
                        && let Some(group) = self.step(|state| state.memory.after().map_err(failed)).await?
                    {
                        self.phase = Phase::Memory { blobs };
                        return Ok(Some(group));
                    }
                    if self.has_memory() {
                        self.memory_bytes = self.step(|state| Ok(state.memory.changed_bytes())).await?;
                    }
                    self.phase = Phase::Blobs { groups: blobs.iter().flat_map(Blob::groups).collect() };
                }
                Phase::Blobs { groups } => match groups.pop_front() {
                    Some(group) => return Ok(Some(group)),
                    None => self.phase = Phase::HandedOver,
                },
            }
        }
    }

    async fn next_of_disks(&mut self, first_disk: u16) -> Result<Option<PageGroup>, CaptureError> {
        let Some(disks) = self.disks()? else { return Ok(None) };
        let Some((disk, runs, content)) = disks.next().await.map_err(failed)? else {
            disks.close_views().await.map_err(failed)?;
            return Ok(None);
        };
        fault::point("cut.reading");
        let image = u16::try_from(disk).ok().and_then(|disk| first_disk.checked_add(disk));
        let image = image.ok_or_else(|| failed("a page of a disk that is not there"))?;
        let group = PageGroup { image, runs, content };
        self.disk_bytes += group.pages() * PAGE as u64;
        Ok(Some(group))
    }
}

#[async_trait]
impl Cut for GuestCut {
    fn images(&self) -> Vec<Image> {
        self.begun.images.clone()
    }

    async fn before(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        if !self.has_memory() {
            return Ok(None);
        }
        let begun = self.begun.clone();
        self.step(move |state| barrier::before(state, &begun)).await
    }

    async fn freeze(&mut self) {
        if self.begun.freezable.is_none() {
            return;
        }
        let begun = self.begun.clone();
        let frozen = self.step(move |state| {
            frozen::freeze(state, &begun.domain, &begun.freezable);
            Ok(())
        });
        // The barrier finds out by itself that a step was cut short.
        let _ = frozen.await;
    }

    async fn flush(&mut self) {
        self.freeze().await;
        let begun = self.begun.clone();
        let flushed = self.step(move |state| {
            frozen::flushed(state, &begun.freezable);
            Ok(())
        });
        let _ = flushed.await;
    }

    async fn barrier(&mut self, meeting: Option<Arc<Meeting>>) -> Result<PointMeta, CaptureError> {
        if !matches!(self.phase, Phase::Running) {
            return Err(failed("a point has only one instant"));
        }
        self.phase = Phase::Broken;
        let (begun, point) = (self.begun.clone(), self.point);
        let barrier = self.step(move |state| barrier::cut(state, &begun, point, meeting.as_deref())).await?;
        self.memory_bytes = barrier.meta.stats.memory_changed_bytes;
        self.phase = Phase::Cut { blobs: barrier.blobs, first_disk: barrier.first_disk };
        Ok(barrier.meta)
    }

    async fn after(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        let handed = self.hand_over().await;
        if handed.is_err() {
            self.phase = Phase::Broken;
        }
        handed
    }

    fn changed(&self) -> (u64, u64) {
        (self.memory_bytes, self.disk_bytes)
    }

    async fn sent(mut self: Box<Self>) -> Result<(), CaptureError> {
        if !matches!(self.phase, Phase::HandedOver) {
            return Err(failed("a point that was not handed over whole can't be sent"));
        }
        let point = self.point;
        if let Some(disks) = self.disks()? {
            disks.sent(point).await.map_err(failed)?;
        }
        fault::point("cut.half-sent");
        // Large tables are compared.
        let sent = self.step(move |state| {
            state.memory.sent(point);
            state.unfinished = false;
            Ok(())
        });
        sent.await?;
        fault::point("cut.sent");
        Ok(())
    }

    async fn put_back(mut self: Box<Self>) -> Result<(), CaptureError> {
        if let Some(state) = &mut self.state {
            state.freezing.drop_frozen();
            state.memory.put_back();
            state.unfinished = false;
        }
        match self.disks()? {
            Some(disks) => disks.put_back().await.map_err(failed),
            None => Ok(()),
        }
    }
}

impl Drop for GuestCut {
    fn drop(&mut self) {
        if let Some(state) = &mut self.state
            && state.unfinished
        {
            state.freezing.drop_frozen();
            state.memory.put_back();
        }
    }
}
