//! The watchdog's side: one loop over the socket and the deadlines, and one thread per guest that is being let go.
//! Promises: a hung libvirt holds up neither other guests nor the answers to the agent.

use super::{Answer, MESSAGE_MAX, Markers, Release, Released, Request, WatchdogError};
use lifeboat::id::VmId;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, send},
};
use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long between two tries to let a guest go.
const AGAIN: Duration = Duration::from_millis(250);

enum Guard {
    Armed { deadline: Instant },
    Releasing(Releasing),
}

/// A thread that lets one guest go, again and again while the agent may still be pausing it.
struct Releasing {
    /// Dropped to say that one success more is enough.
    agent_lives: Option<mpsc::Sender<()>>,
    thread: JoinHandle<()>,
}

/// Serves one agent until its socket ends and no guest is left paused.
pub fn serve(socket: OwnedFd, releaser: Arc<dyn Release>, markers: Markers) -> Result<(), WatchdogError> {
    let io = |step| move |errno: nix::Error| WatchdogError::Io { step, source: errno.into() };
    let mut guards: HashMap<VmId, Guard> = HashMap::new();
    let mut ending: HashMap<VmId, JoinHandle<()>> = HashMap::new();
    loop {
        let now = Instant::now();
        let mut next = None;
        for (vm, guard) in &mut guards {
            match guard {
                Guard::Armed { deadline } if *deadline <= now => {
                    *guard = Guard::Releasing(start_release(*vm, &releaser, &markers, true));
                }
                Guard::Armed { deadline } => {
                    next = Some(next.map_or(*deadline, |other| (*deadline).min(other)))
                }
                Guard::Releasing(_) => {}
            }
        }
        // Rounded up, so that a deadline is past when the wait ends.
        let wait = next.map(|next| next.saturating_duration_since(now) + Duration::from_millis(1));
        let wait =
            wait.map_or(PollTimeout::NONE, |wait| PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX));
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], wait) {
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(io("waiting")(errno)),
        }
        let mut message = [0; MESSAGE_MAX];
        let len = match recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()) {
            Ok(0) | Err(nix::Error::ECONNRESET) => break,
            Err(nix::Error::EINTR) => continue,
            received => received.map_err(io("receiving"))?,
        };
        let Ok(request) = serde_json::from_slice::<Request>(&message[..len]) else { break };
        let answer = answer(request, &mut guards, &mut ending);
        let Ok(answer) = serde_json::to_vec(&answer) else { break };
        if send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL).is_err() {
            break;
        }
    }
    // The agent is gone: whatever it had paused is let go, for as long as that takes.
    for (vm, guard) in guards {
        let releasing = match guard {
            Guard::Armed { .. } => start_release(vm, &releaser, &markers, false),
            Guard::Releasing(releasing) => releasing,
        };
        drop(releasing.agent_lives);
        let _ = releasing.thread.join();
    }
    ending.into_values().for_each(|thread| drop(thread.join()));
    Ok(())
}

fn answer(
    request: Request,
    guards: &mut HashMap<VmId, Guard>,
    ending: &mut HashMap<VmId, JoinHandle<()>>,
) -> Answer {
    ending.retain(|_, thread| !thread.is_finished());
    match request {
        Request::Arm { vm, .. }
            if ending.contains_key(&vm) || matches!(guards.get(&vm), Some(Guard::Releasing(_))) =>
        {
            Answer::StillReleasing
        }
        Request::Arm { vm, deadline_ms } => {
            let deadline = Instant::now() + Duration::from_millis(deadline_ms.min(3_600_000));
            guards.insert(vm, Guard::Armed { deadline });
            Answer::Armed
        }
        Request::Disarm { vm } => match guards.remove(&vm) {
            Some(Guard::Releasing(releasing)) => {
                drop(releasing.agent_lives);
                ending.insert(vm, releasing.thread);
                Answer::Disarmed { fired: true }
            }
            Some(Guard::Armed { .. }) => Answer::Disarmed { fired: false },
            // Nothing was armed, so nothing vouches for the pause.
            None => Answer::Disarmed { fired: true },
        },
    }
}

fn start_release(vm: VmId, releaser: &Arc<dyn Release>, markers: &Markers, agent_lives: bool) -> Releasing {
    let (sender, lives) = mpsc::channel::<()>();
    let (releaser, markers) = (releaser.clone(), markers.clone());
    let thread = std::thread::spawn(move || {
        loop {
            // While the agent may yet send the `stop` it was late with, one success is not the end.
            let agent_gone = matches!(lives.try_recv(), Err(mpsc::TryRecvError::Disconnected));
            match releaser.release(vm) {
                Ok(Released::Resumed) => tracing::warn!(%vm, "the agent left it paused; resumed it"),
                Ok(Released::NotPaused | Released::Gone) => {}
                Err(error) => {
                    tracing::error!(%vm, %error, "could not resume it; trying again");
                    std::thread::sleep(AGAIN);
                    continue;
                }
            }
            if agent_gone {
                if let Err(error) = markers.clear(vm) {
                    tracing::warn!(%vm, %error, "its marker could not be removed");
                }
                return;
            }
            let _ = lives.recv_timeout(AGAIN);
        }
    });
    Releasing { agent_lives: agent_lives.then_some(sender), thread }
}
