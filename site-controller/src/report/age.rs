//! How the age of the newest durable point went: from point to point it rises, and falls when the next is durable; and when it
//! exceeded a target. Pure: instants in, stretches out.
//! Promises: a stretch of time counts only where no point can be missing between the two that bound it; any other is
//! counted as unknown, by its reason. Called by `rpo` and `slot`.

use lifeboat::units::UnixMs;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A point, as far as its age goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub cut_at: UnixMs,
    pub durable_at: UnixMs,
    /// Its place in the history: between two that follow each other there was none.
    pub no: u64,
    /// Whose history: it is another one after a failover or a hand-over, and from a seed on.
    pub era: u64,
    /// The VM was off, and the point is of its disks as they stood: how long it was off after it is not known.
    pub at_rest: bool,
}

/// What is asked of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub since: UnixMs,
    /// Until now; or until the VM was failed over, after which its age says nothing.
    pub until: UnixMs,
    pub target_ms: Option<u64>,
}

/// Time of which nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RpoUnknown")]
pub struct Unknown {
    pub why: Why,
    pub ms: u64,
    /// Points that were cut in it and are not kept any more.
    pub points_gone: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "RpoWhyUnknown")]
pub enum Why {
    /// Before the oldest point that is kept: not protected yet, or not kept so long.
    BeforeTheOldest,
    /// Points in between are not kept any more.
    ThinnedOut,
    /// The VM was failed over or handed over, or a seed was taken in.
    ChangedHands,
    /// It was failed over to this site: what was protected is not what runs.
    FailedOver,
    /// The VM was off, until some time before the next point.
    Off,
}

/// No newer point became durable for longer than the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RpoGap")]
pub struct Gap {
    /// The instant of the last point before it.
    pub from: UnixMs,
    /// When the next one was durable; or the end of what is known.
    pub until: UnixMs,
    pub age_ms: u64,
}

/// From one point's being durable to the next one's: the age rises from `age` by `len`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub from: u64,
    pub len: u64,
    pub age: u64,
}

impl Stretch {
    pub fn end(&self) -> u64 {
        self.from.saturating_add(self.len)
    }
    pub fn oldest(&self) -> u64 {
        self.age.saturating_add(self.len)
    }
    /// For how long it is no older than this.
    pub fn within(&self, age: u64) -> u64 {
        age.saturating_sub(self.age).min(self.len)
    }
    /// The part of it that lies there.
    pub fn clip(&self, from: u64, until: u64) -> Option<Self> {
        let start = self.from.max(from);
        let end = self.end().min(until);
        let age = self.age.saturating_add(start - self.from);
        (start < end).then(|| Self { from: start, len: end - start, age })
    }
    pub fn gap(&self) -> Gap {
        Gap {
            from: UnixMs(self.from.saturating_sub(self.age)),
            until: UnixMs(self.end()),
            age_ms: self.oldest(),
        }
    }
}

/// `moments` in the order of their numbers. Tells of the time from `asked.since` until `now`; what lies between `asked.until` and
/// `now` is unknown.
pub(super) fn stretches(moments: &[Moment], asked: Asked, now: UnixMs) -> (Vec<Stretch>, Vec<Unknown>) {
    let (since, until) = (asked.since.0, asked.until.0.min(now.0));
    let (mut known, mut unknown) = (Vec::new(), Vec::<Unknown>::new());
    let mut miss = |why, from: u64, to: u64, points_gone| {
        let ms = to.min(now.0).saturating_sub(from.max(since));
        if ms == 0 {
            return;
        }
        count(&mut unknown, Unknown { why, ms, points_gone });
    };
    let first = moments.first().map_or(until, |first| first.durable_at.0);
    miss(Why::BeforeTheOldest, since, first.min(until), 0);
    // A site's clock may be set back; what became durable later did so later.
    let mut from = first;
    for (at, moment) in moments.iter().enumerate() {
        let next = moments.get(at + 1);
        let end = next.map_or(until, |next| next.durable_at.0.max(from)).min(until);
        let whole =
            Stretch { from, len: end.saturating_sub(from), age: from.saturating_sub(moment.cut_at.0) };
        match next {
            Some(next) if next.era != moment.era => miss(Why::ChangedHands, from, end, 0),
            _ if moment.at_rest => miss(Why::Off, from, end, 0),
            Some(next) if next.no.abs_diff(moment.no) > 1 => {
                miss(Why::ThinnedOut, from, end, next.no.abs_diff(moment.no) - 1);
            }
            _ => known.extend(whole.clip(since, until)),
        }
        from = from.max(end);
    }
    miss(Why::FailedOver, until, now.0, 0);
    (known, unknown)
}

/// When the target was exceeded, in the order of time.
pub(super) fn gaps(known: &[Stretch], target_ms: Option<u64>) -> Vec<Gap> {
    let over = |stretch: &&Stretch| target_ms.is_some_and(|target| stretch.oldest() > target);
    known.iter().filter(over).map(Stretch::gap).collect()
}

pub(super) fn worst_first(gaps: &mut Vec<Gap>, most: usize) {
    gaps.sort_by_key(|gap| (std::cmp::Reverse(gap.age_ms), gap.from));
    gaps.truncate(most);
}

/// Adds to what is unknown for the same reason.
pub(super) fn count(all: &mut Vec<Unknown>, more: Unknown) {
    match all.iter_mut().find(|unknown| unknown.why == more.why) {
        Some(found) => {
            found.ms = found.ms.saturating_add(more.ms);
            found.points_gone = found.points_gone.saturating_add(more.points_gone);
        }
        None => all.push(more),
    }
}
