//! Why points come later than they should, in numbers: where a point's time went, and what would be needed instead.
//! Pure: times and bytes in, a verdict out. Promises: a verdict is given only where points take longer than the
//! interval, and "needs" then always exceeds "has". Called by the protection actor.

use lifeboat::units::BitRate;
use serde::{Deserialize, Serialize};
use std::{collections::VecDeque, fmt, time::Duration};
use tokio::time::Instant;

/// What protection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The next point is not due yet, or there is no link.
    Rest,
    /// The guest, its QEMU and its pages.
    Capture,
    /// Compression.
    Pack,
    /// Frames on their way to the site, or room for more of them.
    Link,
    /// Everything is there, and the site makes it durable.
    Site,
}

/// How long each stage was waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub rest: Duration,
    pub capture: Duration,
    pub pack: Duration,
    pub link: Duration,
    pub site: Duration,
}

impl Times {
    pub fn of_point(&self) -> Duration {
        self.capture + self.pack + self.link + self.site
    }

    pub fn add(&mut self, stage: Stage, span: Duration) {
        *match stage {
            Stage::Rest => &mut self.rest,
            Stage::Capture => &mut self.capture,
            Stage::Pack => &mut self.pack,
            Stage::Link => &mut self.link,
            Stage::Site => &mut self.site,
        } += span;
    }

    fn add_all(&mut self, other: &Self) {
        for (stage, span) in [
            (Stage::Rest, other.rest),
            (Stage::Capture, other.capture),
            (Stage::Pack, other.pack),
            (Stage::Link, other.link),
            (Stage::Site, other.site),
        ] {
            self.add(stage, span);
        }
    }
}

/// One point, from its begin to its acknowledgement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lap {
    pub times: Times,
    /// From the instant that the point is of to its acknowledgement.
    pub latency: Duration,
    /// Bytes of frames that it put on the link.
    pub bytes: u64,
    /// Bytes that the site has taken meanwhile, and for how long there was something for it to take.
    pub taken: u64,
    pub busy: Duration,
}

/// What points wait for the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    LinkBound,
    CaptureBound,
    CpuBound,
    SiteBound,
}

/// Why points come later than the interval says, and how late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub cause: Cause,
    /// From one point to the next, milliseconds.
    pub every_ms: u64,
    /// Age of the newest durable point just before the next one takes its place, milliseconds.
    pub rpo_ms: u64,
    /// Of that, what the cause takes of each point, milliseconds.
    pub cause_ms: u64,
    /// Bits a second that would carry a point's bytes in time, and that were carried.
    pub needs_bits: u64,
    pub has_bits: u64,
}

/// The last points, as far as they count.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    laps: VecDeque<Lap>,
}

impl Pace {
    pub fn new(interval: Duration) -> Self {
        Self { interval, laps: VecDeque::new() }
    }

    /// A point has become durable.
    pub fn finished(&mut self, lap: Lap) {
        if self.laps.len() == LAPS {
            self.laps.pop_front();
        }
        self.laps.push_back(lap);
    }

    /// The link went away, or something else happened after which the past tells nothing.
    pub fn forget(&mut self) {
        self.laps.clear();
    }

    pub fn verdict(&self) -> Option<Verdict> {
        // When the newest point was in time, whatever it was is over.
        let newest = self.laps.back()?;
        (newest.times.of_point() > self.interval).then(|| self.judge(self.laps.iter())).flatten()
    }

    /// While a point is under way that should have been there already: `lap` is what is known of it, `rest` the bytes
    /// that are still on their way.
    pub fn verdict_with(&self, lap: &Lap, rest: u64) -> Option<Verdict> {
        let still = match rate(lap.taken, lap.busy) {
            Some(has) if rest > 0 => Duration::try_from_secs_f64(rest as f64 / has).unwrap_or(FOREVER),
            _ => Duration::ZERO,
        };
        let mut lap = *lap;
        lap.times.link += still.min(FOREVER);
        lap.busy += still.min(FOREVER);
        lap.latency += still.min(FOREVER);
        lap.taken += if still.is_zero() { 0 } else { rest };
        (lap.times.of_point() > self.interval).then(|| self.judge(std::iter::once(&lap))).flatten()
    }

    fn judge<'a>(&self, laps: impl Iterator<Item = &'a Lap>) -> Option<Verdict> {
        let (mut sum, mut count) = (Lap::default(), 0_u32);
        for lap in laps {
            sum.times.add_all(&lap.times);
            sum.latency += lap.latency;
            sum.bytes += lap.bytes;
            sum.taken += lap.taken;
            sum.busy += lap.busy;
            count += 1;
        }
        let Times { capture, pack, link, site, .. } = sum.times;
        let took = sum.times.of_point().checked_div(count)?;
        if took <= self.interval {
            return None;
        }
        let causes = [
            (link, Cause::LinkBound),
            (capture, Cause::CaptureBound),
            (pack, Cause::CpuBound),
            (site, Cause::SiteBound),
        ];
        let (waited, cause) = causes.into_iter().max_by_key(|(waited, _)| *waited)?;
        let busy = sum.busy / count;
        let has = rate(sum.taken, sum.busy).unwrap_or(0.0);
        // What is not spent on the link leaves this much of the interval for it.
        let left = self.interval.saturating_sub(took.saturating_sub(busy)).max(self.interval / 2);
        let needs = rate(sum.bytes / u64::from(count), left).unwrap_or(0.0).max(has);
        Some(Verdict {
            cause,
            every_ms: millis(took),
            rpo_ms: millis(took + sum.latency / count),
            cause_ms: millis(waited / count),
            needs_bits: (needs * 8.0) as u64,
            has_bits: (has * 8.0) as u64,
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
        write!(f, "RPO {}: ", seconds(self.rpo_ms))?;
        let (each, every) = (seconds(self.cause_ms), seconds(self.every_ms));
        match self.cause {
            Cause::LinkBound => {
                write!(f, "link-bound, needs {}, has {}", BitRate(self.needs_bits), BitRate(self.has_bits))?;
            }
            Cause::CaptureBound => write!(f, "capture-bound, reading the guest takes {each} of each point")?,
            Cause::CpuBound => write!(f, "CPU-bound, compressing takes {each} of each point")?,
            Cause::SiteBound => write!(f, "site-bound, the site takes {each} to make a point durable")?,
        }
        write!(f, "; a point every {every}")
    }
}

/// Watches one actor: what it waits for, and what the link takes meanwhile.
#[derive(Debug)]
pub struct Meter {
    stage: Stage,
    since: Instant,
    times: Times,
    pub held: u64,
    held_since: Instant,
    busy: Duration,
}

impl Meter {
    pub fn new(now: Instant) -> Self {
        let (times, busy) = (Times::default(), Duration::ZERO);
        Self { stage: Stage::Rest, since: now, times, held: 0, held_since: now, busy }
    }

    /// From now on `stage` is what is waited for.
    pub fn enter(&mut self, stage: Stage, now: Instant) {
        self.times.add(self.stage, now.saturating_duration_since(self.since));
        (self.stage, self.since) = (stage, now);
    }

    /// So many bytes are on their way now, untaken.
    pub fn holds(&mut self, bytes: u64, now: Instant) {
        if self.held > 0 {
            self.busy += now.saturating_duration_since(self.held_since);
        }
        (self.held, self.held_since) = (bytes, now);
    }

    /// Totals since the start, up to now.
    pub fn read(&mut self, now: Instant) -> (Times, Duration) {
        self.enter(self.stage, now);
        self.holds(self.held, now);
        (self.times, self.busy)
    }
}

impl std::ops::Sub for Times {
    type Output = Self;
    fn sub(self, before: Self) -> Self {
        Self {
            rest: self.rest.saturating_sub(before.rest),
            capture: self.capture.saturating_sub(before.capture),
            pack: self.pack.saturating_sub(before.pack),
            link: self.link.saturating_sub(before.link),
            site: self.site.saturating_sub(before.site),
        }
    }
}

/// Bytes a second.
fn rate(bytes: u64, span: Duration) -> Option<f64> {
    (!span.is_zero() && bytes > 0).then(|| bytes as f64 / span.as_secs_f64())
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Points that a verdict looks at.
const LAPS: usize = 3;
/// Longer than this nobody waits, and no number is made of it.
const FOREVER: Duration = Duration::from_secs(30 * 86_400);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn lap(capture: u64, pack: u64, link: u64, site: u64, bytes: u64) -> Lap {
        let times =
            Times { rest: SECOND, capture: ms(capture), pack: ms(pack), link: ms(link), site: ms(site) };
        Lap { times, latency: times.of_point(), bytes, taken: bytes, busy: ms(link) }
    }

    /// 5 MB/s carried, and 7.75 s a point where 5 s were asked for.
    #[test]
    fn a_link_that_is_too_narrow_is_named_with_what_it_has_and_what_it_would_need() {
        let mut pace = Pace::new(5 * SECOND);
        pace.finished(lap(0, 0, 7_750, 0, 38_750_000));
        let verdict = pace.verdict().unwrap();
        assert_eq!(
            verdict.to_string(),
            "RPO 15.5 s: link-bound, needs 62.0 Mbit/s, has 40.0 Mbit/s; a point every 7.7 s"
        );
        // One that is in time again ends it at once.
        pace.finished(lap(100, 0, 200, 50, 1_000_000));
        assert_eq!(pace.verdict(), None);
    }

    #[test]
    fn what_is_waited_for_the_most_is_the_cause() {
        for (lap, cause) in [
            (lap(900, 100, 200, 50, 1000), Cause::CaptureBound),
            (lap(100, 900, 200, 50, 1000), Cause::CpuBound),
            (lap(100, 100, 200, 900, 1000), Cause::SiteBound),
            (lap(300, 100, 700, 50, 1000), Cause::LinkBound),
        ] {
            let mut pace = Pace::new(SECOND);
            pace.finished(lap);
            let verdict = pace.verdict().unwrap();
            assert_eq!(verdict.cause, cause, "{verdict}");
        }
        let mut pace = Pace::new(2 * SECOND);
        pace.finished(lap(900, 100, 200, 50, 1000));
        assert_eq!(pace.verdict(), None, "it was in time");
    }

    #[test]
    fn a_point_that_is_late_is_judged_before_it_is_there() {
        let pace = Pace::new(SECOND);
        let mut under_way = lap(100, 0, 1_900, 0, 10_000_000);
        under_way.taken = 2_000_000;
        let verdict = pace.verdict_with(&under_way, 8_000_000).unwrap();
        assert_eq!(verdict.cause, Cause::LinkBound);
        // A fifth took 1.9 s, so all of it takes 9.5 s.
        assert_eq!(verdict.every_ms, 9_600);
        assert!((8_300_000..8_500_000).contains(&verdict.has_bits), "{verdict:?}");
        // Nothing taken at all: no rate, and no panic.
        under_way.taken = 0;
        assert_eq!(pace.verdict_with(&under_way, 10_000_000).unwrap().has_bits, 0);
    }

    #[test]
    fn time_goes_to_the_stage_that_was_waited_for_and_the_link_is_busy_while_something_is_on_its_way() {
        let start = Instant::now();
        let mut meter = Meter::new(start);
        meter.enter(Stage::Capture, start + ms(10));
        meter.holds(500, start + ms(20));
        meter.enter(Stage::Link, start + ms(30));
        meter.holds(0, start + ms(70));
        meter.enter(Stage::Site, start + ms(80));
        let (times, busy) = meter.read(start + ms(100));
        let expected = Times { rest: ms(10), capture: ms(20), pack: ms(0), link: ms(50), site: ms(20) };
        assert_eq!((times, busy), (expected, ms(50)));
    }

    proptest! {
        /// However a late point's time was spent, what the link needs is more than what it has.
        #[test]
        fn needs_always_exceeds_has_where_points_are_link_bound(
            interval in 200_u64..10_000, capture in 0_u64..8_000, pack in 0_u64..8_000, link in 1_u64..90_000,
            site in 0_u64..8_000, overlapped in 0_u64..8_000, bytes in 1_000_u64..1 << 36, laps in 1_usize..5,
        ) {
            let mut pace = Pace::new(ms(interval));
            for _ in 0..laps {
                let mut lap = lap(capture, pack, link, site, bytes);
                lap.busy += ms(overlapped.min(capture + pack));
                pace.finished(lap);
            }
            match pace.verdict() {
                None => prop_assert!(capture + pack + link + site <= interval),
                Some(verdict) => {
                    prop_assert!(verdict.every_ms > interval);
                    prop_assert!(verdict.rpo_ms >= verdict.every_ms);
                    if verdict.cause == Cause::LinkBound {
                        prop_assert!(verdict.needs_bits >= verdict.has_bits, "{verdict:?}");
                        prop_assert!(verdict.has_bits > 0 || bytes < 20_000);
                    }
                }
            }
        }
    }
}
