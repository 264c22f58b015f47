//! The RPO that was attained: at each instant, the age of the newest durable point. Pure: instants in, figures out.
//! Promises: a stretch of time counts only where no point can be missing between the two that bound it; any other is
//! counted as unknown, by its reason. Called by `gather`.

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

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RpoSlice")]
pub struct Slice {
    pub from: UnixMs,
    pub until: UnixMs,
    pub known_ms: u64,
    pub within_percent: Option<f64>,
    pub longest_ms: Option<u64>,
}

/// From one point's being durable to the next one's: the age rises from `age` by `len`.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    from: u64,
    len: u64,
    age: u64,
}

impl Stretch {
    fn end(&self) -> u64 {
        self.from.saturating_add(self.len)
    }
    fn oldest(&self) -> u64 {
        self.age.saturating_add(self.len)
    }
    /// For how long it is no older than this.
    fn within(&self, age: u64) -> u64 {
        age.saturating_sub(self.age).min(self.len)
    }
    /// The part of it that lies there.
    fn clip(&self, from: u64, until: u64) -> Option<Self> {
        let start = self.from.max(from);
        let end = self.end().min(until);
        let age = self.age.saturating_add(start - self.from);
        (start < end).then(|| Self { from: start, len: end - start, age })
    }
}

/// `moments` in the order of their numbers. `now` ends the report; what lies between it and `asked.until` is unknown.
pub fn attained(moments: &[Moment], asked: Asked, now: UnixMs) -> Attained {
    let (known, unknown) = stretches(moments, asked, now);
    let mut out = figures(&known, asked.target_ms);
    out.unknown = unknown;
    out.over_time = slices(&known, asked, now);
    out
}

fn stretches(moments: &[Moment], asked: Asked, now: UnixMs) -> (Vec<Stretch>, Vec<Unknown>) {
    let (since, until) = (asked.since.0, asked.until.0.min(now.0));
    let (mut known, mut unknown) = (Vec::new(), Vec::<Unknown>::new());
    let mut miss = |why, from: u64, to: u64, points_gone| {
        let ms = to.min(now.0).saturating_sub(from.max(since));
        if ms == 0 {
            return;
        }
        match unknown.iter_mut().find(|unknown| unknown.why == why) {
            Some(found) => {
                found.ms = found.ms.saturating_add(ms);
                found.points_gone = found.points_gone.saturating_add(points_gone);
            }
            None => unknown.push(Unknown { why, ms, points_gone }),
        }
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

fn figures(known: &[Stretch], target_ms: Option<u64>) -> Attained {
    let known_ms = total(known);
    let mut worst: Vec<Gap> = target_ms
        .into_iter()
        .flat_map(|target| known.iter().filter(move |stretch| stretch.oldest() > target))
        .map(|stretch| Gap {
            from: UnixMs(stretch.from.saturating_sub(stretch.age)),
            until: UnixMs(stretch.end()),
            age_ms: stretch.oldest(),
        })
        .collect();
    let exceeded = worst.len() as u64;
    worst.sort_by_key(|gap| (std::cmp::Reverse(gap.age_ms), gap.from));
    worst.truncate(WORST_MAX);
    Attained {
        known_ms,
        unknown: Vec::new(),
        within_percent: within_percent(known, target_ms),
        p50_ms: quantile(known, 50),
        p95_ms: quantile(known, 95),
        p99_ms: quantile(known, 99),
        longest_ms: known.iter().map(Stretch::oldest).max(),
        exceeded,
        worst,
        over_time: Vec::new(),
    }
}

fn total(known: &[Stretch]) -> u64 {
    known.iter().fold(0u64, |sum, stretch| sum.saturating_add(stretch.len))
}

fn within_percent(known: &[Stretch], target_ms: Option<u64>) -> Option<f64> {
    let all = total(known);
    let within = known.iter().fold(0u64, |sum, of| sum.saturating_add(of.within(target_ms.unwrap_or(0))));
    // Rounded down: 100 % is said of nothing less.
    let thousandths = u128::from(within) * 100_000 / u128::from(all.max(1));
    (all > 0 && target_ms.is_some()).then(|| thousandths as f64 / 1000.0)
}

/// The least age that was not exceeded for so much of the time.
fn quantile(known: &[Stretch], percent: u64) -> Option<u64> {
    let all = u128::from(total(known));
    if all == 0 {
        return None;
    }
    let reached = |age: u64| {
        let within = known.iter().map(|stretch| u128::from(stretch.within(age))).sum::<u128>();
        within * 100 >= all * u128::from(percent)
    };
    let (mut low, mut high) = (0, known.iter().map(Stretch::oldest).max()?);
    while low < high {
        let middle = low + (high - low) / 2;
        if reached(middle) { high = middle } else { low = middle + 1 }
    }
    Some(low)
}

fn slices(known: &[Stretch], asked: Asked, now: UnixMs) -> Vec<Slice> {
    let span = now.0.saturating_sub(asked.since.0);
    let width = if span <= 2 * DAY_MS { HOUR_MS } else { DAY_MS.saturating_mul(span / (90 * DAY_MS) + 1) };
    let mut out = Vec::new();
    let (mut from, mut rest) = (asked.since.0 / width * width, known);
    while from < now.0 {
        let until = from.saturating_add(width);
        let begun = rest.partition_point(|stretch| stretch.end() <= from);
        rest = &rest[begun..];
        let here = rest.iter().take_while(|stretch| stretch.from < until);
        let own: Vec<Stretch> = here.filter_map(|stretch| stretch.clip(from, until)).collect();
        if !own.is_empty() {
            out.push(Slice {
                from: UnixMs(from.max(asked.since.0)),
                until: UnixMs(until.min(now.0)),
                known_ms: total(&own),
                within_percent: within_percent(&own, asked.target_ms),
                longest_ms: own.iter().map(Stretch::oldest).max(),
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
        let found = attained(&moments, asked(1100, 6100), UnixMs(6100));
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
        let found = attained(&moments, asked(0, 21_000), UnixMs(30_000));
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

        let nothing = attained(&[], asked(0, 500), UnixMs(500));
        assert_eq!((nothing.known_ms, nothing.within_percent, nothing.p50_ms), (0, None, None));
        assert_eq!(unknown(&nothing), [(Why::BeforeTheOldest, 500, 0)]);
    }

    #[test]
    fn only_the_time_of_the_report_counts_and_the_newest_point_ages_until_now() {
        let moments = [at(1, 1000), at(2, 2000)];
        let found = attained(&moments, asked(5000, 9000), UnixMs(9000));
        assert_eq!((found.known_ms, found.longest_ms, found.within_percent), (4000, Some(7000), Some(0.0)));
        assert_eq!(found.worst, [Gap { from: UnixMs(2000), until: UnixMs(9000), age_ms: 7000 }]);
        assert_eq!(found.p50_ms, Some(5000));
        let without = attained(&moments, Asked { target_ms: None, ..asked(5000, 9000) }, UnixMs(9000));
        assert_eq!((without.within_percent, without.exceeded), (None, 0));
        assert_eq!(without.p50_ms, Some(5000), "ages need no target");
    }

    #[test]
    fn clocks_that_disagree_or_are_set_back_count_no_time_twice() {
        let mut moments = [at(1, 5000), at(2, 6000), at(3, 7000)];
        // Cut later than it was durable here, by the source's clock; and the site's was set back.
        moments[1] = Moment { cut_at: UnixMs(9000), durable_at: UnixMs(4000), ..moments[1] };
        let found = attained(&moments, asked(5100, 8000), UnixMs(8000));
        assert_eq!(found.known_ms, 2900);
        assert!(found.longest_ms < Some(3000), "{found:?}");
    }

    #[test]
    fn a_long_time_is_told_by_the_day_and_a_short_one_by_the_hour() {
        let points: Vec<Moment> = (0..72).map(|hour| at(hour + 1, hour * HOUR_MS)).collect();
        let now = 72 * HOUR_MS;
        let days = attained(&points, asked(0, now), UnixMs(now)).over_time;
        assert_eq!(days.len(), 3);
        assert_eq!((days[1].from, days[1].until), (UnixMs(DAY_MS), UnixMs(2 * DAY_MS)));
        assert_eq!(days[1].known_ms, DAY_MS);
        let hours = attained(&points, asked(now - DAY_MS, now), UnixMs(now)).over_time;
        assert_eq!(hours.len(), 24);
        let years = attained(&points, asked(0, 900 * DAY_MS), UnixMs(900 * DAY_MS)).over_time;
        assert!(years.len() <= 100, "{}", years.len());
    }
}
