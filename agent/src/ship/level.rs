//! How hard to compress: harder while the link is what everything waits for and the host has CPU to spare, less while
//! the compressor is, not at all on a link that is faster than it if the operator allows that. Pure: shares of time in,
//! a zstd level out.
//! Promises: stays within the operator's range; one odd second changes nothing; a level that was left because it did not
//! pay is not tried again soon. Called by the protection actor, once a second at most.

use lifeboat::units::Compression;

/// What a stretch of time was spent on, as shares of it, and how much of the host's CPU was idle in it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observed {
    pub rest: f64,
    pub pack: f64,
    pub link: f64,
    pub idle_cpu: f64,
}

#[derive(Debug)]
pub struct LevelControl {
    range: Compression,
    level: i32,
    /// Observations in a row that spoke for harder (positive) or less (negative).
    votes: i32,
    /// Votes that it takes to go up; grows whenever going up was a mistake, and shrinks slowly.
    caution: i32,
    last_was_up: bool,
}

impl LevelControl {
    pub fn new(range: Compression) -> Self {
        let level = START.clamp(range.least, range.most);
        Self { range, level, votes: 0, caution: VOTES, last_was_up: false }
    }

    pub fn level(&self) -> i32 {
        self.level
    }

    /// Whether there is anything to choose.
    pub fn adapts(&self) -> bool {
        self.range.least < self.range.most
    }

    pub fn observe(&mut self, seen: Observed) {
        let speaks_for = opinion(seen, self.level);
        self.votes = match speaks_for {
            0 => 0,
            way if way * self.votes < 0 => way,
            way => self.votes + way,
        };
        if self.votes >= self.caution {
            self.step(1);
        } else if self.votes <= -VOTES {
            self.step(-1);
        }
    }

    fn step(&mut self, way: i32) {
        self.votes = 0;
        let level = (self.level + way).clamp(self.range.least, self.range.most);
        if level == self.level {
            return;
        }
        if way < 0 && self.last_was_up {
            self.caution = (self.caution * 2).min(CAUTION_MAX);
        } else if way > 0 && self.last_was_up {
            self.caution = (self.caution - 1).max(VOTES);
        }
        (self.level, self.last_was_up) = (level, way > 0);
    }
}

/// What one observation speaks for: harder, less, or leaving it.
fn opinion(seen: Observed, level: i32) -> i32 {
    let waits_for_link = seen.link >= 0.3 && seen.link >= 2.0 * seen.pack;
    let waits_for_cpu = seen.pack >= 0.3 && seen.pack >= 2.0 * seen.link;
    // Guests come first: what they need of the CPU is not taken for a better ratio.
    let starved = seen.idle_cpu < IDLE_LEAST;
    let at_ease = seen.rest >= 0.6;
    let wants_up = waits_for_link && (seen.idle_cpu >= IDLE_TO_RAISE || level < START);
    let wants_down = waits_for_cpu || ((starved || at_ease) && level > START);
    match (wants_up, wants_down) {
        (true, false) => 1,
        (false, true) => -1,
        _ if at_ease && level < START => 1,
        _ => 0,
    }
}

/// Where it begins, and what it comes back to when there is no hurry.
const START: i32 = 1;
/// Observations in a row that it takes.
const VOTES: i32 = 3;
const CAUTION_MAX: i32 = 60;
const IDLE_TO_RAISE: f64 = 0.25;
const IDLE_LEAST: f64 = 0.05;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ANY: Compression = Compression { least: 0, most: 9 };
    const LINK: Observed = Observed { rest: 0.0, pack: 0.1, link: 0.8, idle_cpu: 0.5 };
    const CPU: Observed = Observed { rest: 0.0, pack: 0.8, link: 0.1, idle_cpu: 0.0 };
    const EASE: Observed = Observed { rest: 0.9, pack: 0.02, link: 0.05, idle_cpu: 0.8 };

    fn after(control: &mut LevelControl, seen: Observed, times: u32) -> i32 {
        (0..times).for_each(|_| control.observe(seen));
        control.level()
    }

    #[test]
    fn a_narrow_link_and_idle_cpus_raise_the_level_step_by_step_to_its_bound() {
        let mut control = LevelControl::new(ANY);
        assert_eq!(after(&mut control, LINK, 2), 1);
        assert_eq!(after(&mut control, LINK, 1), 2);
        assert_eq!(after(&mut control, LINK, 100), 9);
        let mut control = LevelControl::new(Compression { least: 1, most: 4 });
        assert_eq!(after(&mut control, LINK, 100), 4);
    }

    #[test]
    fn a_link_that_outruns_the_compressor_gets_pages_as_they_are() {
        let mut control = LevelControl::new(ANY);
        assert_eq!(after(&mut control, CPU, 3), 0);
        assert_eq!(after(&mut control, CPU, 100), 0);
        // And compressed ones again once it is the link that is waited for, busy as the host may be.
        assert_eq!(after(&mut control, Observed { idle_cpu: 0.0, ..LINK }, 10), 1);
        let mut control = LevelControl::new(Compression::AUTO);
        assert_eq!(after(&mut control, CPU, 100), 1, "not unless the operator allows it");
    }

    #[test]
    fn guests_that_need_the_cpu_get_it_back() {
        let mut control = LevelControl::new(ANY);
        let busy_host = Observed { idle_cpu: 0.1, ..LINK };
        assert_eq!(after(&mut control, busy_host, 50), 1, "no idle CPU, no higher level");
        after(&mut control, LINK, 100);
        assert_eq!(after(&mut control, Observed { idle_cpu: 0.01, link: 0.2, ..LINK }, 100), 1);
    }

    #[test]
    fn in_no_hurry_it_comes_back_to_where_it_began() {
        for hurry in [LINK, CPU] {
            let mut control = LevelControl::new(ANY);
            after(&mut control, hurry, 100);
            assert_eq!(after(&mut control, EASE, 200), START);
        }
    }

    #[test]
    fn one_odd_second_changes_nothing() {
        let mut control = LevelControl::new(ANY);
        for _ in 0..100 {
            assert_eq!(after(&mut control, LINK, 2), 1);
            assert_eq!(after(&mut control, EASE, 1), 1);
        }
    }

    /// Each raise makes the CPU the bottleneck, each lowering the link: the worst case for swinging.
    #[test]
    fn where_no_level_is_right_it_swings_ever_more_rarely() {
        let mut control = LevelControl::new(ANY);
        let mut changes = Vec::new();
        for second in 0..4_000 {
            let before = control.level();
            control.observe(if before >= 2 { CPU } else { LINK });
            if control.level() != before {
                changes.push(second);
            }
        }
        let late = changes.iter().filter(|second| **second >= 2_000).count();
        assert!(late <= 2 * 2_000 / CAUTION_MAX as usize, "{changes:?}");
    }

    proptest! {
        #[test]
        fn whatever_happens_the_level_stays_in_its_range_and_moves_by_one(
            least in 0_i32..10, more in 0_i32..10,
            seen in proptest::collection::vec((0.0..1.0, 0.0..1.0, 0.0..1.0, 0.0..1.0), 0..200),
        ) {
            let range = Compression { least, most: least + more };
            let mut control = LevelControl::new(range);
            for (rest, pack, link, idle_cpu) in seen {
                let before = control.level();
                control.observe(Observed { rest, pack, link, idle_cpu });
                prop_assert!((range.least..=range.most).contains(&control.level()));
                prop_assert!((control.level() - before).abs() <= 1);
            }
        }
    }
}
