//! What a site says about peers that it turns away. Promises: however many come, one line in ten seconds.

use std::{fmt::Display, net::SocketAddr, sync::Mutex, time::Duration};
use tokio::time::Instant;

/// The log of refusals of one endpoint.
#[derive(Debug, Default)]
pub struct Refusals {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_line: Option<Instant>,
    unsaid: u64,
    total: u64,
}

impl Refusals {
    /// Counts a refusal, and logs it unless another was logged just before.
    pub fn note(&self, from: SocketAddr, why: &dyn Display) {
        if let Some(others) = self.count() {
            tracing::warn!(%from, others_unsaid = others, "connection refused: {why}");
        }
    }

    /// Refusals so far.
    pub fn total(&self) -> u64 {
        self.lock().total
    }

    /// Counts one; if it is time for a line, how many went unsaid since the last.
    fn count(&self) -> Option<u64> {
        let mut state = self.lock();
        state.total += 1;
        let now = Instant::now();
        if state.last_line.is_some_and(|last| now.duration_since(last) < QUIET) {
            state.unsaid += 1;
            return None;
        }
        state.last_line = Some(now);
        Some(std::mem::take(&mut state.unsaid))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Counters stay meaningful whatever happened to another holder of the lock.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

const QUIET: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_refusals_is_one_line_in_ten_seconds_and_none_goes_uncounted() {
        let refusals = Refusals::default();
        let said: Vec<_> = (0..1000).filter_map(|_| refusals.count()).collect();
        assert_eq!(said, [0]);
        tokio::time::advance(QUIET).await;
        assert_eq!(refusals.count(), Some(999));
        assert_eq!(refusals.total(), 1001);
    }
}
