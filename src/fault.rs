//! Places at which the tests kill or freeze a daemon. Compiled to nothing unless feature `fault-injection` is on,
//! which no package has. `LIFEBOAT_KILL_AT=name` (or `name:N` for the N-th pass) ends the process there by SIGKILL;
//! `LIFEBOAT_STOP_AT` freezes it by SIGSTOP. Called wherever an interrupted step must be shown to be harmless.

/// The environment variables that choose places; a daemon keeps them from the processes it starts.
#[cfg(not(feature = "fault-injection"))]
pub const VARIABLES: &[&str] = &[];
/// The environment variables that choose places; a daemon keeps them from the processes it starts.
#[cfg(feature = "fault-injection")]
pub const VARIABLES: &[&str] = &["LIFEBOAT_KILL_AT", "LIFEBOAT_STOP_AT"];

/// Passes a named place.
#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub fn point(_name: &str) {}

/// Passes a named place; never returns if the tests chose it.
#[cfg(feature = "fault-injection")]
pub fn point(name: &str) {
    armed::pass(name);
}

#[cfg(feature = "fault-injection")]
mod armed {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::getpid,
    };
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    struct Trap {
        name: String,
        pass: u64,
        passed: AtomicU64,
        signal: Signal,
    }

    static TRAPS: LazyLock<Vec<Trap>> = LazyLock::new(|| {
        let read = |variable: &str, signal| {
            let text = std::env::var(variable).ok()?;
            let (name, pass) = match text.rsplit_once(':') {
                Some((name, pass)) => (name.to_owned(), pass.parse().ok()?),
                None => (text, 1),
            };
            Some(Trap { name, pass, passed: AtomicU64::new(0), signal })
        };
        [read("LIFEBOAT_KILL_AT", Signal::SIGKILL), read("LIFEBOAT_STOP_AT", Signal::SIGSTOP)]
            .into_iter()
            .flatten()
            .collect()
    });

    pub fn pass(name: &str) {
        for trap in TRAPS.iter().filter(|trap| trap.name == name) {
            if trap.passed.fetch_add(1, Ordering::SeqCst) + 1 == trap.pass {
                let _ = kill(getpid(), trap.signal);
            }
        }
    }
}
