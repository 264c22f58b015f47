//! The watchdog: a process of its own that resumes a guest which the agent paused and did not resume in time, and thaws
//! file systems of a guest that the agent froze and did not thaw in time.
//! Promises: it outlives the agent's death (the socket's end tells it) and its freezing (the deadline does); it only
//! ever resumes a guest that was announced as about to be paused (or frozen), and never one that libvirt knows a reason
//! to hold; it tries until libvirt has done it or the guest is gone, and looks again while a `stop` may still be on its
//! way.
//! Called by `capture::quiesce` and `capture::freeze`; run by `lifeboat-agent watchdog`, which the agent starts itself.

pub mod capabilities;
mod client;
pub mod found_standing;
pub mod gone_out;
mod left_behind;
mod letting_go;
mod markers;
mod release;
mod server;
#[cfg(test)]
mod tests;

pub use capabilities::{Found, Noted};
pub use client::{Disarmed, Watchdog};
pub use left_behind::release_paused;
pub use markers::Markers;
pub use release::{LibvirtRelease, Release, Released, status as guest_status};
pub use server::serve;

use lifeboat::{
    hypervisor::{guest_agent::AgentError, libvirt::HypervisorError, monitor::MonitorError},
    id::VmId,
};
use nix::sys::{
    mman::{MlockAllFlags, mlockall},
    prctl,
    signal::{SigHandler, Signal, signal},
};
use serde::{Deserialize, Serialize};
use std::{io, os::fd::AsFd, path::PathBuf, sync::Arc};

/// What `lifeboat-agent watchdog` and `lifeboat-agent release-paused` are told.
#[derive(Clone, Debug, clap::Args)]
pub struct WatchdogArgs {
    /// libvirt's address, as in agent.toml
    #[arg(long, default_value = "qemu:///system")]
    pub uri: String,
    /// Folder that names the guests which are being paused
    #[arg(long, default_value = "/run/lifeboat-agent/paused")]
    pub marker_dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    #[error("the watchdog can't be reached ({step}): {source}")]
    Io { step: &'static str, source: io::Error },
    /// It answered, but not as agreed: another version of the agent, say.
    #[error("the watchdog gave an unexpected answer")]
    Unexpected,
    /// It is still trying to resume, or to thaw, this guest after an earlier pause or freeze.
    #[error("the watchdog is still letting {vm} go after an earlier cut")]
    StillReleasing { vm: VmId },
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    GuestAgent(#[from] AgentError),
    #[error(transparent)]
    GoneOut(#[from] gone_out::GoneOutError),
}

/// What a guest is to be let go from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    Pause,
    /// Its file systems are frozen, by the agent within it.
    Freeze,
}

/// Agent → watchdog; each has one answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Arm { vm: VmId, what: What, deadline_ms: u64 },
    Disarm { vm: VmId, what: What },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Armed,
    StillReleasing,
    Disarmed { fired: bool },
}

/// Bytes of one message at the most.
const MESSAGE_MAX: usize = 512;

/// The watchdog process: its socket is its standard input. Returns when the agent is gone and no guest is left paused.
pub fn run(args: WatchdogArgs) -> Result<(), WatchdogError> {
    // A session of its own, deaf to what ends the agent: it ends when nothing is left to do.
    let _ = nix::unistd::setsid();
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: ignoring a signal installs no handler.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    let _ = prctl::set_name(c"lifeboat-wdog");
    // The agent offers itself to the kernel when memory runs out; its watchdog must not go along.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-500");
    // Nor must it wait for a disk to be read back into memory. Where that is not allowed it works all the same.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    let socket = io::stdin().as_fd().try_clone_to_owned();
    let socket = socket.map_err(|source| WatchdogError::Io { step: "taking its socket", source })?;
    serve(socket, Arc::new(LibvirtRelease::new(args.uri)), Markers::new(args.marker_dir))
}
