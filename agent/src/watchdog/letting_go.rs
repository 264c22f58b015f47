//! Letting one guest go, from a pause or from a freeze: a thread that tries until it has worked, and that looks again for as
//! long as a late `stop` (or freeze) of the agent's may still come. Promises: a guest of ours that stands paused is seen
//! within [`Pace::AGAIN`]; failures are tried again with back-off; a pause that another agent has begun meanwhile is left to
//! that agent's own watchdog. Called by `server`, and by [`super::release_paused`] for what a dead agent left.

use super::{Markers, Release, Released, What};
use lifeboat::id::VmId;
use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How often is looked, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Between two looks at a guest that may be paused again.
    pub again: Duration,
    /// How long a `stop` may still be on its way after the agent that sent it is gone.
    pub linger: Duration,
}

impl Pace {
    /// A late `stop` is undone in much less than the shortest of the usual limits.
    const AGAIN: Duration = Duration::from_millis(200);
    /// libvirt lets a monitor command wait 30 s for its turn, and then gives it up.
    const LINGER: Duration = Duration::from_secs(35);
    /// Between the first tries after a failure; doubled each time.
    const BACK_OFF: Duration = Duration::from_millis(20);
    const BACK_OFF_MAX: Duration = Duration::from_secs(1);

    pub(super) const fn usual() -> Self {
        Self { again: Self::AGAIN, linger: Self::LINGER }
    }

    /// For a command that somebody waits for.
    pub(super) const fn short() -> Self {
        Self { again: Self::AGAIN, linger: Duration::from_secs(2) }
    }
}

/// Why no further `stop` of the agent's will come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It said itself that its pause is over.
    Disarmed,
    /// It is gone, and what it had sent last may still be on its way.
    Gone,
}

/// A guest that is being let go.
pub(super) struct Releasing {
    order: mpsc::Sender<End>,
    thread: JoinHandle<()>,
}

/// What the thread works on. `mark` is what the marker said when the pause, or the freeze, began.
pub(super) struct Task {
    vm: VmId,
    releaser: Arc<dyn Release>,
    markers: Markers,
    mark: Option<String>,
    pace: Pace,
    /// Why it did not work; said once.
    failed: Mutex<String>,
}

impl Releasing {
    pub fn start(task: Task) -> Self {
        let (order, orders) = mpsc::channel();
        Self { order, thread: std::thread::spawn(move || task.run(&orders)) }
    }

    /// Lets the thread come to its end.
    pub fn end(self, end: End) -> JoinHandle<()> {
        // A thread that has ended needs no order.
        let _ = self.order.send(end);
        self.thread
    }
}

impl Task {
    /// `markers` are of what it is to be let go from.
    pub fn new(
        vm: VmId,
        releaser: Arc<dyn Release>,
        markers: Markers,
        mark: Option<String>,
        pace: Pace,
    ) -> Self {
        Self { vm, releaser, markers, mark, pace, failed: Mutex::default() }
    }

    fn run(&self, orders: &mpsc::Receiver<End>) {
        let mut ended = None;
        loop {
            ended = ended.or_else(|| match orders.try_recv() {
                Ok(end) => Some(end),
                Err(mpsc::TryRecvError::Disconnected) => Some(End::Gone),
                Err(mpsc::TryRecvError::Empty) => None,
            });
            let released = self.release();
            match ended {
                // While the agent may yet send the `stop` it was late with, one success is not the end.
                None => ended = orders.recv_timeout(self.pace.again).ok(),
                Some(End::Disarmed) => return self.clear(released),
                Some(End::Gone) => {
                    self.clear(released);
                    return self.linger();
                }
            }
        }
    }

    /// Lets it go once, however long that takes.
    fn release(&self) -> Released {
        let mut wait = Pace::BACK_OFF;
        loop {
            if let Some(released) = self.try_release(true) {
                return released;
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(Pace::BACK_OFF_MAX);
        }
    }

    /// Lets it go, however long that takes, and looks again.
    pub fn see_to_it(&self) {
        self.clear(self.release());
        self.linger();
    }

    /// Lets it go once, and removes its marker, in one try.
    pub fn release_once(&self) -> Result<Released, super::WatchdogError> {
        let released = self.ask()?;
        self.clear(released);
        Ok(released)
    }

    fn ask(&self) -> Result<Released, super::WatchdogError> {
        match self.markers.what() {
            What::Pause => self.releaser.release(self.vm, self.mark.as_deref()),
            What::Freeze => self.releaser.thaw(self.vm),
        }
    }

    /// `tells`: why it does not work is said.
    fn try_release(&self, tells: bool) -> Option<Released> {
        let released = self.ask();
        let what = self.markers.what();
        match &released {
            Ok(Released::Resumed) if what == What::Pause => {
                tracing::warn!(vm = %self.vm, "the agent left it paused; resumed it");
            }
            Ok(Released::Resumed) => {
                tracing::warn!(vm = %self.vm, "the agent left its file systems frozen; thawed them");
            }
            Ok(Released::NotPaused | Released::Gone | Released::Saved) => {}
            Err(error) => {
                let mut said = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                let why = error.to_string();
                if tells && *said != why {
                    tracing::error!(vm = %self.vm, ?what, %error, "could not let it go; trying again");
                    *said = why;
                }
            }
        }
        released.ok()
    }

    /// Looks again until nothing of the dead agent's can be on its way any more.
    pub fn linger(&self) {
        let until = Instant::now() + self.pace.linger;
        // Most of what is on its way arrives at once.
        let mut wait = Pace::BACK_OFF;
        while Instant::now() < until {
            std::thread::sleep(wait);
            wait = (wait * 2).min(self.pace.again);
            // A mark that stands now and is not this pause's is another agent's, whose own watchdog sees to it.
            let mark = self.markers.read(self.vm);
            if mark.is_none() || mark == self.mark {
                let tells = self.markers.what() == What::Pause;
                // A guest that stands in another agent's pause can't be asked whether it is frozen, and need not be.
                self.try_release(tells).into_iter().for_each(|released| self.clear(released));
            }
        }
    }

    /// Removes the marker of this pause, and no other; one of a guest that was saved as it was stays.
    fn clear(&self, released: Released) {
        if released != Released::Saved
            && self.mark.is_some()
            && self.markers.read(self.vm) == self.mark
            && let Err(error) = self.markers.clear(self.vm)
        {
            tracing::warn!(vm = %self.vm, %error, "its marker could not be removed");
        }
    }
}
