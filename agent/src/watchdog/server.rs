//! The watchdog's side: one loop over the socket and the deadlines, and one thread per guest that is being let go.
//! Promises: a hung libvirt holds up neither other guests nor the answers to the agent; however the loop ends, every
//! guest that was announced is let go.

use super::{
    Answer, Found, MESSAGE_MAX, Markers, Release, Request, WatchdogError, What,
    left_behind::put_back_capabilities,
    letting_go::{End, Pace, Releasing, Task},
};
use lifeboat::id::VmId;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, send},
};
use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long between two tries to put capabilities back.
const AGAIN: Duration = Duration::from_millis(250);
/// Half an hour of tries: as long as QEMU may take to write the memory of the largest guests.
const PUT_BACK_TRIES: u32 = 7200;

enum Guard {
    /// `Instant` does not count the time in which the host sleeps, and neither does the guest.
    Armed {
        deadline: Instant,
        mark: Option<String>,
    },
    Releasing(Releasing),
}

/// One agent's guests.
struct Guards {
    releaser: Arc<dyn Release>,
    markers: Markers,
    pace: Pace,
    guards: HashMap<(VmId, What), Guard>,
    ending: HashMap<(VmId, What), JoinHandle<()>>,
}

/// Serves one agent until its socket ends and no guest is left paused.
pub fn serve(socket: OwnedFd, releaser: Arc<dyn Release>, markers: Markers) -> Result<(), WatchdogError> {
    serve_at(Pace::usual(), socket, releaser, markers)
}

pub(super) fn serve_at(
    pace: Pace,
    socket: OwnedFd,
    releaser: Arc<dyn Release>,
    markers: Markers,
) -> Result<(), WatchdogError> {
    let (guards, ending) = (HashMap::new(), HashMap::new());
    let mut guards = Guards { releaser, markers, pace, guards, ending };
    let served = guards.serve(&socket);
    // Told at once, so that an agent that is not gone after all does not rely on us any more.
    drop(socket);
    let (releaser, found) = (guards.releaser.clone(), Found::new(guards.markers.folder().to_owned()));
    let putting_back =
        std::thread::spawn(move || put_back_capabilities(&*releaser, &found, PUT_BACK_TRIES, AGAIN));
    guards.let_all_go();
    // A thread that panicked has nothing more to say.
    let _ = putting_back.join();
    served
}

impl Guards {
    fn serve(&mut self, socket: &OwnedFd) -> Result<(), WatchdogError> {
        let io = |step| move |errno: nix::Error| WatchdogError::Io { step, source: errno.into() };
        loop {
            let next = self.fire(Instant::now());
            // Rounded up, so that a deadline is past when the wait ends.
            let wait =
                next.map(|next| next.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
            let wait = wait
                .map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX));
            match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(0) | Err(nix::Error::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(io("waiting")(errno)),
            }
            let mut message = [0; MESSAGE_MAX];
            let len = match recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()) {
                Ok(0) | Err(nix::Error::ECONNRESET) => return Ok(()),
                Err(nix::Error::EINTR) => continue,
                received => received.map_err(io("receiving"))?,
            };
            // What makes no sense is no agent of ours: as good as gone.
            let Ok(request) = serde_json::from_slice::<Request>(&message[..len]) else { return Ok(()) };
            let Ok(answer) = serde_json::to_vec(&self.answer(request)) else { return Ok(()) };
            if send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL).is_err() {
                return Ok(());
            }
        }
    }

    /// Begins to let go every guest whose deadline has passed; returns the next deadline.
    fn fire(&mut self, now: Instant) -> Option<Instant> {
        let due = |guard: &Guard| matches!(guard, Guard::Armed { deadline, .. } if *deadline <= now);
        let late = self.guards.iter().filter(|(_, guard)| due(guard)).map(|(guarded, _)| *guarded);
        for guarded in late.collect::<Vec<_>>() {
            if let Some(Guard::Armed { mark, .. }) = self.guards.remove(&guarded) {
                let releasing = self.start(guarded, mark);
                self.guards.insert(guarded, Guard::Releasing(releasing));
            }
        }
        let deadlines = self.guards.values().filter_map(|guard| match guard {
            Guard::Armed { deadline, .. } => Some(*deadline),
            Guard::Releasing(_) => None,
        });
        deadlines.min()
    }

    fn start(&self, (vm, what): (VmId, What), mark: Option<String>) -> Releasing {
        Releasing::start(Task::new(vm, self.releaser.clone(), self.markers.of(what), mark, self.pace))
    }

    fn answer(&mut self, request: Request) -> Answer {
        self.ending.retain(|_, thread| !thread.is_finished());
        match request {
            Request::Arm { vm, what, .. }
                if self.ending.contains_key(&(vm, what))
                    || matches!(self.guards.get(&(vm, what)), Some(Guard::Releasing(_))) =>
            {
                Answer::StillReleasing
            }
            Request::Arm { vm, what, deadline_ms } => {
                let deadline = Instant::now() + Duration::from_millis(deadline_ms.min(DEADLINE_MAX_MS));
                let mark = self.markers.of(what).read(vm);
                self.guards.insert((vm, what), Guard::Armed { deadline, mark });
                Answer::Armed
            }
            Request::Disarm { vm, what } => match self.guards.remove(&(vm, what)) {
                Some(Guard::Releasing(releasing)) => {
                    self.ending.insert((vm, what), releasing.end(End::Disarmed));
                    Answer::Disarmed { fired: true }
                }
                Some(Guard::Armed { .. }) => Answer::Disarmed { fired: false },
                // Nothing was armed, so nothing vouches for the pause.
                None => Answer::Disarmed { fired: true },
            },
        }
    }

    /// The agent is gone: whatever it had paused is let go, all at once, for as long as that takes.
    fn let_all_go(mut self) {
        let guards: Vec<_> = self.guards.drain().collect();
        let releasing = guards.into_iter().map(|(guarded, guard)| match guard {
            Guard::Armed { mark, .. } => self.start(guarded, mark),
            Guard::Releasing(releasing) => releasing,
        });
        let ending: Vec<_> = releasing.map(|releasing| releasing.end(End::Gone)).collect();
        for thread in ending.into_iter().chain(self.ending.into_values()) {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}

/// An hour: no pause that anybody may ask for is longer.
const DEADLINE_MAX_MS: u64 = 3_600_000;
