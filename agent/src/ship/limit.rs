//! The operator's bandwidth limits: of the link, by time of day, and of single VMs. Token buckets.
//! Promises: over any second no more than the limit in force plus one burst and one frame leaves; what was sent before a
//! limit changed counts against the new one. Asked by `turns`, which decides whose frame is next.

use lifeboat::{
    calendar::{self, Window, Zone},
    clock::Clock,
    id::VmId,
    units::BitRate,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How far ahead of the steady rate a burst may run.
const BURST: Duration = Duration::from_millis(50);
/// Whoever waits for a limit looks again so soon: it may have been changed, or its window be over.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The limits, as configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Of the link, outside of all windows.
    pub link: Option<BitRate>,
    pub windows: Vec<Window>,
}

/// Shared by the link and all VMs.
pub struct Limits {
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
}

struct Inner {
    plan: Plan,
    zone: Zone,
    link: Bucket,
    vms: BTreeMap<VmId, Vm>,
}

struct Vm {
    /// As the configuration calls it.
    name: String,
    limit: Option<BitRate>,
    bucket: Bucket,
}

impl Limits {
    pub fn new(plan: Plan, clock: Arc<dyn Clock>) -> Self {
        let link = Bucket::new(Instant::now());
        let inner = Inner { plan, zone: Zone::local(), link, vms: BTreeMap::new() };
        Self { clock, inner: Mutex::new(inner) }
    }

    /// From now on these hold: of the link, and of each VM by its name.
    pub fn replace(&self, plan: Plan, of_vm: impl Fn(&str) -> Option<BitRate>) {
        let mut inner = self.inner();
        (inner.plan, inner.zone) = (plan, Zone::local());
        inner.vms.values_mut().for_each(|vm| vm.limit = of_vm(&vm.name));
    }

    /// From now on this holds for a VM.
    pub fn set_vm(&self, vm: VmId, name: &str, limit: Option<BitRate>) {
        let make = || Vm { name: name.to_owned(), limit, bucket: Bucket::new(Instant::now()) };
        self.inner().vms.entry(vm).or_insert_with(make).limit = limit;
    }

    /// The limit of the link at this moment.
    pub fn of_link(&self) -> Option<BitRate> {
        self.inner().rate(&*self.clock)
    }

    pub fn of_vm(&self, vm: VmId) -> Option<BitRate> {
        self.inner().vms.get(&vm).and_then(|vm| vm.limit)
    }

    /// When to ask again before anything may be sent; `None` is at once.
    pub fn link_wait(&self, now: Instant) -> Option<Instant> {
        let mut inner = self.inner();
        let rate = inner.rate(&*self.clock);
        inner.link.wait(rate, now)
    }

    /// The same for one VM.
    pub fn vm_wait(&self, vm: VmId, now: Instant) -> Option<Instant> {
        let mut inner = self.inner();
        let vm = inner.vms.get_mut(&vm)?;
        vm.bucket.wait(vm.limit, now)
    }

    /// So much is being sent for this VM.
    pub fn pay(&self, vm: VmId, bytes: usize) {
        let mut inner = self.inner();
        inner.link.owed += bytes as f64;
        if let Some(vm) = inner.vms.get_mut(&vm) {
            vm.bucket.owed += bytes as f64;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn rate(&self, clock: &dyn Clock) -> Option<BitRate> {
        calendar::limit_at(&self.plan.windows, self.plan.link, clock.now(), &self.zone)
    }
}

/// Bytes that were sent and not yet paid for by time. Debt in bytes, so that it outlives a change of the rate.
#[derive(Debug)]
struct Bucket {
    owed: f64,
    seen: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { owed: 0.0, seen: now }
    }

    fn wait(&mut self, rate: Option<BitRate>, now: Instant) -> Option<Instant> {
        let passed = now.saturating_duration_since(self.seen);
        self.seen = now;
        let Some(rate) = rate.map(|rate| rate.bytes_per_second().max(1) as f64) else {
            self.owed = 0.0;
            return None;
        };
        self.owed = (self.owed - passed.as_secs_f64() * rate).max(0.0);
        let over = self.owed - BURST.as_secs_f64() * rate;
        let wait = Duration::try_from_secs_f64(over / rate).unwrap_or(Duration::ZERO);
        // Below a timer's grain there is nothing to wait for.
        (wait >= Duration::from_millis(1)).then(|| now + wait.min(LOOK_AGAIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat::{clock::ManualClock, units::UnixMs};

    const VM: VmId = VmId::from_bytes([1; 16]);

    fn limits(link: Option<u64>) -> (Limits, ManualClock) {
        // 2026-11-23 07:59:00 UTC, and no other clock is asked.
        let clock = ManualClock::at(UnixMs(1_795_420_740_000));
        let plan = Plan { link: link.map(BitRate), windows: Vec::new() };
        (Limits::new(plan, Arc::new(clock.clone())), clock)
    }

    async fn send(limits: &Limits, bytes: usize) {
        while let Some(at) =
            [limits.link_wait(Instant::now()), limits.vm_wait(VM, Instant::now())].iter().flatten().max()
        {
            tokio::time::sleep_until(*at).await;
        }
        limits.pay(VM, bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn ten_seconds_worth_of_bytes_takes_ten_seconds() {
        for (link, vm) in
            [(Some(8_000_000), None), (None, Some(8_000_000)), (Some(16_000_000), Some(8_000_000))]
        {
            let (limits, _) = limits(link);
            limits.set_vm(VM, "web", vm.map(BitRate));
            let start = Instant::now();
            for _ in 0..100 {
                send(&limits, 100_000).await;
            }
            let took = start.elapsed();
            assert!(took > Duration::from_millis(9_700) && took < Duration::from_millis(10_200), "{took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nothing_waits() {
        let start = Instant::now();
        let (limits, _) = limits(None);
        for _ in 0..100 {
            send(&limits, usize::MAX >> 8).await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_is_changed_holds_at_once_for_what_already_waits() {
        let (limits, _) = limits(Some(8_000));
        send(&limits, 1_000_000).await; // a thousand seconds' worth
        let start = Instant::now();
        let raise = async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            limits.replace(Plan { link: Some(BitRate(8_000_000)), windows: Vec::new() }, |_| None);
        };
        tokio::join!(send(&limits, 1), raise);
        let took = start.elapsed();
        assert!(took > Duration::from_secs(10) && took < Duration::from_secs(13), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_is_found_again_by_its_name_when_limits_are_replaced() {
        let (limits, _) = limits(None);
        limits.set_vm(VM, "web", None);
        limits.replace(Plan::default(), |name| (name == "web").then_some(BitRate(8_000)));
        assert_eq!(limits.of_vm(VM), Some(BitRate(8_000)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_opens_and_closes_by_the_clock() {
        let (limits, clock) = limits(Some(1_000_000));
        let always = Window::parse("00:00", "24:00", "daily", "8Mbit").unwrap();
        limits.replace(Plan { link: Some(BitRate(1_000_000)), windows: vec![always] }, |_| None);
        assert_eq!(limits.of_link(), Some(BitRate(8_000_000)));
        // Whatever the zone, one of two halves of the day holds and the other does not, twelve hours later the reverse.
        let half = Window::parse("00:00", "12:00", "daily", "8Mbit").unwrap();
        limits.replace(Plan { link: Some(BitRate(1_000_000)), windows: vec![half] }, |_| None);
        let first = limits.of_link();
        clock.advance(12 * 3_600_000);
        assert_ne!(limits.of_link(), first);
    }
}
