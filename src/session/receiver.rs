//! The site's half of the conversation about one VM.
//! Promises: `Durable` is said only after the store has said `committed`, and a point is committed once, when all its
//! frames are there; a frame is said to be `Taken` only after the store has it; what is sent twice is stored once; a
//! writer of an older generation is refused. Called by the site's intake and by the simulation.

use crate::{
    chunk::digest::Digest,
    format::manifest::PointMeta,
    id::{PointId, VmId},
    session::frames::FrameSet,
    units::{Generation, Seq, UnixMs},
    wire::message::{FrameRange, Latest, Refusal, SiteMessage},
};

/// What the caller must do, in this order. After `Open`, `Append` and `Commit` it reports how that went
/// (`opened`, `appended`, `committed`, or `failed`) before it hands in the next event.
#[derive(Clone, Debug, PartialEq)]
pub enum Do {
    Reply(SiteMessage),
    /// Open the point in the store.
    Open {
        generation: Generation,
        point: PointId,
        parent: Option<PointId>,
    },
    /// Verify the frame that has arrived, and write it to the open point.
    Append {
        seq: u32,
    },
    /// Make the open point durable; it has exactly `frames` frames.
    Commit {
        frames: u32,
        meta: Box<PointMeta>,
    },
    /// Throw away what the open point has written.
    Discard,
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
    open: Option<Open>,
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
        Self { vm, open: None }
    }

    pub fn open_point(&self) -> Option<PointId> {
        self.open.as_ref().map(|open| open.point)
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
            return self.discard().into_iter().chain([fenced]).collect();
        }
        if let Some(open) = self.open.as_ref().filter(|open| open.point == point) {
            if open.parent == parent && open.generation == generation {
                let have = open.got.to_ranges();
                return vec![Do::Reply(SiteMessage::Opened { vm: self.vm, point, have })];
            }
            let invalid = Refusal::Invalid { detail: "the same point again, but over another parent".into() };
            let refusal = self.refuse(point, invalid);
            return self.discard().into_iter().chain([refusal]).collect();
        }
        let latest = held.latest.map(|latest| latest.point);
        if parent != latest {
            return vec![self.refuse(point, Refusal::WrongParent { latest })];
        }
        // One point of a VM is open at a time; another one is what a dead agent left.
        let mut todo: Vec<Do> = self.discard().into_iter().collect();
        todo.push(Do::Open { generation, point, parent });
        todo
    }

    /// The store has opened the point.
    pub fn opened(&mut self, generation: Generation, point: PointId, parent: Option<PointId>) -> Vec<Do> {
        let got = FrameSet::default();
        self.open = Some(Open { generation, point, parent, got, ending: None, committing: false });
        vec![Do::Reply(SiteMessage::Opened { vm: self.vm, point, have: Vec::new() })]
    }

    /// A frame has arrived. Frames of a point that is not open are dropped: the link they came on is an old one.
    pub fn frame(&self, point: PointId, seq: u32) -> Vec<Do> {
        match self.open.as_ref() {
            Some(open) if open.point == point && open.committing => Vec::new(),
            Some(open) if open.point == point && open.got.contains(seq) => vec![self.taken(point, seq)],
            Some(open) if open.point == point => vec![Do::Append { seq }],
            _ => Vec::new(),
        }
    }

    /// The store has verified and written frame `seq` of the open point.
    pub fn appended(&mut self, seq: u32) -> Vec<Do> {
        let Some(open) = &mut self.open else { return Vec::new() };
        open.got.insert(seq);
        let point = open.point;
        let mut todo = vec![self.taken(point, seq)];
        todo.extend(self.commit_if_complete());
        todo
    }

    pub fn end(&mut self, point: PointId, frames: u32, meta: Box<PointMeta>) -> Vec<Do> {
        match self.open.as_mut().filter(|open| open.point == point) {
            None => vec![self.refuse(point, Refusal::UnknownPoint)],
            Some(open) if open.committing => Vec::new(),
            Some(open) => {
                open.ending = Some((frames, meta));
                self.commit_if_complete()
            }
        }
    }

    /// The store has made the open point durable.
    pub fn committed(&mut self, seq: Seq, committed_at: UnixMs, manifest: Digest) -> Vec<Do> {
        let durable = self.open.take().map(|open| {
            Do::Reply(SiteMessage::Durable { vm: self.vm, point: open.point, seq, committed_at, manifest })
        });
        durable.into_iter().collect()
    }

    /// The store could not do what it was told; the point is given up.
    pub fn failed(&mut self, point: PointId, refusal: Refusal) -> Vec<Do> {
        let discard = if self.open_point() == Some(point) { self.discard() } else { None };
        let told = self.refuse(point, refusal);
        discard.into_iter().chain([told]).collect()
    }

    pub fn abort(&mut self, point: PointId) -> Vec<Do> {
        if self.open_point() == Some(point) { self.discard().into_iter().collect() } else { Vec::new() }
    }

    /// The VM has been failed over while a point was open.
    pub fn fence(&mut self, current: Generation) -> Vec<Do> {
        match self.open_point() {
            Some(point) => self.failed(point, Refusal::Fenced { current }),
            None => Vec::new(),
        }
    }

    fn commit_if_complete(&mut self) -> Vec<Do> {
        let Some(open) = &mut self.open else { return Vec::new() };
        match &open.ending {
            Some((frames, _)) if open.got.end() > *frames => {
                let point = open.point;
                self.failed(point, Refusal::Invalid { detail: "more frames than it ended with".into() })
            }
            Some((frames, meta)) if open.got.is_exactly(*frames) && !open.committing => {
                open.committing = true;
                vec![Do::Commit { frames: *frames, meta: meta.clone() }]
            }
            _ => Vec::new(),
        }
    }

    fn taken(&self, point: PointId, seq: u32) -> Do {
        let frames = vec![FrameRange { first: seq, end: seq.saturating_add(1) }];
        Do::Reply(SiteMessage::Taken { vm: self.vm, point, frames })
    }

    fn refuse(&self, point: PointId, refusal: Refusal) -> Do {
        Do::Reply(SiteMessage::PointRefused { vm: self.vm, point, refusal })
    }

    fn discard(&mut self) -> Option<Do> {
        self.open.take().map(|_| Do::Discard)
    }
}

#[cfg(test)]
mod tests;
