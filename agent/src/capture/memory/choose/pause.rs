//! How long stop-and-read would keep a guest standing: its memory, at the speed at which this host was seen to read.
//! Promises: one slow reading on a busy host does not decide. Called by `choose`.

use std::time::Duration;

/// Longer than this, and a snapshot's short pause is worth its price.
pub const BEARABLE: Duration = Duration::from_millis(100);
/// Bytes a second while nothing was measured yet: the lower end of what hosts were seen to do.
const UNMEASURED: f64 = 5e9;
/// How much the newest reading counts.
const WEIGHT: f64 = 0.25;

#[derive(Default)]
pub struct Pause {
    /// Bytes a second.
    speed: Option<f64>,
}

impl Pause {
    pub fn estimate(&self, memory_bytes: u64) -> Duration {
        Duration::from_secs_f64(memory_bytes as f64 / self.speed.unwrap_or(UNMEASURED))
    }

    /// Notes a reading; `true` if the estimate went past what is bearable, or came back.
    pub fn measured(&mut self, memory_bytes: u64, took: Duration) -> bool {
        let before = self.estimate(memory_bytes) > BEARABLE;
        let now = memory_bytes as f64 / took.as_secs_f64().max(1e-6);
        let speed = self.speed.map_or(now, |speed| speed + WEIGHT * (now - speed));
        self.speed = Some(speed.max(1.0));
        (self.estimate(memory_bytes) > BEARABLE) != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_what_was_measured_and_not_one_hiccup() {
        let (mut pause, gib) = (Pause::default(), 1 << 30);
        assert!(pause.estimate(gib) > BEARABLE && pause.estimate(gib / 4) < BEARABLE);
        assert!(pause.measured(gib, Duration::from_millis(40)), "it came back");
        assert!(!pause.measured(gib, Duration::from_millis(400)), "one hiccup");
        let crossed = (0..20).filter(|_| pause.measured(gib, Duration::from_millis(400))).count();
        assert!(crossed == 1 && pause.estimate(gib) > BEARABLE);
    }
}
