//! The pause: stops a running guest and sees to it that it runs again, on every path.
//! Promises: only a guest that ran is ever resumed; before it is stopped a marker stands and the watchdog is armed; a
//! pause that was not ours from its first to its last instant is reported, so that its point is thrown away.
//! All calls block. Called by `capture::guest`.

use crate::watchdog::{Markers, Watchdog, WatchdogError, gone_out, guest_status};
use lifeboat::{
    fault,
    hypervisor::monitor::{Monitor, MonitorError},
    id::VmId,
};
use serde_json::json;
use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// Tries to resume before it is left to the watchdog.
const TRIES: u32 = 5;
/// A guest stands for its last point for longer than the site waits for that; four fifths of this are half an hour.
const STANDING_LIMIT: Duration = Duration::from_secs(2250);

#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// It neither runs nor is paused: there is nothing that could be resumed elsewhere.
    #[error("the guest can't be cut while QEMU says it is `{status}`")]
    Status { status: String },
    #[error("no marker of the pause could be left ({0}); the guest was not paused")]
    Marker(io::Error),
    #[error(transparent)]
    Watchdog(#[from] WatchdogError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// It took too long, or somebody else resumed or stopped it meanwhile.
    #[error("the pause was ended from outside ({why}); the point is void and will be cut again")]
    Broken { why: String },
}

/// What is to be done when a guest that we had stopped goes on.
pub type WhenOver = Box<dyn Fn(VmId) + Send + Sync>;

/// Pauses guests.
pub struct Pauser {
    markers: Markers,
    watchdog: Arc<Watchdog>,
    limit: Duration,
    when_over: WhenOver,
}

/// A guest that stands still. Dropping it resumes it, if it was we who stopped it.
#[must_use]
pub struct Paused<'a> {
    pauser: &'a Pauser,
    vm: VmId,
    monitor: Arc<dyn Monitor>,
    /// When we stopped it; `None` if its operator had.
    stopped: Option<Instant>,
    over: bool,
}

impl Pauser {
    /// No pause lasts longer than `limit`.
    pub fn new(markers: Markers, watchdog: Arc<Watchdog>, limit: Duration, when_over: WhenOver) -> Self {
        Self { markers, watchdog, limit, when_over }
    }

    pub fn pause(&self, vm: VmId, monitor: Arc<dyn Monitor>) -> Result<Paused<'_>, QuiesceError> {
        let status = guest_status(&*monitor)?;
        let mut paused = Paused { pauser: self, vm, monitor, stopped: None, over: false };
        match status.as_str() {
            "running" => {}
            "paused" => return Ok(paused),
            _ => {
                paused.over = true;
                return Err(QuiesceError::Status { status });
            }
        }
        self.markers.set(vm).map_err(QuiesceError::Marker)?;
        // From here on dropping `paused` undoes what was begun.
        paused.stopped = Some(Instant::now());
        arm(&self.watchdog, vm, self.limit)?;
        fault::point("cut.marked-pausing");
        // A `stop` that comes late is undone late: somebody froze us, and the watchdog is about to fire or has fired.
        let armed = paused.stopped.replace(Instant::now());
        if armed.is_some_and(|armed| armed.elapsed() > self.limit / 4) {
            return Err(QuiesceError::Broken { why: "the agent did not get to run in time".into() });
        }
        if let Err(error) = paused.monitor.execute("stop", json!({})) {
            // Where the answer is lost, the stop may yet come: the watchdog stays armed and undoes it then.
            if matches!(error, MonitorError::Unreachable { .. }) {
                paused.over = true;
                let _ = paused.let_go();
            }
            return Err(error.into());
        }
        fault::point("cut.stopped");
        let status = guest_status(&*paused.monitor)?;
        if status == "paused" {
            Ok(paused)
        } else {
            Err(QuiesceError::Broken { why: format!("it was `{status}` right after it had been stopped") })
        }
    }
}

/// Guards guests that are suspended through libvirt for longer than a pause.
#[derive(Clone)]
pub struct StandingGuard {
    markers: Markers,
    watchdog: Arc<Watchdog>,
}

impl StandingGuard {
    pub fn new(markers: Markers, watchdog: Arc<Watchdog>) -> Self {
        Self { markers, watchdog }
    }

    /// To be called first: should this process die or hang, the guest is let go on, unless `held` is there by then.
    pub fn begin(&self, vm: VmId, held: &Path) -> Result<(), QuiesceError> {
        self.markers.set_standing(vm, held).map_err(QuiesceError::Marker)?;
        let armed = arm(&self.watchdog, vm, STANDING_LIMIT);
        if armed.is_err()
            && let Err(error) = self.markers.clear(vm)
        {
            tracing::warn!(%vm, %error, "a marker of a guest that was not suspended could not be removed");
        }
        Ok(armed?)
    }

    /// It goes on, or is held for good; an error if the watchdog let it go.
    pub fn end(&self, vm: VmId) -> Result<(), QuiesceError> {
        unguard(&self.markers, &self.watchdog, vm, &format!("the site's last cut may, {STANDING_LIMIT:?}"))
    }
}

fn arm(watchdog: &Watchdog, vm: VmId, limit: Duration) -> Result<(), WatchdogError> {
    let armed = watchdog.arm(vm, limit);
    if matches!(armed, Err(WatchdogError::StillReleasing { .. })) {
        // Left armed after a lost answer, it has fired since; told that this is over, it comes to an end.
        let _ = watchdog.disarm(vm)?;
    }
    armed
}

/// Ends the guard of a pause that is over; an error if the watchdog ended it.
fn unguard(markers: &Markers, watchdog: &Watchdog, vm: VmId, than: &str) -> Result<(), QuiesceError> {
    if let Err(error) = markers.clear(vm) {
        tracing::warn!(%vm, %error, "a marker of a pause that is over could not be removed");
    }
    if watchdog.disarm(vm)?.fired {
        return Err(QuiesceError::Broken { why: format!("it lasted longer than {than}") });
    }
    Ok(())
}

impl Paused<'_> {
    /// Whether the guest ran until we stopped it.
    pub fn was_running(&self) -> bool {
        self.stopped.is_some()
    }

    /// Lets the guest go on. Returns how long it stood; 0 if it was not we who stopped it.
    pub fn resume(mut self) -> Result<Duration, QuiesceError> {
        self.end()
    }

    /// QEMU has let the guest go by itself, and it was seen to run: only the guard ends. Whatever it does now is its
    /// operator's business. Returns how long it stood.
    pub fn was_resumed(mut self) -> Result<Duration, QuiesceError> {
        self.over = true;
        let lasted = self.stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
        self.unguard()?;
        Ok(lasted)
    }

    /// Ends the guard of a pause that is over; an error if the watchdog ended it.
    fn unguard(&self) -> Result<(), QuiesceError> {
        let Pauser { markers, watchdog, limit, .. } = self.pauser;
        unguard(markers, watchdog, self.vm, &format!("`max_pause` allows, {limit:?}"))
    }

    fn end(&mut self) -> Result<Duration, QuiesceError> {
        self.over = true;
        let Some(stopped) = self.stopped else {
            let status = guest_status(&*self.monitor)?;
            return if status == "paused" {
                Ok(Duration::ZERO)
            } else {
                Err(QuiesceError::Broken { why: format!("it is `{status}` now, and was paused") })
            };
        };
        let mut found = self.let_go();
        for _ in 1..TRIES {
            match &found {
                // QEMU's answer is lost or its monitor is gone for now: what happened can be seen by asking again.
                Err(MonitorError::Unreachable { .. }) => found = self.let_go(),
                _ => break,
            }
        }
        // Where even that failed the watchdog stays armed and goes on trying.
        let found = found?;
        if gone_out::is_end(&found) {
            // It found the guest standing, and would leave it so if it fails. The watchdog, still armed, sees to that.
            return Err(QuiesceError::Broken {
                why: format!("it was saved or migrated meanwhile: `{found}`"),
            });
        }
        let lasted = stopped.elapsed();
        self.unguard()?;
        if found != "paused" {
            Err(QuiesceError::Broken { why: format!("it was `{found}` when it should have been paused") })
        } else {
            Ok(lasted)
        }
    }

    /// Resumes it if it is paused; says what it was.
    fn let_go(&self) -> Result<String, MonitorError> {
        let status = guest_status(&*self.monitor)?;
        if status == "paused" {
            self.monitor.execute("cont", json!({}))?;
        }
        Ok(status)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if self.stopped.is_none() {
            return;
        }
        if !self.over
            && let Err(error) = self.end()
        {
            tracing::warn!(vm = %self.vm, %error, "a pause that failed was ended");
        }
        (self.pauser.when_over)(self.vm);
    }
}

#[cfg(test)]
mod tests;
