//! Goal: a guest that the agent left paused is resumed, whatever became of the agent. Method: the watchdog's loop in a
//! thread, with a guest that is a flag.

use super::*;
use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

#[derive(Default)]
struct FakeGuest {
    paused: AtomicBool,
    /// Tries that fail before one works, as while libvirtd restarts.
    failures: AtomicUsize,
}

impl Release for FakeGuest {
    fn release(&self, _: VmId, _: Option<&str>) -> Result<Released, WatchdogError> {
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            return Err(WatchdogError::Unexpected);
        }
        Ok(if self.paused.swap(false, Ordering::SeqCst) { Released::Resumed } else { Released::NotPaused })
    }

    fn thaw(&self, _: VmId) -> Result<Released, WatchdogError> {
        Ok(Released::NotPaused)
    }

    fn put_back(&self, _: VmId, noted: &Noted) -> Result<bool, WatchdogError> {
        noted.forget().map(|()| true)
    }
}

struct Rig {
    guest: Arc<FakeGuest>,
    watchdog: Watchdog,
    servers: Arc<std::sync::Mutex<Vec<JoinHandle<()>>>>,
    markers: Markers,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let markers = Markers::new(dir.path().join("paused"));
        let guest = Arc::new(FakeGuest::default());
        let servers: Arc<std::sync::Mutex<Vec<JoinHandle<()>>>> = Arc::default();
        let parts = (guest.clone(), markers.clone(), servers.clone());
        let watchdog = Watchdog::start_with(move || {
            let (ours, theirs) = client::pair()?;
            let (guest, markers, servers) = parts.clone();
            let server = std::thread::spawn(move || server::serve_at(PACE, theirs, guest, markers).unwrap());
            servers.lock().unwrap().push(server);
            Ok(ours)
        });
        Self { guest, watchdog: watchdog.unwrap(), servers, markers, _dir: dir }
    }

    fn pause(&self, limit: Duration) {
        self.markers.set(VM).unwrap();
        self.watchdog.arm(VM, limit).unwrap();
        self.guest.paused.store(true, Ordering::SeqCst);
    }

    fn is_resumed_soon(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.guest.paused.load(Ordering::SeqCst) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }
}

const VM: VmId = VmId::from_bytes([7; 16]);
const OTHER: VmId = VmId::from_bytes([8; 16]);
/// Lingers long enough for a test to act in between, and is over soon.
const PACE: letting_go::Pace =
    letting_go::Pace { again: Duration::from_millis(20), linger: Duration::from_millis(400) };
const LONG: Duration = Duration::from_secs(600);

#[test]
fn a_guest_is_resumed_when_the_agent_dies_even_if_libvirt_fails_at_first() {
    let rig = Rig::new();
    rig.guest.failures.store(2, Ordering::SeqCst);
    rig.pause(LONG);
    let Rig { guest, watchdog, servers, markers, _dir } = rig;
    drop(watchdog);
    servers.lock().unwrap().drain(..).for_each(|server| server.join().unwrap());
    assert!(!guest.paused.load(Ordering::SeqCst));
    assert_eq!(markers.list().unwrap(), []);
}

#[test]
fn a_guest_is_resumed_when_the_deadline_passes_and_the_agent_learns_of_it() {
    let rig = Rig::new();
    rig.pause(Duration::from_millis(20));
    assert!(rig.is_resumed_soon());
    // The agent thaws and stops the guest after all, as it had set out to: that is undone too.
    rig.guest.paused.store(true, Ordering::SeqCst);
    assert!(rig.is_resumed_soon());
    assert!(rig.watchdog.disarm(VM).unwrap().fired);
    // Once the release has ended, the next pause is possible again.
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(error) = rig.watchdog.arm(VM, LONG) {
        assert!(
            matches!(error, WatchdogError::StillReleasing { .. }) && Instant::now() < deadline,
            "{error}"
        );
        std::thread::yield_now();
    }
    assert!(!rig.watchdog.disarm(VM).unwrap().fired);
}

#[test]
fn a_pause_that_ends_in_time_is_left_alone() {
    let rig = Rig::new();
    rig.pause(LONG);
    assert!(!rig.watchdog.disarm(VM).unwrap().fired);
    assert!(rig.guest.paused.load(Ordering::SeqCst), "it was resumed without need");
    // What was never announced is not vouched for.
    assert!(rig.watchdog.disarm(VM).unwrap().fired);
}

#[test]
fn a_dead_watchdog_is_replaced_before_the_next_pause() {
    let rig = Rig::new();
    rig.watchdog.break_link();
    rig.pause(LONG);
    assert_eq!(rig.servers.lock().unwrap().len(), 2);
    assert!(!rig.watchdog.disarm(VM).unwrap().fired);
}

/// Goal: a `stop` that the agent had sent before it died, and that libvirt carries out later, is undone. Method: the guest
/// is paused once more after it was let go. A pause that the next agent has begun meanwhile is that agent's.
#[test]
fn a_stop_that_arrives_after_the_agents_death_is_undone_and_the_next_agents_pause_is_not() {
    let rig = Rig::new();
    rig.pause(LONG);
    let Rig { guest, watchdog, servers, markers, _dir } = rig;
    drop(watchdog);
    let deadline = Instant::now() + Duration::from_secs(10);
    let until_running = |guest: &FakeGuest| {
        while guest.paused.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "it stays paused");
            std::thread::yield_now();
        }
    };
    until_running(&guest);
    while markers.read(VM).is_some() {
        assert!(Instant::now() < deadline, "the marker stays");
    }
    guest.paused.store(true, Ordering::SeqCst);
    until_running(&guest);
    markers.set(VM).unwrap();
    let next = markers.read(VM);
    guest.paused.store(true, Ordering::SeqCst);
    servers.lock().unwrap().drain(..).for_each(|server| server.join().unwrap());
    assert!(guest.paused.load(Ordering::SeqCst), "the next agent's pause was ended");
    assert_eq!(markers.read(VM), next);
}

/// Goal: one guest that can't be let go keeps no other waiting. Method: the agent dies with two guests paused; for the
/// first libvirt does not answer.
#[test]
fn guests_are_let_go_side_by_side() {
    struct OneHangs(std::sync::mpsc::Sender<VmId>, std::sync::Mutex<std::sync::mpsc::Receiver<()>>);
    impl Release for OneHangs {
        fn thaw(&self, _: VmId) -> Result<Released, WatchdogError> {
            Ok(Released::NotPaused)
        }

        fn put_back(&self, _: VmId, noted: &Noted) -> Result<bool, WatchdogError> {
            noted.forget().map(|()| true)
        }

        fn release(&self, vm: VmId, _: Option<&str>) -> Result<Released, WatchdogError> {
            if vm == VM {
                let _ = self.1.lock().unwrap().recv();
            }
            let _ = self.0.send(vm);
            Ok(Released::Resumed)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (released, told) = std::sync::mpsc::channel();
    let (go_on, held) = std::sync::mpsc::channel();
    let releaser = Arc::new(OneHangs(released, std::sync::Mutex::new(held)));
    let markers = Markers::new(dir.path().into());
    let server: Arc<std::sync::Mutex<Option<JoinHandle<()>>>> = Arc::default();
    let slot = server.clone();
    let watchdog = Watchdog::start_with(move || {
        let (ours, theirs) = client::pair()?;
        let (releaser, markers) = (releaser.clone(), markers.clone());
        let run = move || server::serve_at(PACE, theirs, releaser, markers).unwrap();
        *slot.lock().unwrap() = Some(std::thread::spawn(run));
        Ok(ours)
    });
    let watchdog = watchdog.unwrap();
    watchdog.arm(VM, LONG).unwrap();
    watchdog.arm(OTHER, LONG).unwrap();
    drop(watchdog);
    assert_eq!(told.recv_timeout(Duration::from_secs(10)).unwrap(), OTHER);
    drop(go_on);
    server.lock().unwrap().take().unwrap().join().unwrap();
}
