//! Compressing and digesting loads, several at a time, handing the frames back in order.
//! Promises: a load (at most 256 KiB, and as much sealed) is in work only on a lane of those that all VMs share; one
//! needs none, so that nobody waits for others for ever. Called by the protection actor. With no lanes it works in
//! place, which is what the simulation wants.

use crate::ship::{budget::Lanes, delta::Load};
use lifeboat::format::frame::{Frame, FrameError};
use std::collections::VecDeque;
use tokio::{sync::OwnedSemaphorePermit, task::JoinHandle};

#[derive(Debug)]
pub struct Sealer {
    level: i32,
    lanes: Lanes,
    next: u32,
    working: VecDeque<(Working, Option<OwnedSemaphorePermit>)>,
    /// A lane for the next group, taken when [`Self::is_full`] was asked.
    lane: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
enum Working {
    Done(Result<Frame, FrameError>),
    Elsewhere(JoinHandle<Result<Frame, FrameError>>),
}

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("the point has more frames than can be numbered")]
    TooMany,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the thread that compressed a group died")]
    Died,
}

impl Sealer {
    pub fn new(level: i32, lanes: Lanes) -> Self {
        Self { level, lanes, next: 0, working: VecDeque::new(), lane: None }
    }

    /// Groups put from now on are compressed at this level.
    pub fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Takes a load into work. Check [`Self::is_full`] first, so that the bound holds.
    pub fn put(&mut self, load: Load) -> Result<(), SealError> {
        let (seq, level) = (self.next, self.level);
        self.next = seq.checked_add(1).ok_or(SealError::TooMany)?;
        let working = if self.lanes.in_place() {
            Working::Done(seal(seq, &load, level))
        } else {
            Working::Elsewhere(tokio::task::spawn_blocking(move || seal(seq, &load, level)))
        };
        self.working.push_back((working, self.lane.take()));
        Ok(())
    }

    /// Whether a frame must be taken before the next group is put.
    pub fn is_full(&mut self) -> bool {
        if self.working.is_empty() || self.lane.is_some() {
            return false;
        }
        self.lane = self.lanes.try_take(self.working.len());
        self.lane.is_none()
    }

    /// The next frame in order, once it is ready; `None` when nothing is in work. Not cancel-safe.
    pub async fn take(&mut self) -> Result<Option<Frame>, SealError> {
        match self.working.pop_front() {
            None => Ok(None),
            Some((Working::Done(frame), _lane)) => Ok(Some(frame?)),
            Some((Working::Elsewhere(work), _lane)) => Ok(Some(work.await.map_err(|_| SealError::Died)??)),
        }
    }
}

fn seal(seq: u32, load: &Load, level: i32) -> Result<Frame, FrameError> {
    match load {
        Load::Pages(group) => Frame::seal(seq, group, level),
        Load::Words(list) => Frame::seal_words(seq, list, level),
        Load::Refs(list) => Frame::seal_refs(seq, list, level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat::page::{Content, PageGroup, PageRun};

    fn group(page: u64) -> Load {
        let content = Content::Bytes(vec![page as u8; 4096].into());
        Load::Pages(PageGroup { image: 0, runs: vec![PageRun::new(page, 1)], content })
    }

    /// Goal: many VMs have no more groups in work than lanes, and one each. Method: fill all of them.
    #[tokio::test]
    async fn vms_share_the_lanes_and_each_has_one_group_in_work_without_any() {
        let lanes = Lanes::new(8);
        let mut sealers: Vec<Sealer> = (0..20).map(|_| Sealer::new(1, lanes.clone())).collect();
        for sealer in &mut sealers {
            let mut page = 0;
            while !sealer.is_full() {
                sealer.put(group(page)).unwrap();
                page += 1;
            }
        }
        let working: usize = sealers.iter().map(|sealer| sealer.working.len()).sum();
        assert_eq!(working, 8 + 20);
        // Whoever takes a frame gives its lane to whoever asks next; frames come in order.
        for seq in 0..5 {
            assert_eq!(sealers[0].take().await.unwrap().unwrap().head.seq, seq);
        }
        assert!(!sealers[1].is_full());
    }
}
