//! Several guests that stand at one instant: what the cut of one of them says to, and hears from, the others.
//! Promises: a guest waits no longer than its patience; whether it stood until all did is said truly. Made by
//! `protect::vm`, used at the barrier, where everything blocks.

use lifeboat::units::UnixMs;
use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Told, once, that the guest stands, and whether it ran until then.
pub type Stands = Box<dyn FnOnce(bool) + Send>;

/// One guest's part in it.
pub struct Meeting {
    /// The instant that the points of all of them bear.
    pub at: UnixMs,
    patience: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    stands: Option<Stands>,
    since: Option<Instant>,
    /// Nobody is waited for any more; whether all stand.
    go: Option<bool>,
    kept: bool,
}

impl Meeting {
    /// The guest waits for the others for `patience` at the most, from when it stands.
    pub fn new(at: UnixMs, patience: Duration, stands: Stands) -> Self {
        let state = State { stands: Some(stands), since: None, go: None, kept: false };
        Self { at, patience, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Said at the barrier: the guest stands. `ran`: it ran until then.
    pub fn stands(&self, ran: bool) {
        let mut state = self.state();
        state.since.get_or_insert_with(Instant::now);
        if let Some(tell) = state.stands.take() {
            tell(ran);
        }
    }

    /// Said by the link: nobody is waited for any more.
    pub fn go(&self, all_stand: bool) {
        self.state().go.get_or_insert(all_stand);
        self.changed.notify_all();
    }

    /// Waits until nobody is waited for. Blocks. `true`: there was an instant at which all stood.
    pub fn wait(&self) -> bool {
        let state = self.state();
        let left = self.patience.saturating_sub(state.since.map_or(Duration::ZERO, |since| since.elapsed()));
        let waited = self.changed.wait_timeout_while(state, left, |state| state.go.is_none());
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // What comes later comes too late.
        let all_stand = *state.go.get_or_insert(false);
        state.kept = all_stand;
        all_stand
    }

    /// Whether the guest stood until all did.
    pub fn was_kept(&self) -> bool {
        self.state().kept
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    #[test]
    fn a_guest_says_once_that_it_stands_and_goes_on_when_all_do() {
        let told = Arc::new(AtomicU32::new(0));
        let count = told.clone();
        let tell = Box::new(move |ran| {
            count.fetch_add(1 + u32::from(ran), Ordering::SeqCst);
        });
        let meeting = Arc::new(Meeting::new(UnixMs(7), Duration::from_secs(60), tell));
        meeting.stands(true);
        meeting.stands(true);
        assert_eq!(told.load(Ordering::SeqCst), 2);
        let waits = std::thread::spawn({
            let meeting = meeting.clone();
            move || meeting.wait()
        });
        meeting.go(true);
        assert!(waits.join().unwrap() && meeting.was_kept());
    }

    #[test]
    fn a_guest_out_of_patience_goes_on_and_what_it_hears_then_comes_too_late() {
        let meeting = Meeting::new(UnixMs(7), Duration::ZERO, Box::new(|_| {}));
        meeting.stands(true);
        assert!(!meeting.wait());
        meeting.go(true);
        assert!(!meeting.was_kept() && !meeting.wait());
    }
}
