//! The site's half of the conversation about one VM.
//! Promises: `Durable` is said only after the store has said `committed`, and a point is committed once, when all its
//! frames are there; a frame is said to be `Taken` only after the store has it; what is sent twice is stored once; a
//! writer of an older generation is refused; a point begun over one that is not durable yet is committed after that one,
//! or given up with it. Called by the site's intake and by the simulation.

use crate::{
    chunk::digest::Digest,
    format::manifest::PointMeta,
    id::{PointId, VmId},
    session::{frames::FrameSet, sender::POINTS_MAX},
    units::{Generation, Seq, UnixMs},
    wire::message::{FrameRange, Latest, Refusal, SiteMessage},
};

/// What the caller must do, in this order. After `Open`, `Append` and `Commit` it reports how that went
/// (`opened`, `appended`, `committed`, or `failed`). Other events may come before a commit is reported, but for those
/// that [`Receiver::is_committing`] holds up.
#[derive(Clone, Debug, PartialEq)]
pub enum Do {
    Reply(SiteMessage),
    /// Open the point in the store.
    Open {
        generation: Generation,
        point: PointId,
        parent: Option<PointId>,
    },
    /// Verify the frame that has arrived, and write it to its point.
    Append {
        seq: u32,
    },
    /// Make the point durable; it has exactly `frames` frames.
    Commit {
        point: PointId,
        frames: u32,
        meta: Box<PointMeta>,
    },
    /// Throw away what the point has written.
    Discard {
        point: PointId,
    },
}

/// What the store holds of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub generation: Generation,
    pub latest: Option<Latest>,
    /// The generation was raised after the newest point was written: the VM has been failed over.
    pub raised_since_latest: bool,
}

#[derive(Debug)]
pub struct Receiver {
    vm: VmId,
    /// Points under way, each over the one before; only the first is ever committed.
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    generation: Generation,
    point: PointId,
    parent: Option<PointId>,
    got: FrameSet,
    ending: Option<(u32, Box<PointMeta>)>,
    committing: bool,
}

impl Receiver {
    pub fn new(vm: VmId) -> Self {
        Self { vm, open: Vec::new() }
    }

    pub fn is_open(&self, point: PointId) -> bool {
        self.position(point).is_some()
    }

    /// Whether the store is making a point durable. Until that is reported nothing may be asked of the receiver that
    /// could discard it: see [`Self::continues`].
    pub fn is_committing(&self) -> bool {
        self.open.first().is_some_and(|open| open.committing)
    }

    /// Whether this `Begin` takes up a point that is under way, or goes on from one.
    pub fn continues(&self, point: PointId, parent: Option<PointId>) -> bool {
        self.is_open(point) || parent.is_some_and(|parent| self.is_open(parent))
    }

    /// An agent says that it protects the VM, as of `generation` (`None`: it has never been told one).
    pub fn watch(&self, held: Held, generation: Option<Generation>) -> SiteMessage {
        let refused = |refusal| SiteMessage::VmRefused { vm: self.vm, refusal };
        match generation {
            Some(theirs) if theirs < held.generation => {
                return refused(Refusal::Fenced { current: held.generation });
            }
            None if held.raised_since_latest => {
                return refused(Refusal::Fenced { current: held.generation });
            }
            Some(theirs) if theirs > held.generation => {
                let detail = format!(
                    "the agent has seen generation {theirs} of this VM, and the site knows only {}: its store is an older \
                     one, or another site's",
                    held.generation
                );
                return refused(Refusal::Invalid { detail });
            }
            Some(_) | None => {}
        }
        SiteMessage::Vm { vm: self.vm, generation: held.generation, latest: held.latest }
    }

    pub fn begin(
        &mut self,
        held: Held,
        generation: Generation,
        point: PointId,
        parent: Option<PointId>,
    ) -> Vec<Do> {
        if generation != held.generation {
            let fenced = self.refuse(point, Refusal::Fenced { current: held.generation });
            return self.discard_from(0).into_iter().chain([fenced]).collect();
        }
        if let Some(at) = self.position(point) {
            let open = &self.open[at];
            if open.parent == parent && open.generation == generation {
                let have = open.got.to_ranges();
                return vec![Do::Reply(SiteMessage::Opened { vm: self.vm, point, have })];
            }
            let invalid = Refusal::Invalid { detail: "the same point again, but over another parent".into() };
            return self.failed(point, invalid);
        }
        // What was begun over the same point before, or over what is durable, is what a dead agent left.
        let from = match parent.and_then(|parent| self.position(parent)) {
            Some(at) => at + 1,
            None => {
                let latest = held.latest.map(|latest| latest.point);
                if parent != latest {
                    return vec![self.refuse(point, Refusal::WrongParent { latest })];
                }
                0
            }
        };
        if from >= POINTS_MAX {
            let detail = format!("no more than {POINTS_MAX} points of a VM may be under way");
            return vec![self.refuse(point, Refusal::Invalid { detail })];
        }
        let mut todo = self.discard_from(from);
        todo.push(Do::Open { generation, point, parent });
        todo
    }

    /// The store has opened the point.
    pub fn opened(&mut self, generation: Generation, point: PointId, parent: Option<PointId>) -> Vec<Do> {
        let got = FrameSet::default();
        self.open.push(Open { generation, point, parent, got, ending: None, committing: false });
        vec![Do::Reply(SiteMessage::Opened { vm: self.vm, point, have: Vec::new() })]
    }

    /// A frame has arrived. Frames of a point that is not open are dropped: the link they came on is an old one.
    pub fn frame(&self, point: PointId, seq: u32) -> Vec<Do> {
        match self.position(point).map(|at| &self.open[at]) {
            Some(open) if open.committing => Vec::new(),
            Some(open) if open.got.contains(seq) => vec![self.taken(point, seq)],
            Some(_) => vec![Do::Append { seq }],
            None => Vec::new(),
        }
    }

    /// The store has verified and written frame `seq` of `point`.
    pub fn appended(&mut self, point: PointId, seq: u32) -> Vec<Do> {
        let Some(at) = self.position(point) else { return Vec::new() };
        self.open[at].got.insert(seq);
        let mut todo = vec![self.taken(point, seq)];
        todo.extend(self.commit_if_complete());
        todo
    }

    pub fn end(&mut self, point: PointId, frames: u32, meta: Box<PointMeta>) -> Vec<Do> {
        match self.position(point).map(|at| &mut self.open[at]) {
            None => vec![self.refuse(point, Refusal::UnknownPoint)],
            Some(open) if open.committing => Vec::new(),
            Some(open) => {
                open.ending = Some((frames, meta));
                self.commit_if_complete()
            }
        }
    }

    /// The store has made `point` durable: the one that `Do::Commit` named.
    pub fn committed(&mut self, point: PointId, seq: Seq, committed_at: UnixMs, manifest: Digest) -> Vec<Do> {
        if self.open.first().is_none_or(|open| open.point != point) {
            return Vec::new();
        }
        self.open.remove(0);
        let durable = SiteMessage::Durable { vm: self.vm, point, seq, committed_at, manifest };
        let mut todo = vec![Do::Reply(durable)];
        todo.extend(self.commit_if_complete());
        todo
    }

    /// The store could not do what it was told; the point is given up, and with it what was begun over it.
    pub fn failed(&mut self, point: PointId, refusal: Refusal) -> Vec<Do> {
        let position = self.position(point);
        if let Some(open) = position.and_then(|at| self.open.get_mut(at)) {
            open.committing = false;
        }
        let mut todo = position.map(|at| self.discard_from(at)).unwrap_or_default();
        todo.push(self.refuse(point, refusal));
        todo
    }

    /// The agent gives the point up, and with it what was begun over it.
    pub fn abort(&mut self, point: PointId) -> Vec<Do> {
        self.position(point).map(|at| self.discard_from(at)).unwrap_or_default()
    }

    /// The VM has been failed over while a point was open.
    pub fn fence(&mut self, current: Generation) -> Vec<Do> {
        match self.open.first().map(|open| open.point) {
            Some(point) => self.failed(point, Refusal::Fenced { current }),
            None => Vec::new(),
        }
    }

    fn commit_if_complete(&mut self) -> Vec<Do> {
        // Of a later one too many frames are found when it is its turn.
        let Some(open) = self.open.first_mut() else { return Vec::new() };
        let point = open.point;
        match &open.ending {
            Some((frames, _)) if open.got.end() > *frames => {
                self.failed(point, Refusal::Invalid { detail: "more frames than it ended with".into() })
            }
            Some((frames, meta)) if open.got.is_exactly(*frames) && !open.committing => {
                open.committing = true;
                vec![Do::Commit { point, frames: *frames, meta: meta.clone() }]
            }
            _ => Vec::new(),
        }
    }

    fn position(&self, point: PointId) -> Option<usize> {
        self.open.iter().position(|open| open.point == point)
    }

    fn taken(&self, point: PointId, seq: u32) -> Do {
        let frames = vec![FrameRange { first: seq, end: seq.saturating_add(1) }];
        Do::Reply(SiteMessage::Taken { vm: self.vm, point, frames })
    }

    fn refuse(&self, point: PointId, refusal: Refusal) -> Do {
        Do::Reply(SiteMessage::PointRefused { vm: self.vm, point, refusal })
    }

    /// Drops points from this one on; never one of which the store may be saying "durable" at this moment.
    fn discard_from(&mut self, at: usize) -> Vec<Do> {
        let at = at.max(usize::from(self.is_committing()));
        self.open.drain(at..).map(|open| Do::Discard { point: open.point }).collect()
    }
}

#[cfg(test)]
mod tests;
