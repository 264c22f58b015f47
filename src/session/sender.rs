//! The agent's half of the conversation about one VM.
//! Promises: a point is reported `Durable` only on the site's word, `Lost` otherwise, exactly once each; at most `window`
//! bytes of frames are held; a frame that the site has taken is not sent again, one that it has not taken is kept until
//! it is. A point may be begun over one that is still under way: it is durable only after that, and lost with it.
//! Called by the agent's protection actor and by the simulation.

use crate::{
    format::{frame::Frame, manifest::PointMeta},
    id::{PointId, VmId},
    session::frames::FrameSet,
    units::{Generation, Seq, UnixMs},
    wire::message::{AgentMessage, FrameRanges, Latest, Place, Refusal, SiteMessage},
};
use std::collections::{BTreeMap, VecDeque};

/// What the caller must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send on the control stream.
    Tell(AgentMessage),
    /// Send on any data stream.
    Ship { point: PointId, frame: Frame },
    /// A point ended this way. With one that is lost, all that were begun over it are.
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
    /// Points under way, each over the one before.
    points: VecDeque<OpenPoint>,
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
        Self { vm, name, generation, standing: Standing::Unknown, window: 0, points: VecDeque::new() }
    }

    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    /// The oldest point under way, if one is.
    pub fn open_point(&self) -> Option<PointId> {
        self.points.front().map(|open| open.point)
    }

    /// Points under way, oldest first.
    pub fn points(&self) -> impl ExactSizeIterator<Item = PointId> {
        self.points.iter().map(|open| open.point)
    }

    /// Whether another frame may be pushed: bytes held are below the window, and below what the caller grants. One frame
    /// always fits.
    pub fn has_room(&self, granted: u64) -> bool {
        let held: usize = self.points.iter().map(|open| open.held.len()).sum();
        !self.points.is_empty()
            && (held == 0 || (self.held_bytes() < self.window.min(granted).max(1) && held < FRAMES_HELD_MAX))
    }

    /// Bytes of frames that the site has not taken yet.
    pub fn held_bytes(&self) -> u64 {
        self.points.iter().map(|open| open.held_bytes).sum()
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

    /// The site has given the VM to somebody else, under this generation.
    pub fn fence(&mut self, current: Generation) {
        self.standing = Standing::Refused(Refusal::Fenced { current });
    }

    /// The site has given this source another generation to write under.
    pub fn adopt(&mut self, generation: Generation) {
        self.generation = Some(generation);
        self.standing = Standing::Unknown;
    }

    /// Says where the guest is. If it is here, the standing is unknown until the site answers.
    pub fn place(&mut self, place: Place) -> Vec<Action> {
        if let (Place::Here { .. }, Standing::Open { .. }) = (place, &self.standing) {
            self.standing = Standing::Unknown;
        }
        vec![Action::Tell(AgentMessage::Place { vm: self.vm, place })]
    }

    /// The link is gone; what was on its way may or may not have arrived.
    pub fn link_down(&mut self) {
        self.standing = Standing::Unknown;
        for open in &mut self.points {
            open.flowing = false;
            open.unsent = open.held.keys().copied().collect();
        }
    }

    /// Opens a point: over what the site holds, or over the newest point under way. The caller has seen `Standing::Open`;
    /// if another point is under way, or too many, nothing happens.
    pub fn begin(&mut self, point: PointId, parent: Option<PointId>) -> Vec<Action> {
        let fits = match self.points.back() {
            Some(newest) => parent == Some(newest.point) && self.points.len() < POINTS_MAX,
            None => true,
        };
        if !fits {
            return Vec::new();
        }
        self.points.push_back(OpenPoint {
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
        self.tell_begin(self.points.len() - 1).into_iter().collect()
    }

    /// The number that the next frame of the newest point must carry.
    pub fn next_frame(&self) -> u32 {
        self.points.back().map_or(0, |open| open.next)
    }

    /// Hands over the next frame of the newest point; its number must be [`Self::next_frame`].
    pub fn push(&mut self, frame: Frame) -> Vec<Action> {
        let Some(open) = self.points.back_mut() else { return Vec::new() };
        debug_assert_eq!(frame.head.seq, open.next, "frames are pushed in order");
        open.next = frame.head.seq.saturating_add(1);
        open.held_bytes += frame.encoded_len() as u64;
        open.unsent.push_back(frame.head.seq);
        open.held.insert(frame.head.seq, frame);
        open.flow()
    }

    /// All frames of the newest point have been pushed; this is what they make.
    pub fn end(&mut self, meta: PointMeta) -> Vec<Action> {
        let vm = self.vm;
        let Some(open) = self.points.back_mut() else { return Vec::new() };
        open.meta = Some(Box::new(meta));
        if open.flowing { open.tell_end(vm).into_iter().collect() } else { Vec::new() }
    }

    /// Gives all points under way up; the caller puts back what they carried. No outcome follows.
    pub fn abort(&mut self) -> Vec<Action> {
        self.abort_from(0)
    }

    /// Gives the newest point up, and leaves those before it under way.
    pub fn abort_newest(&mut self) -> Vec<Action> {
        self.abort_from(self.points.len().saturating_sub(1))
    }

    fn abort_from(&mut self, at: usize) -> Vec<Action> {
        let vm = self.vm;
        // The site drops what was begun over a point together with it.
        let first = self.points.drain(at..).next().filter(|open| open.flowing);
        first.map(|open| Action::Tell(AgentMessage::Abort { vm, point: open.point })).into_iter().collect()
    }

    /// A message of the site about this VM.
    pub fn on_message(&mut self, message: SiteMessage) -> Vec<Action> {
        match message {
            // A greeting is the link's business, a comparison the resync's.
            SiteMessage::Welcome { .. }
            | SiteMessage::Compared { .. }
            | SiteMessage::Assign { .. }
            | SiteMessage::Alive { .. }
            | SiteMessage::Cut { .. } => Vec::new(),
            SiteMessage::Vm { generation, latest, .. } => self.on_standing(generation, latest),
            SiteMessage::Adopt { generation, .. } => self.on_handed_over(generation),
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
                if self.points.iter().all(|open| open.point != point) {
                    return Vec::new();
                }
                if let Refusal::Fenced { .. } | Refusal::HeldElsewhere { .. } = refusal {
                    self.standing = Standing::Refused(refusal.clone());
                }
                // Those before it are given up with it, so that there is one thing to start from: what the site holds.
                let before = self.points().position(|open| open == point).unwrap_or(0);
                let abort = self.points.front().filter(|open| before > 0 && open.flowing);
                let abort = abort.map(|open| AgentMessage::Abort { vm: self.vm, point: open.point });
                let lost = self.lose(|| refusal);
                abort.map(Action::Tell).into_iter().chain(lost).collect()
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
        let newest = latest.map(|latest| latest.point);
        let mut actions = Vec::new();
        if let Some(latest) = latest.filter(|latest| self.points().any(|point| point == latest.point)) {
            // The commit went through and its acknowledgement was lost with the link.
            actions = self.on_durable(latest.point, Some(latest.seq), latest.committed_at);
            self.standing = Standing::Open { generation, latest: Some(latest) };
        }
        if self.points.front().is_some_and(|open| open.parent != newest) {
            actions.extend(self.lose(|| Refusal::WrongParent { latest: newest }));
        }
        actions.extend((0..self.points.len()).filter_map(|at| self.tell_begin(at)));
        actions
    }

    /// The VM was given to this very source: it goes on under the newer generation, from what the site then says it holds.
    fn on_handed_over(&mut self, generation: Generation) -> Vec<Action> {
        if self.generation.is_some_and(|ours| ours >= generation) {
            return Vec::new();
        }
        let mut actions = self.lose(|| Refusal::Fenced { current: generation });
        self.generation = Some(generation);
        actions.extend(self.link_up(self.window));
        actions
    }

    fn on_opened(&mut self, point: PointId, have: FrameRanges) -> Vec<Action> {
        let vm = self.vm;
        let Some(open) = self.find(point) else { return Vec::new() };
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
        let mut actions = open.flow();
        actions.extend(open.tell_end(vm));
        actions
    }

    fn on_taken(&mut self, point: PointId, frames: FrameRanges) -> Vec<Action> {
        let Some(open) = self.find(point) else { return Vec::new() };
        for range in frames {
            open.take(range.first, range.end.min(open.next));
        }
        Vec::new()
    }

    fn on_durable(&mut self, point: PointId, seq: Option<Seq>, committed_at: UnixMs) -> Vec<Action> {
        let Some(at) = self.points().position(|open| open == point) else { return Vec::new() };
        let mut actions = Vec::new();
        // What it was made over is durable if it is; of that only the acknowledgement is missing.
        for open in self.points.drain(..=at).collect::<Vec<_>>() {
            let seq = seq.filter(|_| open.point == point);
            let (point, cut_at) = (open.point, open.meta.map_or(committed_at, |meta| meta.cut_at));
            if let Standing::Open { latest, .. } = &mut self.standing {
                let seq = seq.or(latest.map(|latest| latest.seq)).unwrap_or(Seq(0));
                *latest = Some(Latest { point, seq, cut_at, committed_at });
            }
            actions.push(Action::Ended(Outcome::Durable { point, seq, committed_at }));
        }
        actions
    }

    /// All points under way are lost: the oldest says so for all.
    fn lose(&mut self, why: impl FnOnce() -> Refusal) -> Vec<Action> {
        let first = self.points.drain(..).next();
        let lost = first.map(|open| Action::Ended(Outcome::Lost { point: open.point, why: why() }));
        lost.into_iter().collect()
    }

    fn find(&mut self, point: PointId) -> Option<&mut OpenPoint> {
        self.points.iter_mut().find(|open| open.point == point)
    }

    fn tell_begin(&self, at: usize) -> Option<Action> {
        let (open, Standing::Open { generation, .. }) = (self.points.get(at)?, &self.standing) else {
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
}

impl OpenPoint {
    /// Ships what may be shipped on this link.
    fn flow(&mut self) -> Vec<Action> {
        if !self.flowing {
            return Vec::new();
        }
        let (point, unsent) = (self.point, std::mem::take(&mut self.unsent));
        let frames = unsent.into_iter().filter_map(|seq| self.held.get(&seq).cloned());
        frames.map(|frame| Action::Ship { point, frame }).collect()
    }

    fn tell_end(&self, vm: VmId) -> Option<Action> {
        let meta = self.meta.clone()?;
        Some(Action::Tell(AgentMessage::End { vm, point: self.point, frames: self.next, meta }))
    }

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
/// Points of a VM that may be under way at once.
pub const POINTS_MAX: usize = 4;

#[cfg(test)]
mod tests;
