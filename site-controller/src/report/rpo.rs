//! The RPO that was attained: at each instant, the age of the newest durable point. Pure: points that are left and slots that
//! were recorded in, figures out.
//! Promises: what neither tells is counted as unknown, by its reason; no time is counted twice. Called by `gather`.

use super::{
    age::{Asked, Gap, Moment, Stretch, Unknown, count, gaps, stretches, worst_first},
    slot::Slot,
};
use lifeboat::units::UnixMs;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Figures over time: each millisecond weighs the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RpoAttained")]
pub struct Attained {
    /// Time for which the age is known. All figures below are of that time alone.
    pub known_ms: u64,
    pub unknown: Vec<Unknown>,
    /// For how much of the known time the newest point was no older than the target, in percent.
    pub within_percent: Option<f64>,
    /// The age that was not exceeded for half of the time, 95 % of it, 99 % of it, ever.
    pub p50_ms: Option<u64>,
    pub p95_ms: Option<u64>,
    pub p99_ms: Option<u64>,
    pub longest_ms: Option<u64>,
    /// How often the age exceeded the target, and the worst times of these.
    pub exceeded: u64,
    pub worst: Vec<Gap>,
    /// The same by hour or day.
    pub over_time: Vec<Slice>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RpoSlice")]
pub struct Slice {
    pub from: UnixMs,
    pub until: UnixMs,
    pub known_ms: u64,
    pub within_percent: Option<f64>,
    pub longest_ms: Option<u64>,
}

/// Some time of the report.
struct Part<'a> {
    from: u64,
    until: u64,
    known: Known<'a>,
}

enum Known<'a> {
    /// To the millisecond.
    Points(Vec<Stretch>),
    Recorded(&'a Slot),
}

/// `moments` in the order of their numbers, `recorded` in that of time. What was recorded counts; where nothing was, the
/// points that are left are asked. `now` ends the report; what lies between `asked.until` and it is unknown.
pub fn attained(moments: &[Moment], recorded: &[Slot], asked: Asked, now: UnixMs) -> Attained {
    let (mut parts, mut unknown) = (Vec::new(), Vec::new());
    let mut from = asked.since;
    // The end of the report is one more, of no length.
    let all = recorded.iter().map(|slot| (slot.from, slot.until, Some(slot))).chain([(now, now, None)]);
    for (begin, end, slot) in all {
        // One that lies over the one before was written when the clock had been set back.
        if begin < from || end > now {
            continue;
        }
        let (known, not) = stretches(moments, Asked { since: from, ..asked }, begin);
        let recorded = slot.map(|slot| &slot.unknown).into_iter().flatten().cloned();
        not.into_iter().chain(recorded).for_each(|of| count(&mut unknown, of));
        parts.push(Part { from: from.0, until: begin.0, known: Known::Points(known) });
        parts.extend(slot.map(|slot| Part { from: begin.0, until: end.0, known: Known::Recorded(slot) }));
        from = end;
    }
    let mut out = figures(&parts, asked.target_ms);
    out.unknown = unknown;
    out.over_time = slices(&parts, asked, now);
    out
}

impl Part<'_> {
    fn known_ms(&self) -> u64 {
        match &self.known {
            Known::Points(known) => sum(known.iter().map(|stretch| stretch.len)),
            Known::Recorded(slot) => slot.known_ms,
        }
    }

    /// For how long it was no older than the target; where that was recorded, than the one that held then.
    fn within(&self, target_ms: u64) -> u64 {
        match &self.known {
            Known::Points(known) => sum(known.iter().map(|stretch| stretch.within(target_ms))),
            Known::Recorded(slot) => slot.within(target_ms),
        }
    }

    fn longest_ms(&self) -> Option<u64> {
        match &self.known {
            Known::Points(known) => known.iter().map(Stretch::oldest).max(),
            Known::Recorded(slot) => slot.longest_ms,
        }
    }

    /// When the target was exceeded, how often; of a slot not each of them is told.
    fn gaps(&self, target_ms: Option<u64>) -> (u64, Vec<Gap>) {
        match &self.known {
            Known::Points(known) => {
                let gaps = gaps(known, target_ms);
                (gaps.len() as u64, gaps)
            }
            Known::Recorded(slot) => (slot.exceeded, slot.worst.clone()),
        }
    }

    /// The part of it that lies there; a slot is taken whole, by its beginning.
    fn clip(&self, from: u64, until: u64) -> Option<Part<'_>> {
        let known = match &self.known {
            Known::Points(known) => {
                let begun = known.partition_point(|stretch| stretch.end() <= from);
                let here = known[begun..].iter().take_while(|stretch| stretch.from < until);
                Known::Points(here.filter_map(|stretch| stretch.clip(from, until)).collect())
            }
            Known::Recorded(slot) if (from..until).contains(&slot.from.0) => Known::Recorded(slot),
            Known::Recorded(_) => return None,
        };
        Some(Part { from: self.from.max(from), until: self.until.min(until), known })
    }
}

fn figures(parts: &[Part], target_ms: Option<u64>) -> Attained {
    let (mut exceeded, mut worst) = (0u64, BTreeMap::<UnixMs, Gap>::new());
    for part in parts {
        let (count, gaps) = part.gaps(target_ms);
        exceeded = exceeded.saturating_add(count);
        for gap in gaps {
            // One that lasts from one part into the next is one.
            match worst.get(&gap.from) {
                Some(before) => {
                    exceeded = exceeded.saturating_sub(1);
                    if before.age_ms < gap.age_ms {
                        worst.insert(gap.from, gap);
                    }
                }
                None => drop(worst.insert(gap.from, gap)),
            }
        }
    }
    let mut worst: Vec<Gap> = worst.into_values().collect();
    worst_first(&mut worst, WORST_MAX);
    let ages = Ages::of(parts);
    Attained {
        known_ms: total(parts),
        unknown: Vec::new(),
        within_percent: within_percent(parts, target_ms),
        p50_ms: ages.quantile(50),
        p95_ms: ages.quantile(95),
        p99_ms: ages.quantile(99),
        longest_ms: longest(parts),
        exceeded,
        worst,
        over_time: Vec::new(),
    }
}

fn sum(all: impl Iterator<Item = u64>) -> u64 {
    all.fold(0, u64::saturating_add)
}

fn total(parts: &[Part]) -> u64 {
    sum(parts.iter().map(Part::known_ms))
}

fn longest(parts: &[Part]) -> Option<u64> {
    parts.iter().filter_map(Part::longest_ms).max()
}

fn within_percent(parts: &[Part], target_ms: Option<u64>) -> Option<f64> {
    let (all, target_ms) = (total(parts), target_ms?);
    let within = sum(parts.iter().map(|part| part.within(target_ms)));
    // Rounded down: 100 % is said of nothing less.
    let thousandths = u128::from(within) * 100_000 / u128::from(all.max(1));
    (all > 0).then(|| thousandths as f64 / 1000.0)
}

/// How long which age was not exceeded.
struct Ages<'a> {
    stretches: Vec<&'a Stretch>,
    /// Of slots: an age, and for how long it was that at the most.
    steps: BTreeMap<u64, u64>,
    all: u128,
}

impl<'a> Ages<'a> {
    fn of(parts: &'a [Part]) -> Self {
        let (mut stretches, mut steps) = (Vec::new(), BTreeMap::new());
        for part in parts {
            match &part.known {
                Known::Points(known) => stretches.extend(known),
                Known::Recorded(slot) => {
                    for (age, ms) in &slot.ages {
                        let sum: &mut u64 = steps.entry(*age).or_default();
                        *sum = sum.saturating_add(*ms);
                    }
                }
            }
        }
        Self { stretches, steps, all: u128::from(total(parts)) }
    }

    fn within(&self, age: u64) -> u128 {
        let stretches = self.stretches.iter().map(|stretch| u128::from(stretch.within(age))).sum::<u128>();
        stretches + self.steps.range(..=age).map(|(_, ms)| u128::from(*ms)).sum::<u128>()
    }

    /// The least age that was not exceeded for so much of the time.
    fn quantile(&self, percent: u64) -> Option<u64> {
        let oldest = self.stretches.iter().map(|stretch| stretch.oldest()).max();
        let mut high = oldest.max(self.steps.keys().next_back().copied())?;
        let mut low = 0;
        while low < high {
            let middle = low + (high - low) / 2;
            if self.within(middle) * 100 >= self.all * u128::from(percent) {
                high = middle
            } else {
                low = middle + 1
            }
        }
        (self.all > 0).then_some(low)
    }
}

fn slices(parts: &[Part], asked: Asked, now: UnixMs) -> Vec<Slice> {
    let span = now.0.saturating_sub(asked.since.0);
    let width = if span <= 2 * DAY_MS { HOUR_MS } else { DAY_MS.saturating_mul(span / (90 * DAY_MS) + 1) };
    let mut out = Vec::new();
    let (mut from, mut rest) = (asked.since.0 / width * width, parts);
    while from < now.0 {
        let until = from.saturating_add(width);
        let begun = rest.partition_point(|part| part.until <= from);
        rest = &rest[begun..];
        let here = rest.iter().take_while(|part| part.from < until);
        let own: Vec<Part> = here.filter_map(|part| part.clip(from, until)).collect();
        let known_ms = total(&own);
        if known_ms > 0 {
            out.push(Slice {
                from: UnixMs(from.max(asked.since.0)),
                until: UnixMs(until.min(now.0)),
                known_ms,
                within_percent: within_percent(&own, asked.target_ms),
                longest_ms: longest(&own),
            });
        }
        from = until;
    }
    out
}

const WORST_MAX: usize = 20;
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::age::Why;

    /// Durable 100 ms after its instant.
    fn at(no: u64, cut_at: u64) -> Moment {
        Moment { cut_at: UnixMs(cut_at), durable_at: UnixMs(cut_at + 100), no, era: 1, at_rest: false }
    }

    fn asked(since: u64, until: u64) -> Asked {
        Asked { since: UnixMs(since), until: UnixMs(until), target_ms: Some(1000) }
    }

    fn unknown(of: &Attained) -> Vec<(Why, u64, u64)> {
        of.unknown.iter().map(|unknown| (unknown.why, unknown.ms, unknown.points_gone)).collect()
    }

    #[test]
    fn the_age_rises_from_point_to_point_and_each_moment_weighs_the_same() {
        // Each second one, and then none for three.
        let moments = [at(1, 1000), at(2, 2000), at(3, 3000), at(4, 6000)];
        let found = attained(&moments, &[], asked(1100, 6100), UnixMs(6100));
        assert_eq!((found.known_ms, unknown(&found)), (5000, vec![]));
        assert_eq!(found.longest_ms, Some(3100));
        // Of five seconds: 900 ms of each of the first two, 900 of the last three.
        assert_eq!(found.within_percent, Some(54.0));
        assert_eq!((found.exceeded, found.worst.len()), (3, 3));
        let worst = Gap { from: UnixMs(3000), until: UnixMs(6100), age_ms: 3100 };
        assert_eq!(found.worst[0], worst);
        // Ages from 100 to 1100 three times, on to 3100 once.
        assert_eq!(found.p50_ms, Some(934));
        assert_eq!(found.p99_ms, Some(3050));
        assert_eq!(found.over_time.iter().map(|slice| slice.known_ms).sum::<u64>(), 5000);
    }

    #[test]
    fn what_can_t_be_known_is_counted_as_such_and_never_as_kept_or_missed() {
        let mut moments = [at(1, 1000), at(2, 2000), at(7, 7000), at(8, 8000), at(9, 20_000)];
        moments[4].era = 2;
        let found = attained(&moments, &[], asked(0, 21_000), UnixMs(30_000));
        assert_eq!(
            unknown(&found),
            [
                (Why::BeforeTheOldest, 1100, 0),
                (Why::ThinnedOut, 5000, 4),
                (Why::ChangedHands, 12_000, 0),
                (Why::FailedOver, 9000, 0),
            ]
        );
        // From the first to the second, from the third to the fourth, and the last until the failover.
        assert_eq!(found.known_ms, 1000 + 1000 + 900);
        assert_eq!(found.known_ms + found.unknown.iter().map(|of| of.ms).sum::<u64>(), 30_000);
        assert_eq!(found.exceeded, 2, "100 ms each, on the way");

        let nothing = attained(&[], &[], asked(0, 500), UnixMs(500));
        assert_eq!((nothing.known_ms, nothing.within_percent, nothing.p50_ms), (0, None, None));
        assert_eq!(unknown(&nothing), [(Why::BeforeTheOldest, 500, 0)]);
    }

    #[test]
    fn only_the_time_of_the_report_counts_and_the_newest_point_ages_until_now() {
        let moments = [at(1, 1000), at(2, 2000)];
        let found = attained(&moments, &[], asked(5000, 9000), UnixMs(9000));
        assert_eq!((found.known_ms, found.longest_ms, found.within_percent), (4000, Some(7000), Some(0.0)));
        assert_eq!(found.worst, [Gap { from: UnixMs(2000), until: UnixMs(9000), age_ms: 7000 }]);
        assert_eq!(found.p50_ms, Some(5000));
        let without = attained(&moments, &[], Asked { target_ms: None, ..asked(5000, 9000) }, UnixMs(9000));
        assert_eq!((without.within_percent, without.exceeded), (None, 0));
        assert_eq!(without.p50_ms, Some(5000), "ages need no target");
    }

    #[test]
    fn clocks_that_disagree_or_are_set_back_count_no_time_twice() {
        let mut moments = [at(1, 5000), at(2, 6000), at(3, 7000)];
        // Cut later than it was durable here, by the source's clock; and the site's was set back.
        moments[1] = Moment { cut_at: UnixMs(9000), durable_at: UnixMs(4000), ..moments[1] };
        let found = attained(&moments, &[], asked(5100, 8000), UnixMs(8000));
        assert_eq!(found.known_ms, 2900);
        assert!(found.longest_ms < Some(3000), "{found:?}");
    }

    #[test]
    fn a_long_time_is_told_by_the_day_and_a_short_one_by_the_hour() {
        let points: Vec<Moment> = (0..72).map(|hour| at(hour + 1, hour * HOUR_MS)).collect();
        let now = 72 * HOUR_MS;
        let days = attained(&points, &[], asked(0, now), UnixMs(now)).over_time;
        assert_eq!(days.len(), 3);
        assert_eq!((days[1].from, days[1].until), (UnixMs(DAY_MS), UnixMs(2 * DAY_MS)));
        assert_eq!(days[1].known_ms, DAY_MS);
        let hours = attained(&points, &[], asked(now - DAY_MS, now), UnixMs(now)).over_time;
        assert_eq!(hours.len(), 24);
        let years = attained(&points, &[], asked(0, 900 * DAY_MS), UnixMs(900 * DAY_MS)).over_time;
        assert!(years.len() <= 100, "{}", years.len());
    }
}
