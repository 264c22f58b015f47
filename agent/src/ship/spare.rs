//! How much of the host's CPU is idle, from the kernel's counters. Called by the protection actor before it compresses
//! harder.

use std::fs;

/// Remembers the counters of the last look.
#[derive(Debug, Default)]
pub struct SpareCpu {
    last: Option<Counters>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    idle: u64,
    total: u64,
}

impl SpareCpu {
    /// Share of all CPUs' time that was idle since the last look; none at the first, or where the kernel does not tell.
    pub fn look(&mut self) -> f64 {
        let now = fs::read_to_string("/proc/stat").ok().and_then(|text| read(&text));
        let share = match (self.last, now) {
            (Some(last), Some(now)) => share(last, now),
            _ => 0.0,
        };
        self.last = now;
        share
    }
}

fn share(last: Counters, now: Counters) -> f64 {
    match now.total.saturating_sub(last.total) {
        0 => 0.0,
        total => (now.idle.saturating_sub(last.idle) as f64 / total as f64).clamp(0.0, 1.0),
    }
}

/// `cpu  user nice system idle iowait irq softirq steal guest guest_nice`; guests' time is in the first two already.
fn read(text: &str) -> Option<Counters> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().take(8).map_while(|word| word.parse().ok()).collect();
    let idle = fields.get(3)?.saturating_add(*fields.get(4)?);
    Some(Counters { idle, total: fields.iter().fold(0, |sum: u64, field| sum.saturating_add(*field)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_is_what_was_idle_or_waited_for_disks_since_the_last_look() {
        let before = read("cpu  100 0 100 700 100 0 0 0 90 0\ncpu0 1 2 3").unwrap();
        let now = read("cpu  150 0 100 720 130 0 0 0 95 0\n").unwrap();
        assert_eq!(share(before, now), 0.5);
        assert_eq!(share(now, now), 0.0);
        assert_eq!(share(now, before), 0.0, "counters that went back tell nothing");
        assert!(read("").is_none() && read("intr 5").is_none() && read("cpu  1 2").is_none());
        assert!(read(&fs::read_to_string("/proc/stat").unwrap()).is_some());
    }
}
