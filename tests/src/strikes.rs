//! A command that is given until it is done, while a daemon freezes itself at its steps: at each, something is done to the rig
//! before the daemon goes on. Promises that no daemon is left frozen, and no command hanging on one. Called by the
//! end-to-end tests.

use crate::{Output, Proc, eventually, is_frozen};
use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

/// What makes a daemon freeze itself at each of `places`, each once.
pub fn frozen_at<S: AsRef<str>>(places: &[S]) -> Vec<(String, String)> {
    let places: Vec<&str> = places.iter().map(S::as_ref).collect();
    vec![("LIFEBOAT_STOP_AT".into(), places.join(","))]
}

/// One that was told to.
#[derive(Clone)]
pub struct Freezing {
    pid: Pid,
    /// What started it stops with it, and has it go on when it is told to go on itself.
    outer: Pid,
    log: PathBuf,
}

impl Freezing {
    pub fn daemon(process: &mut Proc) -> Result<Self> {
        let (pid, outer) = (process.pid_in_host()?, process.outer()?);
        Ok(Self { pid, outer, log: process.log_path().to_owned() })
    }

    /// The place at which it stands, if it does.
    pub fn place(&self) -> Result<Option<String>> {
        let frozen = is_frozen(self.pid)? && is_frozen(self.outer)?;
        if frozen { last_place(&self.log).map(Some) } else { Ok(None) }
    }

    pub fn go_on(&self) -> Result<()> {
        Ok(kill(self.outer, Signal::SIGCONT)?)
    }
}

/// It says where before it freezes.
fn last_place(log: &Path) -> Result<String> {
    let said = fs::read_to_string(log)?;
    let last = said.lines().rev().find_map(|line| line.strip_prefix("fault: SIGSTOP at ")?.split(',').next());
    last.map(str::to_owned).with_context(|| format!("{} does not say where it stands", log.display()))
}

/// Gives `command` until it succeeds. `look` is called again and again meanwhile, and `strike` whenever the daemon has frozen
/// itself, with the place. These places, in order.
pub fn until_done(
    within: Duration,
    daemon: &Freezing,
    command: impl Fn() -> Result<Output> + Sync,
    mut look: impl FnMut() -> Result<()>,
    mut strike: impl FnMut(&str) -> Result<()>,
) -> Result<Vec<String>> {
    let given_up = AtomicBool::new(false);
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            eventually(within, "the command to be done", || {
                ensure!(!given_up.load(Ordering::Relaxed), "what was to be seen was not");
                let answer = command()?;
                eprintln!("{:?} {}", answer.status.code(), answer.stderr.trim());
                Ok(answer.status.success().then_some(()))
            })
        });
        let mut struck = Vec::new();
        let mut watch = || -> Result<()> {
            while !asked.is_finished() {
                look()?;
                if let Some(place) = daemon.place()? {
                    strike(&place).with_context(|| place.clone())?;
                    struck.push(place);
                    daemon.go_on()?;
                }
                thread::sleep(PAUSE);
            }
            Ok(())
        };
        let seen = watch();
        given_up.store(seen.is_err(), Ordering::Relaxed);
        while !asked.is_finished() {
            let _ = daemon.go_on(); // it may have ended: nobody waits for it
            thread::sleep(PAUSE);
        }
        seen?;
        asked.join().map_err(|_| anyhow!("the command's thread"))??;
        Ok(struck)
    })
}

const PAUSE: Duration = Duration::from_millis(20);
