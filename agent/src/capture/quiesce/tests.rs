//! Goal: first do no harm. Method: a monitor that plays a guest and fails where it is told to.

use super::*;
use crate::watchdog::{Noted, Release, Released, serve};
use serde_json::Value;
use std::{os::fd::BorrowedFd, sync::Mutex};

#[derive(Default)]
struct Guest {
    status: Mutex<String>,
    /// Command that fails, and how often.
    fails: Mutex<Option<(&'static str, u32)>>,
    stops: Mutex<u32>,
}

impl Guest {
    fn new(status: &str) -> Arc<Self> {
        Arc::new(Self { status: Mutex::new(status.into()), ..Self::default() })
    }
    fn status(&self) -> String {
        self.status.lock().unwrap().clone()
    }
}

impl Monitor for Guest {
    fn execute_with_fds(&self, command: &str, _: Value, _: &[BorrowedFd<'_>]) -> Result<Value, MonitorError> {
        if let Some((name, times)) = &mut *self.fails.lock().unwrap()
            && *name == command
            && *times > 0
        {
            *times -= 1;
            return Err(MonitorError::Unreachable { command: command.into(), reason: "told to".into() });
        }
        match command {
            "query-status" => return Ok(json!({ "status": self.status() })),
            "stop" => {
                *self.stops.lock().unwrap() += 1;
                *self.status.lock().unwrap() = "paused".into();
            }
            "cont" => *self.status.lock().unwrap() = "running".into(),
            _ => {}
        }
        Ok(json!({}))
    }
}

impl Release for Guest {
    fn release(&self, _: VmId, _: Option<&str>) -> Result<Released, WatchdogError> {
        *self.status.lock().unwrap() = "running".into();
        Ok(Released::Resumed)
    }

    fn thaw(&self, _: VmId) -> Result<Released, WatchdogError> {
        Ok(Released::NotPaused)
    }

    fn put_back(&self, _: VmId, noted: &Noted) -> Result<bool, WatchdogError> {
        noted.forget().map(|()| true)
    }
}

const VM: VmId = VmId::from_bytes([3; 16]);

fn pauser(guest: &Arc<Guest>, limit: Duration) -> (Pauser, Markers, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let markers = Markers::new(dir.path().into());
    let (guest, kept) = (guest.clone(), markers.clone());
    let watchdog = Watchdog::start_with(move || {
        let (ours, theirs) =
            std::os::unix::net::UnixDatagram::pair().map(|pair| (pair.0.into(), pair.1.into())).unwrap();
        let (guest, markers) = (guest.clone(), kept.clone());
        std::thread::spawn(move || serve(theirs, guest, markers));
        Ok(ours)
    });
    (Pauser::new(markers.clone(), Arc::new(watchdog.unwrap()), limit, Box::new(drop)), markers, dir)
}

#[test]
fn a_running_guest_is_stopped_marked_and_runs_again() {
    let guest = Guest::new("running");
    let (pauser, markers, _dir) = pauser(&guest, Duration::from_secs(60));
    let paused = pauser.pause(VM, guest.clone()).unwrap();
    assert!(paused.was_running());
    assert_eq!((guest.status().as_str(), markers.list().unwrap()), ("paused", vec![VM]));
    paused.resume().unwrap();
    assert_eq!((guest.status().as_str(), markers.list().unwrap()), ("running", vec![]));
}

/// Goal: whoever found the guest standing in a pause of ours is looked for when it goes on, and for no operator's pause.
#[test]
fn who_met_a_pause_of_ours_is_looked_for_once_the_guest_goes_on() {
    let guest = Guest::new("running");
    let (mut pauser, _, _dir) = pauser(&guest, Duration::from_secs(60));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (noted, found) = (seen.clone(), guest.clone());
    pauser.when_over = Box::new(move |vm| noted.lock().unwrap().push((vm, found.status())));
    let looked = || std::mem::take(&mut *seen.lock().unwrap());
    let runs = || vec![(VM, "running".to_owned())];
    pauser.pause(VM, guest.clone()).unwrap().resume().unwrap();
    assert_eq!(looked(), runs(), "after a cut");
    drop(pauser.pause(VM, guest.clone()).unwrap());
    assert_eq!(looked(), runs(), "after a step failed");
    let paused = pauser.pause(VM, guest.clone()).unwrap();
    guest.execute("cont", json!({})).unwrap();
    paused.was_resumed().unwrap();
    assert_eq!(looked(), runs(), "QEMU let it go");
    guest.execute("stop", json!({})).unwrap();
    pauser.pause(VM, guest.clone()).unwrap().resume().unwrap();
    assert_eq!(looked(), [], "an operator's pause");
}

#[test]
fn a_guest_runs_again_when_a_step_fails() {
    let guest = Guest::new("running");
    let (pauser, markers, _dir) = pauser(&guest, Duration::from_secs(60));
    drop(pauser.pause(VM, guest.clone()).unwrap());
    assert_eq!((guest.status().as_str(), markers.list().unwrap()), ("running", vec![]));
    // The answer to `stop` is lost: the guest may yet be stopped, so the marker and the watchdog stay.
    *guest.fails.lock().unwrap() = Some(("stop", 1));
    assert!(pauser.pause(VM, guest.clone()).is_err());
    assert_eq!((guest.status().as_str(), markers.list().unwrap()), ("running", vec![VM]));
    // Answers to `cont` are lost: asked again.
    *guest.fails.lock().unwrap() = Some(("cont", 2));
    pauser.pause(VM, guest.clone()).unwrap().resume().unwrap();
    assert_eq!(guest.status(), "running");
}

#[test]
fn a_guest_that_its_operator_paused_is_neither_stopped_nor_resumed() {
    let guest = Guest::new("paused");
    let (pauser, markers, _dir) = pauser(&guest, Duration::from_secs(60));
    let paused = pauser.pause(VM, guest.clone()).unwrap();
    assert!(!paused.was_running() && markers.list().unwrap().is_empty());
    assert_eq!(paused.resume().unwrap(), Duration::ZERO);
    assert_eq!((guest.status().as_str(), *guest.stops.lock().unwrap()), ("paused", 0));
}

#[test]
fn a_pause_broken_from_outside_is_void() {
    let guest = Guest::new("running");
    let (pauser, _markers, _dir) = pauser(&guest, Duration::from_secs(60));
    let paused = pauser.pause(VM, guest.clone()).unwrap();
    *guest.status.lock().unwrap() = "running".into();
    assert!(matches!(paused.resume(), Err(QuiesceError::Broken { .. })));
    *guest.status.lock().unwrap() = "io-error".into();
    assert!(matches!(pauser.pause(VM, guest.clone()), Err(QuiesceError::Status { .. })));
    assert_eq!(guest.status(), "io-error");
}

#[test]
fn a_pause_longer_than_its_limit_is_ended_and_void() {
    let guest = Guest::new("running");
    // Long enough for a pause to begin within it on a busy machine.
    let (pauser, _markers, _dir) = pauser(&guest, Duration::from_millis(500));
    let paused = pauser.pause(VM, guest.clone()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest.status() != "running" {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(matches!(paused.resume(), Err(QuiesceError::Broken { .. })));
}
