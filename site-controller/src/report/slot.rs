//! What is recorded of the age of the newest durable point while the points that tell it are there: a few minutes each.
//! Pure.
//! Promises: how long the RPO was kept, and how old the newest point was at the most, are exact; ages between are rounded
//! up, by [`STEP_PERCENT`] at the most. Called by `recorder` and `rpo`.

use super::age::{Asked, Gap, Moment, Stretch, Unknown, gaps, stretches, worst_first};
use lifeboat::units::UnixMs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A line of [`super::log`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    pub from: UnixMs,
    pub until: UnixMs,
    /// The target that held then.
    pub target_ms: Option<u64>,
    pub known_ms: u64,
    /// For how long the newest point was no older than the target.
    pub within_ms: Option<u64>,
    pub longest_ms: Option<u64>,
    /// An age, and for how long it was no older than that, and older than the one before.
    pub ages: Vec<(u64, u64)>,
    /// How often the age exceeded the target, and the worst of it.
    pub exceeded: u64,
    pub worst: Vec<Gap>,
    pub unknown: Vec<Unknown>,
}

impl Slot {
    /// What is known now of the time from `asked.since` until then.
    pub fn of(moments: &[Moment], asked: Asked, until: UnixMs) -> Self {
        let (known, unknown) = stretches(moments, asked, until);
        let within = |target| known.iter().fold(0u64, |sum, of| sum.saturating_add(of.within(target)));
        let all = gaps(&known, asked.target_ms);
        let (exceeded, ends) = (all.len() as u64, [all.first().cloned(), all.last().cloned()]);
        let mut worst = all;
        worst_first(&mut worst, WORST_MAX);
        for end in ends.into_iter().flatten() {
            // What lasts from a slot into the next is to be known again there.
            if !worst.contains(&end) {
                worst.push(end);
            }
        }
        Self {
            from: asked.since,
            until,
            target_ms: asked.target_ms,
            known_ms: within(u64::MAX),
            within_ms: asked.target_ms.map(within),
            longest_ms: known.iter().map(Stretch::oldest).max(),
            ages: ages(&known),
            exceeded,
            worst,
            unknown,
        }
    }

    /// For how long it was no older than the target that held then; no older than this one, if none did.
    pub fn within(&self, target_ms: u64) -> u64 {
        let counted = || {
            let counts = self.ages.iter().filter(|(age, _)| *age <= target_ms);
            counts.fold(0u64, |sum, (_, ms)| sum.saturating_add(*ms))
        };
        self.within_ms.unwrap_or_else(counted)
    }

    /// Whether its figures can be of its time: it was read from a file.
    pub fn is_sound(&self) -> bool {
        let span = self.until.0.saturating_sub(self.from.0);
        let within = self.within_ms.unwrap_or(0);
        let aged = self.ages.iter().try_fold(0u64, |sum, (_, ms)| sum.checked_add(*ms));
        span > 0 && self.known_ms <= span && within <= self.known_ms && aged == Some(self.known_ms)
    }
}

fn ages(known: &[Stretch]) -> Vec<(u64, u64)> {
    let mut steps = BTreeMap::<u64, u64>::new();
    for stretch in known {
        let (mut step, mut counted) = (step_of(stretch.age), 0);
        loop {
            // The last step is that of all ages.
            let within = if step == u64::MAX { stretch.len } else { stretch.within(step) };
            let sum = steps.entry(step).or_default();
            *sum = sum.saturating_add(within - counted);
            counted = within;
            if counted >= stretch.len {
                break;
            }
            step = next(step);
        }
    }
    steps.retain(|_, ms| *ms > 0);
    steps.into_iter().collect()
}

/// Where an age lies: the least step that it does not exceed.
fn step_of(age: u64) -> u64 {
    let mut step = LEAST_MS;
    while step < age {
        step = next(step);
    }
    step
}

fn next(step: u64) -> u64 {
    step.saturating_add((step / 100).saturating_mul(STEP_PERCENT)).max(step.saturating_add(1))
}

const LEAST_MS: u64 = 100;
const STEP_PERCENT: u64 = 10;
const WORST_MAX: usize = 8;

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::report::{age::Why, rpo::attained};

    /// A point a second, each durable after 100 ms, but for some that are not there.
    pub fn a_second_each(until: u64, but: std::ops::Range<u64>) -> Vec<Moment> {
        let moment = |(no, second): (u64, u64)| Moment {
            cut_at: UnixMs(second * 1000),
            durable_at: UnixMs(second * 1000 + 100),
            no,
            era: 1,
            at_rest: false,
        };
        (0..until)
            .filter(|second| !but.contains(second))
            .enumerate()
            .map(|(at, of)| moment((at as u64, of)))
            .collect()
    }

    fn asked(since: u64, until: u64) -> Asked {
        Asked { since: UnixMs(since), until: UnixMs(until), target_ms: Some(2000) }
    }

    /// Goal: slots say of points that are gone what the points said. Method: both, of the same hour, with an outage that
    /// lasts from one slot into the next, and one in a slot.
    #[test]
    fn slots_tell_what_the_points_told() {
        let mut moments = a_second_each(3600, 1190..1260);
        moments.retain(|moment| !(2_000_000..2_004_000).contains(&moment.cut_at.0));
        (0u64..).zip(&mut moments).for_each(|(no, moment)| moment.no = no);
        let (since, now) = (600_000, 3_600_000);
        let slots: Vec<Slot> = (1..6)
            .map(|no| Slot::of(&moments, asked(no * 600_000, u64::MAX), UnixMs((no + 1) * 600_000)))
            .collect();
        assert!(slots.iter().all(|slot| slot.is_sound()), "{slots:?}");
        let points = attained(&moments, &[], asked(since, u64::MAX), UnixMs(now));
        assert_eq!((points.exceeded, points.known_ms), (2, now - since));
        // The points are thinned out, to the last.
        let recorded = attained(&moments[moments.len() - 1..], &slots, asked(since, u64::MAX), UnixMs(now));
        assert_eq!((recorded.known_ms, &recorded.unknown), (points.known_ms, &points.unknown));
        assert_eq!(recorded.within_percent, points.within_percent);
        assert_eq!((recorded.exceeded, &recorded.worst), (points.exceeded, &points.worst));
        assert_eq!((recorded.longest_ms, &recorded.over_time), (points.longest_ms, &points.over_time));
        for (recorded, points) in [(recorded.p50_ms, points.p50_ms), (recorded.p99_ms, points.p99_ms)] {
            let (recorded, points) = (recorded.unwrap(), points.unwrap());
            assert!(
                recorded >= points && recorded * 100 <= points * (100 + STEP_PERCENT),
                "{recorded} {points}"
            );
        }
        // Without the slots it is not known.
        let gone = attained(&moments[moments.len() - 1..], &[], asked(since, u64::MAX), UnixMs(now));
        assert_eq!(gone.unknown[0].why, Why::BeforeTheOldest);
        assert!(gone.known_ms < 1000);
    }

    #[test]
    fn where_nothing_was_recorded_the_points_that_are_left_tell() {
        let moments = a_second_each(3600, 0..0);
        let slot = |no: u64| Slot::of(&moments, asked(no * 600_000, u64::MAX), UnixMs((no + 1) * 600_000));
        // One is not there, one lies over another, one in the future.
        let slots = [slot(1), slot(1), slot(3), slot(9)];
        let found = attained(&moments, &slots, asked(1000, u64::MAX), UnixMs(3_000_000));
        assert_eq!((found.known_ms, found.unknown), (2_999_000, vec![]));
        assert_eq!(found.within_percent, Some(100.0));
        assert_eq!(found.over_time.len(), 1);
    }

    #[test]
    fn a_slot_has_the_target_of_its_time() {
        let moments = a_second_each(601, 0..0);
        let slot = Slot::of(&moments, asked(100, u64::MAX), UnixMs(600_000));
        let strict = Asked { target_ms: Some(600), ..asked(100, u64::MAX) };
        let percent = |slots: &[Slot]| attained(&moments, slots, strict, UnixMs(600_000)).within_percent;
        assert_eq!(percent(std::slice::from_ref(&slot)), Some(100.0));
        assert!(percent(&[]) < Some(51.0));
        // None held then: what was recorded of ages is gone by, to the nearest step above.
        let found = percent(&[Slot { within_ms: None, target_ms: None, ..slot }]);
        assert!(found > Some(40.0) && found <= percent(&[]), "{found:?}");
    }

    #[test]
    fn ages_beyond_all_measure_are_counted_and_end() {
        let known =
            [Stretch { from: 0, len: 5000, age: u64::MAX - 10 }, Stretch { from: 5000, len: 10, age: 0 }];
        assert_eq!(ages(&known).iter().map(|(_, ms)| ms).sum::<u64>(), 5010);
        let mut slot = Slot::of(&a_second_each(700, 0..0), asked(0, u64::MAX), UnixMs(600_000));
        assert!(slot.is_sound());
        slot.known_ms += 1;
        assert!(!slot.is_sound());
    }
}
