//! How each engine has done on a guest: who must rest after failing, and for how long.
//! Promises: an engine that fails again and again is left alone for longer and longer, up to a bound, and is tried
//! again by itself. Pure but for the time it is told. Called by `choose`.

use super::Kind;
use std::time::{Duration, Instant};

/// Failures in a row after which an engine rests. One that has rested has only one.
const TRIES: u32 = 3;
const REST: Duration = Duration::from_secs(60);
pub const REST_MAX: Duration = Duration::from_secs(30 * 60);
/// Points in a row after which an engine's past is forgotten.
const REDEEMED: u32 = 20;

#[derive(Default)]
pub struct Records(Vec<(Kind, Record)>);

#[derive(Default)]
struct Record {
    failures: u32,
    successes: u32,
    /// How often it has been made to rest.
    rests: u32,
    until: Option<Instant>,
    why: String,
}

impl Records {
    /// Notes a failure; `true` if the engine rests from now on.
    pub fn failed(&mut self, kind: Kind, now: Instant, why: String) -> bool {
        let record = self.of(kind);
        record.failures += 1;
        record.successes = 0;
        record.why = why;
        let bound = if record.rests == 0 { TRIES } else { 1 };
        if record.failures < bound {
            return false;
        }
        record.failures = 0;
        let rest = REST.saturating_mul(1 << record.rests.min(8)).min(REST_MAX);
        record.rests = record.rests.saturating_add(1);
        record.until = Some(now + rest);
        true
    }

    pub fn succeeded(&mut self, kind: Kind) {
        let record = self.of(kind);
        record.failures = 0;
        record.successes += 1;
        if record.successes >= REDEEMED {
            *record = Record::default();
        }
    }

    /// Why the engine must not be used yet.
    pub fn resting(&self, kind: Kind, now: Instant) -> Option<String> {
        let (_, record) = self.0.iter().find(|(other, _)| *other == kind)?;
        let left = record.until?.checked_duration_since(now).filter(|left| !left.is_zero())?;
        let minutes = left.as_secs().div_ceil(60);
        Some(format!("it failed and is tried again in {minutes} min at the latest: {}", record.why))
    }

    /// When the next one has rested.
    pub fn next_rested(&self, now: Instant) -> Option<Instant> {
        self.0.iter().filter_map(|(_, record)| record.until).filter(|until| *until > now).min()
    }

    fn of(&mut self, kind: Kind) -> &mut Record {
        let at = match self.0.iter().position(|(other, _)| *other == kind) {
            Some(at) => at,
            None => {
                self.0.push((kind, Record::default()));
                self.0.len() - 1
            }
        };
        &mut self.0[at].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_keeps_failing_rests_longer_each_time_and_is_always_tried_again() {
        let (mut records, mut now) = (Records::default(), Instant::now());
        let kind = Kind::StopAndRead;
        let fail = |records: &mut Records, now| records.failed(kind, now, "no".into());
        assert!(!fail(&mut records, now) && !fail(&mut records, now));
        records.succeeded(kind);
        assert!(!fail(&mut records, now) && !fail(&mut records, now), "only failures in a row count");
        let mut rests = Vec::new();
        for _ in 0..12 {
            assert!(fail(&mut records, now), "after the first rest one failure is enough");
            assert!(records.resting(kind, now).is_some_and(|why| why.ends_with(": no")));
            let until = records.next_rested(now).unwrap();
            rests.push(until - now);
            now = until;
            assert!(records.resting(kind, now).is_none() && records.next_rested(now).is_none());
        }
        assert_eq!((rests[0], rests[1]), (REST, REST * 2));
        assert_eq!((rests.is_sorted(), rests.last()), (true, Some(&REST_MAX)));
        (0..REDEEMED).for_each(|_| records.succeeded(kind));
        assert!(!fail(&mut records, now), "its past is forgotten");
    }
}
