//! Freezing a guest's file systems for the instant of a cut, through the agent within it.
//! Promises: whatever fails, the cut goes on without; what may be frozen is thawed again: a marker stands and the watchdog
//! is armed before anything is asked for, and whoever gives up leaves it to the watchdog, which tries until the guest has
//! said so; what somebody else froze is left alone; a guest whose agent is silent is asked again less and less often.
//! All calls block. Called by `capture::guest`.

use crate::watchdog::{Markers, Watchdog, WatchdogError};
use lifeboat::{
    fault,
    hypervisor::guest_agent::{AgentChannel, AgentError, GuestAgent},
    id::VmId,
};
use std::{
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

/// Why file systems are not frozen for a point.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FreezeError {
    #[error("the VM has no channel for a guest agent")]
    NoChannel,
    #[error("{0}")]
    Agent(#[from] AgentError),
    #[error("somebody else has frozen its file systems")]
    FrozenByOthers,
    #[error("the guest has no file system that can be frozen")]
    NothingToFreeze,
    #[error("the guest agent did not answer within {PROBE_WITHIN:?}")]
    Slow,
    #[error("an earlier freeze is still being undone")]
    StillThawing,
    #[error("no marker of it could be left: {0}")]
    Marker(Arc<io::Error>),
    #[error("{0}")]
    Watchdog(Arc<WatchdogError>),
    #[error("they would have been frozen for longer than `freeze_limit` allows, {0:?}, and were thawed")]
    TooLong(Duration),
    #[error("they were thawed from outside before the cut was over")]
    Thawed,
    /// Not asked at all this time.
    #[error("{why}; asked again in {} s", again.as_secs().max(1))]
    Resting { why: Box<FreezeError>, again: Duration },
}

impl From<WatchdogError> for FreezeError {
    fn from(error: WatchdogError) -> Self {
        match error {
            WatchdogError::StillReleasing { .. } => Self::StillThawing,
            other => Self::Watchdog(Arc::new(other)),
        }
    }
}

/// Freezes one guest.
pub struct Freezer {
    vm: VmId,
    guard: Guard,
    limit: Duration,
    /// Failures in a row, the last of them, and when to ask again.
    rest: Option<(u32, FreezeError, Instant)>,
    /// A question that was not answered in time; its answer may come until the next cut.
    probe: Option<Receiver<Result<bool, AgentError>>>,
}

#[derive(Clone)]
struct Guard {
    markers: Markers,
    watchdog: Arc<Watchdog>,
}

/// File systems that are frozen, or may be. Dropping it has them thawed.
#[must_use]
pub struct Frozen<C: AgentChannel> {
    vm: VmId,
    guard: Guard,
    agent: GuestAgent<C>,
    limit: Duration,
    systems: u64,
    since: Instant,
    over: bool,
}

/// It worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WasFrozen {
    pub systems: u64,
    pub lasted: Duration,
}

impl Freezer {
    /// `markers`: those of freezes. Nothing stays frozen for longer than `limit`.
    pub fn new(vm: VmId, markers: Markers, watchdog: Arc<Watchdog>, limit: Duration) -> Self {
        Self { vm, guard: Guard { markers, watchdog }, limit, rest: None, probe: None }
    }

    /// What an agent before us, or an earlier cut, may have left frozen is being thawed once this returns.
    pub fn tidy(&self) -> Result<(), FreezeError> {
        if self.guard.markers.read(self.vm).is_none() {
            return Ok(());
        }
        self.guard.watchdog.leave_thawing(self.vm)?;
        Err(FreezeError::StillThawing)
    }

    /// Whether its file systems could be frozen now. A silent agent costs this cut a moment, and is waited for beside it.
    pub fn ask<C: AgentChannel + Send + 'static>(
        &mut self,
        has_channel: bool,
        agent: impl Fn() -> GuestAgent<C>,
    ) -> Result<(), FreezeError> {
        if !has_channel {
            return Err(FreezeError::NoChannel);
        }
        if let Some((_, why, until)) = &self.rest
            && let Some(again) = until.checked_duration_since(Instant::now())
        {
            return Err(FreezeError::Resting { why: Box::new(why.clone()), again });
        }
        let asked = self.tidy().and_then(|()| match self.probe(agent)? {
            true => Err(FreezeError::FrozenByOthers),
            false => Ok(()),
        });
        if let Err(error) = &asked
            && !matches!(error, FreezeError::Slow)
        {
            self.failed(error.clone());
        }
        asked
    }

    /// Whether they are frozen.
    fn probe<C: AgentChannel + Send + 'static>(
        &mut self,
        agent: impl Fn() -> GuestAgent<C>,
    ) -> Result<bool, FreezeError> {
        if let Some(earlier) = self.probe.take() {
            match earlier.recv_timeout(PROBE_WITHIN) {
                Ok(answer) => drop(answer?),
                Err(RecvTimeoutError::Timeout) => {
                    self.probe = Some(earlier);
                    return Err(FreezeError::Slow);
                }
                Err(RecvTimeoutError::Disconnected) => {}
            }
        }
        let (answer, heard) = mpsc::channel();
        let agent = agent();
        // Whoever asked may not wait for it any more.
        thread::spawn(move || drop(answer.send(agent.is_frozen())));
        match heard.recv_timeout(PROBE_WITHIN) {
            Ok(answer) => Ok(answer?),
            Err(RecvTimeoutError::Timeout) => {
                self.probe = Some(heard);
                Err(FreezeError::Slow)
            }
            Err(RecvTimeoutError::Disconnected) => Err(FreezeError::Slow),
        }
    }

    /// Freezes them. On an error nothing is frozen, or is being thawed.
    pub fn freeze<C: AgentChannel>(&mut self, agent: GuestAgent<C>) -> Result<Frozen<C>, FreezeError> {
        let frozen = self.try_freeze(agent);
        if let Err(error) = &frozen {
            self.failed(error.clone());
        }
        frozen
    }

    fn try_freeze<C: AgentChannel>(&mut self, agent: GuestAgent<C>) -> Result<Frozen<C>, FreezeError> {
        let (vm, limit) = (self.vm, self.limit);
        self.tidy()?;
        self.guard.markers.set(vm).map_err(|error| FreezeError::Marker(Arc::new(error)))?;
        if let Err(error) = self.guard.watchdog.arm_freeze(vm, limit) {
            self.guard.clear_marker(vm);
            return Err(error.into());
        }
        let since = Instant::now();
        fault::point("freeze.guarded");
        // From here on dropping it undoes what was begun.
        let mut frozen =
            Frozen { vm, guard: self.guard.clone(), agent, limit, systems: 0, since, over: false };
        // A freeze that comes late is undone late: somebody froze us, and the watchdog is about to fire or has fired.
        if since.elapsed() > limit / 4 {
            return Err(FreezeError::TooLong(limit));
        }
        match frozen.agent.freeze(limit * 3 / 5) {
            Ok(0) => {
                frozen.never_was()?;
                Err(FreezeError::NothingToFreeze)
            }
            Ok(systems) => {
                frozen.systems = systems;
                fault::point("freeze.frozen");
                Ok(frozen)
            }
            // It undoes by itself what it could not finish. What is frozen all the same is somebody else's.
            Err(error @ AgentError::Refused { .. }) => {
                frozen.never_was()?;
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A point was cut with them frozen, from before its instant until after it.
    pub fn worked(&mut self) {
        self.rest = None;
    }

    /// It is not asked again for a while, longer each time.
    pub fn failed(&mut self, why: FreezeError) {
        let failures = self.rest.as_ref().map_or(0, |(failures, ..)| *failures);
        let rest = (REST * 2_u32.saturating_pow(failures.min(16))).min(REST_MAX);
        self.rest = Some((failures.saturating_add(1), why, Instant::now() + rest));
    }
}

impl<C: AgentChannel> Frozen<C> {
    /// Thaws them; the guest runs. An error if they were not frozen all the time: the point that was cut meanwhile is then
    /// no better than any other.
    pub fn thaw(mut self) -> Result<WasFrozen, FreezeError> {
        fault::point("freeze.before-thaw");
        let until = Instant::now() + THAW_WITHIN;
        let mut pause = PAUSE_FIRST;
        let thawed = loop {
            match self.agent.thaw() {
                Ok(thawed) => break thawed,
                // libvirt learns a little later than we that the guest runs again, and asks nothing of one that stands.
                Err(_) if Instant::now() + pause < until => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(error) => return Err(error.into()),
            }
        };
        let (lasted, systems) = (self.since.elapsed(), self.systems);
        fault::point("freeze.thawed");
        self.over = true;
        if self.guard.end(self.vm)? {
            return Err(FreezeError::TooLong(self.limit));
        }
        if thawed == 0 { Err(FreezeError::Thawed) } else { Ok(WasFrozen { systems, lasted }) }
    }

    /// Nothing was frozen after all.
    fn never_was(&mut self) -> Result<(), FreezeError> {
        self.over = true;
        self.guard.end(self.vm).map(drop)
    }
}

impl<C: AgentChannel> Drop for Frozen<C> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        // Where even that fails the marker stays, and whoever finds it has them thawed.
        match self.guard.watchdog.leave_thawing(self.vm) {
            Ok(()) => {
                tracing::warn!(vm = %self.vm, "its file systems may be frozen; the watchdog has them thawed")
            }
            Err(error) => {
                tracing::error!(vm = %self.vm, %error, "its file systems may be frozen, and the watchdog can't be told");
            }
        }
    }
}

impl Guard {
    /// Ends it; whether the watchdog had them thawed before.
    fn end(&self, vm: VmId) -> Result<bool, FreezeError> {
        self.clear_marker(vm);
        Ok(self.watchdog.disarm_freeze(vm)?.fired)
    }

    fn clear_marker(&self, vm: VmId) {
        if let Err(error) = self.markers.clear(vm) {
            tracing::warn!(%vm, %error, "a marker of a freeze that is over could not be removed");
        }
    }
}

/// An agent at work answers in some milliseconds; other members of a group wait meanwhile.
const PROBE_WITHIN: Duration = Duration::from_secs(1);
/// How long a thaw is tried before it is left to the watchdog.
const THAW_WITHIN: Duration = Duration::from_secs(2);
const PAUSE_FIRST: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// From a failure to the next question; doubled each time.
const REST: Duration = Duration::from_secs(5);
const REST_MAX: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests;
