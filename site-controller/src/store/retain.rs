//! Which points are worth keeping. Pure: points in, reasons out; no clock is asked.
//!
//! A rule counts *protected* time: `all for 1h` is the last hour in which points were made, `hourly for 24h` the last 24
//! hours that have any. So nothing grows old because a source was down, a site was asleep or a clock jumped; a point
//! whose date lies in the future fills one slot and leaves with it. Of each slot the first whole point stays, so that a
//! later pass never wants what an earlier one gave up, unless the clock went back into a slot that was left. The newest
//! point always stays. Called by config and retention.

use lifeboat::units::{Seq, Span, UnixMs};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

/// One line of `keep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// One point of each slot of so many milliseconds; 0 keeps all.
    slot_ms: u64,
    /// For so long; none is forever.
    for_ms: Option<u64>,
}

/// What `keep` says. A point stays if any rule wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error(
        "`{0}` is not a rule; write for example `all for 1h`, `hourly for 24h`, `every 15m for 6h` or `all`"
    )]
    Unreadable(String),
    #[error("`{0}`: it keeps one point of each {slot} for less than that", slot = .1)]
    Short(String, String),
    #[error("no rule or too many: write 1 to {RULES_MAX}, or `all` to keep every point forever")]
    Rules,
}

/// A point, as far as the policy is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub seq: Seq,
    pub cut_at: UnixMs,
    pub whole: bool,
}

/// Why a point stays. The coarsest rule says how long it will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// By a rule that keeps all.
    All,
    /// The first whole point of a slot of so many milliseconds, the slot's number since 1970.
    Slot { slot_ms: u64, no: u64 },
    /// It is the newest, and no rule wants it.
    Newest,
}

impl Policy {
    pub fn parse<T: AsRef<str>>(rules: &[T]) -> Result<Self, PolicyError> {
        if rules.is_empty() || rules.len() > RULES_MAX {
            return Err(PolicyError::Rules);
        }
        rules.iter().map(|rule| rule.as_ref().parse()).collect::<Result<_, _>>().map(Self)
    }

    /// The points of one history, by seq, that stay, and why.
    pub fn wanted(&self, points: &[Stamp]) -> BTreeMap<Seq, Why> {
        let mut wanted = BTreeMap::<Seq, Why>::new();
        let mut want = |seq, why| {
            let held = wanted.entry(seq).or_insert(why);
            *held = why.max(*held);
        };
        for rule in &self.0 {
            match rule.slot_ms {
                0 => recent(points, rule.for_ms).iter().for_each(|point| want(point.seq, Why::All)),
                slot_ms => {
                    let count = rule.for_ms.map_or(usize::MAX, |ms| (ms / slot_ms) as usize);
                    for (no, point) in first_of_slots(points, slot_ms, count) {
                        want(point.seq, Why::Slot { slot_ms, no });
                    }
                }
            }
        }
        if let Some(newest) = points.last() {
            wanted.entry(newest.seq).or_insert(Why::Newest);
        }
        wanted
    }
}

impl Default for Policy {
    fn default() -> Self {
        let rule = |slot_ms, for_ms| Rule { slot_ms, for_ms: Some(for_ms) };
        Self(vec![rule(0, HOUR_MS), rule(HOUR_MS, DAY_MS), rule(DAY_MS, 30 * DAY_MS)])
    }
}

/// The points of the last `for_ms` of protected time.
fn recent(points: &[Stamp], for_ms: Option<u64>) -> &[Stamp] {
    let Some(for_ms) = for_ms else { return points };
    let (mut age_ms, mut from) = (0, points.len());
    for (at, point) in points.iter().enumerate().rev() {
        if let Some(after) = points.get(at + 1) {
            let gap = after.cut_at.0.saturating_sub(point.cut_at.0);
            age_ms += gap.clamp(GAP_MIN_MS, GAP_MAX_MS);
        }
        if age_ms > for_ms {
            break;
        }
        from = at;
    }
    &points[from..]
}

/// The point that stays of each of the last `count` slots: slots are counted in the order in which they were begun.
fn first_of_slots(points: &[Stamp], slot_ms: u64, count: usize) -> Vec<(u64, Stamp)> {
    let (mut order, mut first) = (Vec::new(), BTreeMap::<u64, Stamp>::new());
    for point in points {
        let slot = point.cut_at.0 / slot_ms;
        match first.get_mut(&slot) {
            None => {
                order.push(slot);
                first.insert(slot, *point);
            }
            Some(held) if point.whole && !held.whole => *held = *point,
            Some(_) => {}
        }
    }
    let last: BTreeSet<u64> = order.iter().rev().take(count).copied().collect();
    first.into_iter().filter(|(slot, _)| last.contains(slot)).collect()
}

impl FromStr for Rule {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let refuse = || PolicyError::Unreadable(text.chars().take(80).collect());
        let (what, span) = match text.split_once(" for ") {
            Some((what, span)) => (what.trim(), Some(span.trim())),
            None => (text.trim(), None),
        };
        let ms = |span: &str| {
            let span: Span = span.parse().map_err(|_| refuse())?;
            let ms = u64::try_from(span.0.as_millis()).ok().filter(|ms| (1000..=CENTURY_MS).contains(ms));
            ms.ok_or_else(refuse)
        };
        let slot_ms = match what {
            "all" => 0,
            "hourly" => HOUR_MS,
            "daily" => DAY_MS,
            "weekly" => 7 * DAY_MS,
            other => ms(other.strip_prefix("every ").ok_or_else(refuse)?.trim())?,
        };
        let for_ms = span.map(ms).transpose()?;
        if for_ms.is_some_and(|for_ms| for_ms < slot_ms) {
            let slot = Why::Slot { slot_ms, no: 0 }.to_string();
            return Err(PolicyError::Short(text.chars().take(80).collect(), slot));
        }
        Ok(Self { slot_ms, for_ms })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => write!(f, "all"),
            Self::Newest => write!(f, "newest"),
            Self::Slot { slot_ms: HOUR_MS, .. } => write!(f, "hourly"),
            Self::Slot { slot_ms: DAY_MS, .. } => write!(f, "daily"),
            Self::Slot { slot_ms, .. } if *slot_ms == 7 * DAY_MS => write!(f, "weekly"),
            Self::Slot { slot_ms, .. } if slot_ms % 60_000 == 0 => write!(f, "every {}m", slot_ms / 60_000),
            Self::Slot { slot_ms, .. } => write!(f, "every {}s", slot_ms / 1000),
        }
    }
}

pub const HOUR_MS: u64 = 3_600_000;
pub const DAY_MS: u64 = 24 * HOUR_MS;
const CENTURY_MS: u64 = 36_525 * DAY_MS;
const RULES_MAX: usize = 16;
/// What lies between two points counts no more than this: longer, and the VM was not protected, or a clock jumped.
const GAP_MAX_MS: u64 = 600_000;
/// And no less than this, so that a clock that stands still does not keep everything.
const GAP_MIN_MS: u64 = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(rules: &[&str]) -> Policy {
        Policy::parse(rules).unwrap()
    }

    fn history(times_ms: &[u64]) -> Vec<Stamp> {
        let stamp =
            |(at, ms): (usize, &u64)| Stamp { seq: Seq(at as u64 + 1), cut_at: UnixMs(*ms), whole: true };
        times_ms.iter().enumerate().map(stamp).collect()
    }

    #[test]
    fn rules_are_read_and_what_is_no_rule_is_refused_with_an_example() {
        assert_eq!(policy(&["all for 1h", "hourly for 24h", "daily for 30d"]), Policy::default());
        assert_eq!(policy(&["every 60m for 1d"]), policy(&["hourly for 24h"]));
        assert_eq!(policy(&["all"]).0, vec![Rule { slot_ms: 0, for_ms: None }]);
        for bad in
            ["", "some", "hourly for", "hourly for ever", "every for 1h", "all for 1ms", "all for 9999999d"]
        {
            let error = Policy::parse(&[bad]).unwrap_err().to_string();
            assert!(error.contains("hourly for 24h"), "{bad}: {error}");
        }
        let short = Policy::parse(&["daily for 3h"]).unwrap_err().to_string();
        assert!(short.contains("each daily"), "{short}");
        assert_eq!(Policy::parse::<&str>(&[]), Err(PolicyError::Rules));
    }

    #[test]
    fn a_day_of_points_is_thinned_to_the_last_hour_and_one_an_hour() {
        let times: Vec<u64> = (0..26 * 360).map(|at| 1_700_000_000_000 + at * 10_000).collect();
        let wanted = Policy::default().wanted(&history(&times));
        let count = |why: fn(&Why) -> bool| wanted.values().filter(|held| why(held)).count();
        assert!((359..=361).contains(&count(|why| matches!(why, Why::All))));
        // Of the 24 hourly ones those of midnight count as daily.
        let slots = count(|why| matches!(why, Why::Slot { .. }));
        assert!((24..=26).contains(&slots), "{slots}");
    }

    /// Goal: a clock that jumps, far ahead or far back, costs next to nothing.
    #[test]
    fn a_clock_that_jumps_does_not_age_the_points_before_it() {
        let start = 1_700_000_000_000;
        for jump in [10 * 365 * DAY_MS as i64, -(20 * 365 * DAY_MS as i64)] {
            let before: Vec<u64> = (0..600).map(|at| start + at * 1000).collect();
            let after = (600..700).map(|at| (start + at * 1000).checked_add_signed(jump).unwrap());
            let back = (700..800).map(|at| start + at * 1000);
            let times: Vec<u64> = before.iter().copied().chain(after).collect();
            let all: Vec<u64> = times.iter().copied().chain(back).collect();
            for times in [times, all] {
                assert_eq!(Policy::default().wanted(&history(&times)).len(), times.len(), "jump {jump}");
            }
        }
    }

    #[test]
    fn a_damaged_point_gives_its_slot_to_a_whole_one() {
        let mut points = history(&[0, 10_000, 20_000, HOUR_MS, HOUR_MS + 1000]);
        points[0].whole = false;
        let wanted = policy(&["hourly for 2h"]).wanted(&points);
        assert_eq!(wanted.keys().copied().collect::<Vec<_>>(), [Seq(2), Seq(4), Seq(5)]);
        points[1].whole = false;
        points[2].whole = false;
        assert!(policy(&["hourly for 2h"]).wanted(&points).contains_key(&Seq(1)), "better than none");
    }

    /// Times that mostly go on, with outages and clocks that jump, ahead and as far back as `back`.
    fn times(back: i64) -> impl Strategy<Value = Vec<u64>> {
        let step = prop_oneof![
            8 => 200i64..120_000,
            1 => -(7_200_000.min(back))..=0,
            1 => 600_000i64..40_000_000,
            1 => -back..90 * DAY_MS as i64,
        ];
        prop::collection::vec(step, 1..160).prop_map(|steps| {
            let mut at = 1_700_000_000_000u64;
            steps
                .into_iter()
                .map(|step| {
                    at = at.saturating_add_signed(step);
                    at
                })
                .collect()
        })
    }

    proptest! {
        /// Clocks here jump ahead only: one that goes back into a slot that was given up begins that slot anew.
        /// Method: points come one at a time, and after each some passes prune; all points that ever were, judged at once,
        /// must never want one that is gone. Each slot that counts has its point.
        #[test]
        fn a_later_pass_never_wants_what_an_earlier_one_gave_up(times in times(0), skip in 1usize..5) {
            let policy = policy(&["all for 20m", "every 30m for 3h", "daily for 4d"]);
            let all = history(&times);
            let mut held: Vec<Stamp> = Vec::new();
            for (at, point) in all.iter().enumerate() {
                held.push(*point);
                if at % skip == 0 {
                    let wanted = policy.wanted(&held);
                    held.retain(|point| wanted.contains_key(&point.seq));
                }
                prop_assert_eq!(held.last(), Some(point));
                for seq in policy.wanted(&all[..=at]).keys() {
                    prop_assert!(held.iter().any(|point| point.seq == *seq), "{} is missed at {}", seq, at + 1);
                }
            }
        }

        #[test]
        fn no_history_keeps_more_than_its_rules_have_room_for(times in times(90 * DAY_MS as i64)) {
            let wanted = policy(&["every 30m for 3h", "daily for 4d"]).wanted(&history(&times));
            prop_assert!((1..=6 + 4 + 1).contains(&wanted.len()));
        }
    }
}
