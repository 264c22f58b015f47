//! The agent's side: starts the watchdog, starts it again if it died, and asks it things.
//! Promises: every question is answered or fails within a bound, so that a pause is never begun unguarded.

use super::{Answer, MESSAGE_MAX, Request, WatchdogArgs, WatchdogError, What};
use lifeboat::id::VmId;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// How long an answer may take, seconds. The watchdog only looks things up to give one.
const PATIENCE_SECONDS: i64 = 5;

/// Whether a guest was resumed behind the agent's back: then what was read of it is no one instant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Disarmed {
    pub fired: bool,
}

type Start = dyn Fn() -> Result<OwnedFd, WatchdogError> + Send + Sync;

/// A running watchdog.
pub struct Watchdog {
    start: Box<Start>,
    socket: Mutex<Option<OwnedFd>>,
}

impl Watchdog {
    /// Starts `lifeboat-agent watchdog` from this process's own program file.
    pub fn spawn(args: &WatchdogArgs) -> Result<Self, WatchdogError> {
        let args = args.clone();
        Self::start_with(move || {
            // The file this process runs from, also after an upgrade has replaced it by name.
            let program = PathBuf::from("/proc/self/exe");
            let (ours, theirs) = pair()?;
            let mut command = Command::new(program);
            // The agent's own errands and endings are not the watchdog's.
            for variable in lifeboat::fault::VARIABLES {
                command.env_remove(variable);
            }
            let child = command
                .arg("watchdog")
                .args(["--uri", &args.uri])
                .arg("--marker-dir")
                .arg(&args.marker_dir)
                .env_remove("NOTIFY_SOCKET")
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .spawn()
                .map_err(|source| WatchdogError::Io { step: "starting it", source })?;
            // Nobody waits for it but this thread, which costs nothing: it ends when the agent does.
            std::thread::spawn(move || {
                let mut child = child;
                let _ = child.wait();
            });
            Ok(ours)
        })
    }

    /// A watchdog that `start` starts, and starts again when it is gone.
    pub fn start_with(
        start: impl Fn() -> Result<OwnedFd, WatchdogError> + Send + Sync + 'static,
    ) -> Result<Self, WatchdogError> {
        let socket = start()?;
        Ok(Self { start: Box::new(start), socket: Mutex::new(Some(socket)) })
    }

    /// Announces a pause that will last no longer than `limit`. Only after this has returned may the guest be stopped.
    /// The watchdog acts when four fifths of `limit` are over: what is left is for libvirt and QEMU to answer in.
    pub fn arm(&self, vm: VmId, limit: Duration) -> Result<(), WatchdogError> {
        self.guard(vm, What::Pause, limit)
    }

    /// The same for file systems that are to be frozen.
    pub fn arm_freeze(&self, vm: VmId, limit: Duration) -> Result<(), WatchdogError> {
        self.guard(vm, What::Freeze, limit)
    }

    fn guard(&self, vm: VmId, what: What, limit: Duration) -> Result<(), WatchdogError> {
        let deadline_ms = u64::try_from((limit * 4 / 5).as_millis()).unwrap_or(u64::MAX);
        match self.ask(&Request::Arm { vm, what, deadline_ms }, true)? {
            Answer::Armed => Ok(()),
            Answer::StillReleasing => Err(WatchdogError::StillReleasing { vm }),
            Answer::Disarmed { .. } => Err(WatchdogError::Unexpected),
        }
    }

    /// The guest runs again. An error means the same as `fired`: the pause was not guarded to its end.
    pub fn disarm(&self, vm: VmId) -> Result<Disarmed, WatchdogError> {
        self.unguard(vm, What::Pause)
    }

    /// Its file systems are thawed.
    pub fn disarm_freeze(&self, vm: VmId) -> Result<Disarmed, WatchdogError> {
        self.unguard(vm, What::Freeze)
    }

    /// Its file systems may be frozen, and we can't thaw them: the watchdog does, for as long as that takes.
    pub fn leave_thawing(&self, vm: VmId) -> Result<(), WatchdogError> {
        match self.arm_freeze(vm, Duration::ZERO) {
            Ok(()) | Err(WatchdogError::StillReleasing { .. }) => self.disarm_freeze(vm).map(|_| ()),
            Err(error) => Err(error),
        }
    }

    fn unguard(&self, vm: VmId, what: What) -> Result<Disarmed, WatchdogError> {
        match self.ask(&Request::Disarm { vm, what }, false)? {
            Answer::Disarmed { fired } => Ok(Disarmed { fired }),
            Answer::Armed | Answer::StillReleasing => Err(WatchdogError::Unexpected),
        }
    }

    /// Makes the watchdog end, as a crash would.
    #[cfg(test)]
    pub(super) fn break_link(&self) {
        if let Some(socket) = self.socket.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            let _ = send(socket.as_raw_fd(), b"garbage", MsgFlags::MSG_NOSIGNAL);
        }
    }

    fn ask(&self, request: &Request, may_start: bool) -> Result<Answer, WatchdogError> {
        let mut slot = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = slot.as_ref() {
            match exchange(socket, request) {
                Ok(answer) => return Ok(answer),
                // A late answer must not be taken for the next one's: this socket is done with.
                Err(error) => {
                    *slot = None;
                    if !may_start {
                        return Err(error);
                    }
                    tracing::warn!(%error, "the watchdog is gone; starting another");
                }
            }
        }
        let socket = slot.insert((self.start)()?);
        exchange(socket, request)
    }
}

fn exchange(socket: &OwnedFd, request: &Request) -> Result<Answer, WatchdogError> {
    let io = |step| move |errno: nix::Error| WatchdogError::Io { step, source: errno.into() };
    let patience = TimeVal::seconds(PATIENCE_SECONDS);
    setsockopt(socket, ReceiveTimeout, &patience).map_err(io("setting its patience"))?;
    let request = serde_json::to_vec(request).map_err(|_| WatchdogError::Unexpected)?;
    send(socket.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL).map_err(io("asking"))?;
    let mut answer = [0; MESSAGE_MAX];
    let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(io("hearing its answer"))?;
    if len == 0 {
        let source = io::ErrorKind::UnexpectedEof.into();
        return Err(WatchdogError::Io { step: "hearing its answer", source });
    }
    serde_json::from_slice(&answer[..len]).map_err(|_| WatchdogError::Unexpected)
}

/// A pair of sockets that keep messages apart.
pub(super) fn pair() -> Result<(OwnedFd, OwnedFd), WatchdogError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| WatchdogError::Io { step: "making a socket for it", source: errno.into() })
}
