//! Whether a bound VM may run, and what is to be done at the witness: pure, called by the daemon and the simulation alike.
//! Promises: time counts from before a lease was asked for; what is taken was the agent's before, or the site has said on
//! this link that it is; a claim of the site's is never taken back but under a generation above it.

use lifeboat::{
    units::Generation,
    witness::{Entry, LeaseId, Revision, Word},
};

/// Until when a guest may run, by [`lifeboat::boot::uptime_ms`]: paused through libvirt at `soft`, by the kernel at `hard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Until {
    pub soft: u64,
    pub hard: u64,
}

impl Until {
    /// Of a lease for `lasts` that was asked for at `sent`. A third of it is for pausing, and for clocks that differ.
    pub fn of(sent: u64, lasts: u64) -> Self {
        Self { soft: sent.saturating_add(lasts * 2 / 3), hard: sent.saturating_add(lasts * 5 / 6) }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kept {
    /// The witness does not say that we keep it: nobody fails it over by himself.
    #[default]
    Unbound,
    /// A lease holds.
    Held,
    /// None does: it may have been failed over.
    Lapsed,
}

/// What is known of one VM's leases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// The witness may say that we keep it.
    pub bound: bool,
    /// As it was when an agent before us ended.
    before: Until,
    witness: Until,
    site: Until,
}

impl Hold {
    /// What an agent before us left; `until` is of this boot, or nothing.
    pub fn found(bound: bool, until: Option<Until>) -> Self {
        Self { bound, before: until.unwrap_or_default(), ..Self::default() }
    }

    /// From here on the witness may say that we keep it. One that was not bound before may run meanwhile: nobody had it
    /// to take.
    pub fn bind(&mut self, sent: u64, ttl_ms: u64) {
        if !self.bound {
            self.bound = true;
            self.renewed(sent, ttl_ms);
        }
    }

    /// The word at the witness was ours, and our lease alive, when we asked at `sent`.
    pub fn renewed(&mut self, sent: u64, ttl_ms: u64) {
        self.witness = self.witness.max(Until::of(sent, ttl_ms));
    }

    /// The site has answered what was said at `sent`.
    pub fn promised(&mut self, sent: u64, for_ms: u64, now: u64) {
        // What was not asked yet can't have been answered.
        if sent <= now {
            self.site = self.site.max(Until::of(sent, for_ms));
        }
    }

    pub fn until(&self) -> Until {
        self.before.max(self.witness).max(self.site)
    }

    pub fn kept(&self, now: u64) -> Kept {
        match self.bound {
            false => Kept::Unbound,
            true if now < self.until().soft => Kept::Held,
            true => Kept::Lapsed,
        }
    }
}

/// What `fence` wants of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// It runs here, and is to be kept.
    Keep,
    /// It is not: the witness is to say so.
    #[default]
    Free,
    /// It is fenced, or its operator has the last word: the witness does not matter.
    Unbind,
}

/// All that is known when the witness has answered.
#[derive(Clone, Debug)]
pub struct Known<'a> {
    pub me: &'a str,
    pub wish: Wish,
    /// The guard looked a moment ago.
    pub guarded: bool,
    pub bound: bool,
    /// The site's word: it is ours, under this generation.
    pub open: Option<Generation>,
    /// The generation that we knew last.
    pub generation: Option<Generation>,
    pub entry: &'a Entry,
    /// The lease that was just renewed, and the word that we said with it.
    pub ours: Option<(LeaseId, Revision)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Nothing,
    /// All is as it was: our time begins anew.
    Renewed,
    /// Say that we keep it, under this generation.
    Take(Generation),
    /// Say that we do not.
    Free(Generation),
    /// The witness does not say that we keep it, and won't.
    Unbind,
}

pub fn act(known: &Known<'_>) -> Act {
    let word = known.entry.word.as_ref();
    let mine = matches!(word, Some(Word::Kept { agent, .. }) if agent == known.me);
    let generation = known.open.max(known.generation);
    let wish = if known.wish == Wish::Keep && !known.guarded { Wish::Free } else { known.wish };
    match (wish, word) {
        (Wish::Unbind | Wish::Free, Some(word)) if mine => Act::Free(word.generation()),
        (Wish::Unbind, _) => Act::Unbind,
        // Whoever has claimed it may have it running.
        (Wish::Free, Some(Word::Claimed { .. })) => Act::Nothing,
        (Wish::Free, _) => Act::Unbind,
        (Wish::Keep, Some(word)) if mine => match known.ours {
            Some((_, revision))
                if known.entry.leased
                    && revision == known.entry.revision
                    && known.open.is_none_or(|open| open <= word.generation()) =>
            {
                Act::Renewed
            }
            _ => Act::Take(generation.map_or(word.generation(), |ours| ours.max(word.generation()))),
        },
        (Wish::Keep, Some(Word::Claimed { generation: theirs, .. })) => {
            // Only a hand-over after that claim gave a newer one.
            generation.filter(|ours| ours > theirs).map_or(Act::Nothing, Act::Take)
        }
        // Of what we freed nobody else has said anything since: an answer that was lost leaves it so.
        (Wish::Keep, Some(Word::Free { agent, generation: theirs })) if agent == known.me => {
            generation.filter(|ours| ours >= theirs).map_or(Act::Nothing, Act::Take)
        }
        (Wish::Keep, Some(other)) => {
            known.open.filter(|ours| *ours >= other.generation()).map_or(Act::Nothing, Act::Take)
        }
        (Wish::Keep, None) => known.open.map_or(Act::Nothing, Act::Take),
    }
}
