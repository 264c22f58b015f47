//! The agent's half of the conversation about one VM.
//! Promises: a point is reported `Durable` only on the site's word, `Lost` otherwise, exactly once each; at most `window`
//! bytes of frames are held; a frame that the site has taken is not sent again, one that it has not taken is kept until
//! it is. Called by the agent's protection actor and by the simulation.

use crate::{
    format::{frame::Frame, manifest::PointMeta},
    id::{PointId, VmId},
    session::frames::FrameSet,
    units::{Generation, Seq, UnixMs},
    wire::message::{AgentMessage, FrameRanges, Latest, Refusal, SiteMessage},
};
use std::collections::{BTreeMap, VecDeque};

/// What the caller must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send on the control stream.
    Tell(AgentMessage),
    /// Send on any data stream.
    Ship { point: PointId, frame: Frame },
    /// The open point ended this way.
    Ended(Outcome),
}

/// How a point ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Durable { point: PointId, seq: Option<Seq>, committed_at: UnixMs },
    Lost { point: PointId, why: Refusal },
}

/// What the site says it holds; known only while the link is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No link, or no answer yet.
    Unknown,
    Open {
        generation: Generation,
        latest: Option<Latest>,
    },
    Refused(Refusal),
}

#[derive(Debug)]
pub struct Sender {
    vm: VmId,
    name: String,
    /// The generation this source believes in; learnt from the site on the first contact.
    generation: Option<Generation>,
    standing: Standing,
    window: u64,
    open: Option<OpenPoint>,
}

#[derive(Debug)]
struct OpenPoint {
    point: PointId,
    parent: Option<PointId>,
    /// The site has answered `Begin` on this link: frames may flow.
    flowing: bool,
    next: u32,
    /// Frames the site has said it holds. If it forgets one, the point is lost.
    taken: FrameSet,
    /// Frames not yet taken, with those in `unsent` still to be shipped on this link.
    held: BTreeMap<u32, Frame>,
    unsent: VecDeque<u32>,
    held_bytes: u64,
    meta: Option<Box<PointMeta>>,
}

impl Sender {
    pub fn new(vm: VmId, name: String, generation: Option<Generation>) -> Self {
        Self { vm, name, generation, standing: Standing::Unknown, window: 0, open: None }
    }

    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    /// The point now open, if one is.
    pub fn open_point(&self) -> Option<PointId> {
        self.open.as_ref().map(|open| open.point)
    }

    /// Whether another frame may be pushed: bytes held are below the window. One frame always fits.
    pub fn has_room(&self) -> bool {
        self.open.as_ref().is_some_and(|open| {
            open.held.is_empty()
                || (open.held_bytes < self.window.max(1) && open.held.len() < FRAMES_HELD_MAX)
        })
    }

    /// The link is up and the site has said `Welcome` with this window.
    pub fn link_up(&mut self, window: u64) -> Vec<Action> {
        self.window = window;
        self.standing = Standing::Unknown;
        let watch = AgentMessage::Watch { vm: self.vm, name: self.name.clone(), generation: self.generation };
        vec![Action::Tell(watch)]
    }

    /// Asks the site afresh what it holds, after a point was lost. The standing is unknown until it answers.
    pub fn refresh(&mut self) -> Vec<Action> {
        if let Standing::Refused(Refusal::Fenced { .. }) = self.standing {
            return Vec::new();
        }
        self.link_up(self.window)
    }

    /// The link is gone; what was on its way may or may not have arrived.
    pub fn link_down(&mut self) {
        self.standing = Standing::Unknown;
        if let Some(open) = &mut self.open {
            open.flowing = false;
            open.unsent = open.held.keys().copied().collect();
        }
    }

    /// Opens a point. The caller has seen `Standing::Open` and no point is open; otherwise nothing happens.
    pub fn begin(&mut self, point: PointId, parent: Option<PointId>) -> Vec<Action> {
        if self.open.is_some() {
            return Vec::new();
        }
        self.open = Some(OpenPoint {
            point,
            parent,
            flowing: false,
            next: 0,
            taken: FrameSet::default(),
            held: BTreeMap::new(),
            unsent: VecDeque::new(),
            held_bytes: 0,
            meta: None,
        });
        self.tell_begin().into_iter().collect()
    }

    /// The number that the next frame of the open point must carry.
    pub fn next_frame(&self) -> u32 {
        self.open.as_ref().map_or(0, |open| open.next)
    }

    /// Hands over the next frame; its number must be [`Self::next_frame`].
    pub fn push(&mut self, frame: Frame) -> Vec<Action> {
        let Some(open) = &mut self.open else { return Vec::new() };
        debug_assert_eq!(frame.head.seq, open.next, "frames are pushed in order");
        open.next = frame.head.seq.saturating_add(1);
        open.held_bytes += frame.encoded_len() as u64;
        open.unsent.push_back(frame.head.seq);
        open.held.insert(frame.head.seq, frame);
        self.flow()
    }

    /// All frames have been pushed; this is what they make.
    pub fn end(&mut self, meta: PointMeta) -> Vec<Action> {
        let Some(open) = &mut self.open else { return Vec::new() };
        open.meta = Some(Box::new(meta));
        if open.flowing { self.tell_end().into_iter().collect() } else { Vec::new() }
    }

    /// Gives the open point up; the caller puts back what it carried. No outcome follows.
    pub fn abort(&mut self) -> Vec<Action> {
        match self.open.take() {
            Some(open) if open.flowing => {
                vec![Action::Tell(AgentMessage::Abort { vm: self.vm, point: open.point })]
            }
            _ => Vec::new(),
        }
    }

    /// A message of the site about this VM.
    pub fn on_message(&mut self, message: SiteMessage) -> Vec<Action> {
        match message {
            // A greeting is the link's business, a comparison the resync's.
            SiteMessage::Welcome { .. } | SiteMessage::Compared { .. } => Vec::new(),
            SiteMessage::Vm { generation, latest, .. } => self.on_standing(generation, latest),
            SiteMessage::VmRefused { refusal, .. } => {
                let lost = self.lose(|| refusal.clone());
                self.standing = Standing::Refused(refusal);
                lost
            }
            SiteMessage::Opened { point, have, .. } => self.on_opened(point, have),
            SiteMessage::Taken { point, frames, .. } => self.on_taken(point, frames),
            SiteMessage::Durable { point, seq, committed_at, .. } => {
                self.on_durable(point, Some(seq), committed_at)
            }
            SiteMessage::PointRefused { point, refusal, .. } => {
                if self.open_point() == Some(point) {
                    if let Refusal::Fenced { .. } = refusal {
                        self.standing = Standing::Refused(refusal.clone());
                    }
                    self.lose(|| refusal)
                } else {
                    Vec::new()
                }
            }
        }
    }

    fn on_standing(&mut self, generation: Generation, latest: Option<Latest>) -> Vec<Action> {
        if let Some(ours) = self.generation.filter(|ours| *ours < generation) {
            tracing::debug!(%ours, %generation, "the site has a newer generation");
            let fenced = Refusal::Fenced { current: generation };
            self.standing = Standing::Refused(fenced.clone());
            return self.lose(|| fenced);
        }
        self.generation = Some(generation);
        self.standing = Standing::Open { generation, latest };
        let Some(open) = &self.open else { return Vec::new() };
        let newest = latest.map(|latest| latest.point);
        if newest == Some(open.point) {
            // The commit went through and its acknowledgement was lost with the link.
            let committed_at = latest.map_or(UnixMs(0), |latest| latest.committed_at);
            return self.on_durable(open.point, latest.map(|latest| latest.seq), committed_at);
        }
        if newest != open.parent {
            return self.lose(|| Refusal::WrongParent { latest: newest });
        }
        self.tell_begin().into_iter().collect()
    }

    fn on_opened(&mut self, point: PointId, have: FrameRanges) -> Vec<Action> {
        let Some(open) = self.open.as_mut().filter(|open| open.point == point) else { return Vec::new() };
        let Some(have) = FrameSet::from_ranges(have) else {
            return self
                .lose(|| Refusal::Invalid { detail: "the site's list of frames makes no sense".into() });
        };
        if !have.covers(&open.taken) || have.end() > open.next {
            return self.lose(|| Refusal::UnknownPoint);
        }
        for range in have.ranges() {
            open.take(range.first, range.end);
        }
        open.flowing = true;
        let mut actions = self.flow();
        actions.extend(
            self.open.as_ref().is_some_and(|open| open.meta.is_some()).then(|| self.tell_end()).flatten(),
        );
        actions
    }

    fn on_taken(&mut self, point: PointId, frames: FrameRanges) -> Vec<Action> {
        let Some(open) = self.open.as_mut().filter(|open| open.point == point) else { return Vec::new() };
        for range in frames {
            open.take(range.first, range.end.min(open.next));
        }
        Vec::new()
    }

    fn on_durable(&mut self, point: PointId, seq: Option<Seq>, committed_at: UnixMs) -> Vec<Action> {
        if self.open_point() != Some(point) {
            return Vec::new();
        }
        let cut_at = self.open.take().and_then(|open| open.meta).map_or(committed_at, |meta| meta.cut_at);
        if let Standing::Open { latest, .. } = &mut self.standing {
            let seq = seq.or(latest.map(|latest| latest.seq)).unwrap_or(Seq(0));
            *latest = Some(Latest { point, seq, cut_at, committed_at });
        }
        vec![Action::Ended(Outcome::Durable { point, seq, committed_at })]
    }

    fn lose(&mut self, why: impl FnOnce() -> Refusal) -> Vec<Action> {
        let lost =
            self.open.take().map(|open| Action::Ended(Outcome::Lost { point: open.point, why: why() }));
        lost.into_iter().collect()
    }

    /// Ships what may be shipped on this link.
    fn flow(&mut self) -> Vec<Action> {
        let Some(open) = self.open.as_mut().filter(|open| open.flowing) else { return Vec::new() };
        let point = open.point;
        let frames =
            std::mem::take(&mut open.unsent).into_iter().filter_map(|seq| open.held.get(&seq).cloned());
        frames.map(|frame| Action::Ship { point, frame }).collect()
    }

    fn tell_begin(&self) -> Option<Action> {
        let (open, Standing::Open { generation, .. }) = (self.open.as_ref()?, &self.standing) else {
            return None;
        };
        let begin = AgentMessage::Begin {
            vm: self.vm,
            generation: *generation,
            point: open.point,
            parent: open.parent,
        };
        Some(Action::Tell(begin))
    }

    fn tell_end(&self) -> Option<Action> {
        let open = self.open.as_ref()?;
        let meta = open.meta.clone()?;
        Some(Action::Tell(AgentMessage::End { vm: self.vm, point: open.point, frames: open.next, meta }))
    }
}

impl OpenPoint {
    fn take(&mut self, first: u32, end: u32) {
        // Walk what is held, not the range: a range comes from the wire and may be long.
        let numbers: Vec<u32> =
            if first < end { self.held.range(first..end).map(|(n, _)| *n).collect() } else { vec![] };
        for number in numbers {
            if let Some(frame) = self.held.remove(&number) {
                self.held_bytes = self.held_bytes.saturating_sub(frame.encoded_len() as u64);
                self.taken.insert(number);
            }
        }
        if !self.unsent.is_empty() {
            self.unsent.retain(|number| self.held.contains_key(number));
        }
    }
}

/// Frames held untaken at the most, however small they are: bounds the messages that may be waiting for this actor.
pub const FRAMES_HELD_MAX: usize = 4096;

#[cfg(test)]
mod tests;
