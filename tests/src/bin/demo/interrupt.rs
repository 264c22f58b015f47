//! Ctrl-C: both sites lose power, what was made is removed, and nothing is left behind.
//! Called by `play` once there is a rig; `main` asks before it speaks, so that an interrupted demo says one thing only.

use rig::Rig;
use std::{
    process::exit,
    sync::{
        Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};
use tokio::signal::unix::{SignalKind, signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP take the rig down first.
pub fn takes_down(rig: Weak<Rig>) {
    thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        if runtime.block_on(signalled()).is_err() {
            return; // signals do what they always did: the rig's sites end with this process
        }
        INTERRUPTED.store(true, Ordering::SeqCst);
        eprintln!("demo: interrupted; taking the rig down");
        if let Some(rig) = rig.upgrade() {
            rig.end();
        }
        exit(INTERRUPTED_CODE);
    });
}

/// Does not return once the demo was interrupted: the thread that takes the rig down ends the process.
pub fn wait_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}

async fn signalled() -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

/// As shells count it: 128 + SIGINT.
const INTERRUPTED_CODE: i32 = 130;
