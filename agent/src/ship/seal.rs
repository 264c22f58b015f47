//! Compressing and digesting page groups, several at a time, handing the frames back in order.
//! Promises: at most `lanes` groups are in work (each at most 256 KiB), whatever the guest changes.
//! Called by the protection actor. With no lanes it works in place, which is what the simulation wants.

use lifeboat::{
    format::frame::{Frame, FrameError},
    page::PageGroup,
};
use std::collections::VecDeque;
use tokio::task::JoinHandle;

#[derive(Debug)]
pub struct Sealer {
    level: i32,
    lanes: usize,
    next: u32,
    working: VecDeque<Working>,
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
    pub fn new(level: i32, lanes: usize) -> Self {
        Self { level, lanes, next: 0, working: VecDeque::new() }
    }

    /// Takes a group into work. Check [`Self::is_full`] first, so that the bound holds.
    pub fn put(&mut self, group: PageGroup) -> Result<(), SealError> {
        let (seq, level) = (self.next, self.level);
        self.next = seq.checked_add(1).ok_or(SealError::TooMany)?;
        self.working.push_back(if self.lanes == 0 {
            Working::Done(Frame::seal(seq, &group, level))
        } else {
            Working::Elsewhere(tokio::task::spawn_blocking(move || Frame::seal(seq, &group, level)))
        });
        Ok(())
    }

    pub fn is_full(&self) -> bool {
        self.working.len() >= self.lanes.max(1)
    }

    /// The next frame in order, once it is ready; `None` when nothing is in work. Not cancel-safe.
    pub async fn take(&mut self) -> Result<Option<Frame>, SealError> {
        match self.working.pop_front() {
            None => Ok(None),
            Some(Working::Done(frame)) => Ok(Some(frame?)),
            Some(Working::Elsewhere(work)) => Ok(Some(work.await.map_err(|_| SealError::Died)??)),
        }
    }
}
