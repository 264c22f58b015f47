//! The operator's bandwidth cap: a token bucket over all the streams of the link.
//! Promises: over any second no more than the limit plus one burst leaves; nobody is starved (first come, first served).

use lifeboat::units::BitRate;
use std::time::Duration;
use tokio::{sync::Mutex, time::Instant};

/// How far ahead of the steady rate a burst may run.
const BURST: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub struct Limiter {
    /// Bytes a second; `None` is no limit.
    rate: Option<f64>,
    /// When the bytes sent so far will have been paid for.
    paid_until: Mutex<Instant>,
}

impl Limiter {
    pub fn new(limit: Option<BitRate>) -> Self {
        let rate = limit.map(|limit| limit.bytes_per_second().max(1) as f64);
        Self { rate, paid_until: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may be sent.
    pub async fn pay(&self, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let wait_until = {
            let mut paid_until = self.paid_until.lock().await;
            let start = (*paid_until).max(Instant::now());
            *paid_until = start + Duration::from_secs_f64(bytes as f64 / rate);
            start
        };
        let now = Instant::now();
        if wait_until > now + BURST {
            tokio::time::sleep_until(wait_until - BURST).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ten_seconds_worth_of_bytes_takes_ten_seconds() {
        let limiter = Limiter::new(Some(BitRate(8_000_000)));
        let start = Instant::now();
        for _ in 0..100 {
            limiter.pay(100_000).await;
        }
        let took = start.elapsed();
        assert!(took > Duration::from_millis(9_700) && took < Duration::from_millis(10_100), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nothing_waits() {
        let start = Instant::now();
        Limiter::new(None).pay(usize::MAX).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
