//! Goal: whatever is frozen is thawed, and what somebody else froze is not. Method: a guest agent that is a few flags, and
//! the watchdog's real loop, which thaws through it.

use super::*;
use crate::watchdog::{Noted, Release, Released, serve};
use serde_json::{Value, json};
use std::sync::Mutex;

#[derive(Clone, Default)]
struct Guest(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    frozen: bool,
    /// Answers that get lost from here on; what was asked is done all the same.
    lost: u32,
    /// It says nothing until this is over.
    silent: Option<Arc<Mutex<()>>>,
    /// Commands that are refused.
    refuses: Option<&'static str>,
    asked: Vec<String>,
    no_systems: bool,
}

impl Guest {
    fn inside(&self) -> std::sync::MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }

    fn agent(&self) -> GuestAgent<Self> {
        GuestAgent::new(self.clone())
    }

    fn is_thawed_soon(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.inside().frozen {
            assert!(Instant::now() < until, "it stays frozen");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl AgentChannel for Guest {
    fn ask(&self, request: &str, _: Duration) -> Result<String, String> {
        let request: Value = serde_json::from_str(request).unwrap();
        let silent = self.inside().silent.clone();
        drop(silent.as_ref().map(|silent| silent.lock()));
        let command = request["execute"].as_str().unwrap().to_owned();
        let mut inside = self.inside();
        inside.asked.push(command.clone());
        if inside.refuses == Some(command.as_str()) {
            return Ok(json!({ "error": { "desc": "told to" } }).to_string());
        }
        let answer = match command.as_str() {
            "guest-fsfreeze-status" => json!(if inside.frozen { "frozen" } else { "thawed" }),
            "guest-fsfreeze-freeze" => {
                inside.frozen = !inside.no_systems;
                json!(u8::from(inside.frozen))
            }
            "guest-fsfreeze-thaw" => json!(u8::from(std::mem::take(&mut inside.frozen))),
            _ => json!({}),
        };
        if inside.lost > 0 {
            inside.lost -= 1;
            return Err("the answer is lost".into());
        }
        Ok(json!({ "return": answer }).to_string())
    }
}

impl Release for Guest {
    fn release(&self, _: VmId, _: Option<&str>) -> Result<Released, WatchdogError> {
        Ok(Released::NotPaused)
    }

    fn thaw(&self, _: VmId) -> Result<Released, WatchdogError> {
        self.agent().thaw()?;
        Ok(Released::Resumed)
    }

    fn put_back(&self, _: VmId, noted: &Noted) -> Result<bool, WatchdogError> {
        noted.forget().map(|()| true)
    }
}

const VM: VmId = VmId::from_bytes([3; 16]);

fn freezer(guest: &Guest, limit: Duration) -> (Freezer, Markers, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let markers = Markers::new(dir.path().into());
    let (guest, kept) = (guest.clone(), markers.clone());
    let watchdog = Watchdog::start_with(move || {
        let (ours, theirs) =
            std::os::unix::net::UnixDatagram::pair().map(|pair| (pair.0.into(), pair.1.into())).unwrap();
        let (guest, markers) = (Arc::new(guest.clone()), kept.clone());
        thread::spawn(move || serve(theirs, guest, markers));
        Ok(ours)
    });
    let markers = markers.of(crate::watchdog::What::Freeze);
    (Freezer::new(VM, markers.clone(), Arc::new(watchdog.unwrap()), limit), markers, dir)
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn file_systems_are_frozen_for_the_cut_and_thawed_after_it() {
    let guest = Guest::default();
    let (mut freezer, markers, _dir) = freezer(&guest, LONG);
    freezer.ask(true, || guest.agent()).unwrap();
    let frozen = freezer.freeze(guest.agent()).unwrap();
    assert!(guest.inside().frozen && markers.list().unwrap() == [VM]);
    assert_eq!(frozen.thaw().unwrap().systems, 1);
    assert!(!guest.inside().frozen && markers.list().unwrap().is_empty());
    drop(freezer.freeze(guest.agent()).unwrap());
    guest.is_thawed_soon();
}

#[test]
fn what_nobody_thawed_in_time_the_watchdog_thaws_and_the_point_is_told_so() {
    let guest = Guest::default();
    let (mut freezer, _, _dir) = freezer(&guest, Duration::from_secs(1));
    let frozen = freezer.freeze(guest.agent()).unwrap();
    guest.is_thawed_soon();
    assert!(matches!(frozen.thaw(), Err(FreezeError::TooLong(_))));
}

#[test]
fn a_freeze_whose_answer_is_lost_is_undone() {
    let guest = Guest::default();
    let (mut freezer, markers, _dir) = freezer(&guest, LONG);
    guest.inside().lost = 1;
    assert!(matches!(freezer.freeze(guest.agent()), Err(FreezeError::Agent(_))));
    guest.is_thawed_soon();
    let until = Instant::now() + Duration::from_secs(20);
    while !markers.list().unwrap().is_empty() {
        assert!(Instant::now() < until, "its marker stays");
        thread::sleep(Duration::from_millis(1));
    }
    // It is not asked again at once.
    let asked = guest.inside().asked.len();
    assert!(matches!(freezer.ask(true, || guest.agent()), Err(FreezeError::Resting { .. })));
    assert_eq!(guest.inside().asked.len(), asked);
    freezer.worked();
    freezer.ask(true, || guest.agent()).unwrap();
}

#[test]
fn a_thaw_is_tried_until_the_guest_has_said_so() {
    let guest = Guest::default();
    let (mut freezer, _, _dir) = freezer(&guest, LONG);
    let frozen = freezer.freeze(guest.agent()).unwrap();
    guest.inside().refuses = Some("guest-fsfreeze-thaw");
    assert!(matches!(frozen.thaw(), Err(FreezeError::Agent(_))));
    assert!(guest.inside().frozen);
    guest.inside().refuses = None;
    guest.is_thawed_soon();
}

#[test]
fn a_silent_agent_costs_a_moment_and_is_believed_once_it_answers() {
    let guest = Guest::default();
    let (mut freezer, _, _dir) = freezer(&guest, LONG);
    let silence = Arc::new(Mutex::new(()));
    guest.inside().silent = Some(silence.clone());
    let held = silence.lock().unwrap();
    for _ in 0..2 {
        assert!(matches!(freezer.ask(true, || guest.agent()), Err(FreezeError::Slow)));
    }
    drop(held);
    let until = Instant::now() + Duration::from_secs(20);
    while freezer.ask(true, || guest.agent()).is_err() {
        assert!(Instant::now() < until, "it is not believed");
    }
    assert!(!guest.inside().asked.is_empty());
}

#[test]
fn what_somebody_else_froze_stays_frozen() {
    let guest = Guest::default();
    let (mut freezer, markers, _dir) = freezer(&guest, LONG);
    guest.inside().frozen = true;
    assert!(matches!(freezer.ask(true, || guest.agent()), Err(FreezeError::FrozenByOthers)));
    assert!(guest.inside().frozen && markers.list().unwrap().is_empty());
    // Nor does it in the moment after it was asked.
    guest.inside().refuses = Some("guest-fsfreeze-freeze");
    assert!(matches!(freezer.freeze(guest.agent()), Err(FreezeError::Agent(AgentError::Refused { .. }))));
    assert!(guest.inside().frozen && markers.list().unwrap().is_empty());
}

#[test]
fn a_guest_without_an_agent_or_a_file_system_is_not_frozen() {
    let guest = Guest::default();
    let (mut freezer, markers, _dir) = freezer(&guest, LONG);
    assert!(matches!(freezer.ask(false, || guest.agent()), Err(FreezeError::NoChannel)));
    assert!(guest.inside().asked.is_empty());
    guest.inside().no_systems = true;
    assert!(matches!(freezer.freeze(guest.agent()), Err(FreezeError::NothingToFreeze)));
    guest.inside().refuses = Some("guest-fsfreeze-freeze");
    assert!(matches!(freezer.freeze(guest.agent()), Err(FreezeError::Agent(AgentError::Refused { .. }))));
    assert!(markers.list().unwrap().is_empty());
}

#[test]
fn what_a_dead_agent_left_frozen_is_thawed_before_anything_else_is() {
    let guest = Guest::default();
    let (mut freezer, markers, _dir) = freezer(&guest, LONG);
    markers.set(VM).unwrap();
    guest.inside().frozen = true;
    assert!(matches!(freezer.freeze(guest.agent()), Err(FreezeError::StillThawing)));
    guest.is_thawed_soon();
}
