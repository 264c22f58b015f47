//! Places at which the tests kill or freeze a daemon. Compiled to nothing unless feature `fault-injection` is on,
//! which no package has. `LIFEBOAT_KILL_AT=name` (or `name:N` for the N-th pass) ends the process there by SIGKILL;
//! `LIFEBOAT_STOP_AT` freezes it by SIGSTOP. Either takes a list (`a:2,b,a:5`), and says on stderr where it strikes.
//! Called wherever an interrupted step must be shown to be harmless.

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
    use nix::sys::signal::{Signal, raise};
    use std::sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    #[derive(Clone)]
    struct Trap {
        name: String,
        pass: u64,
        passed: Arc<AtomicU64>,
        signal: Signal,
    }

    static TRAPS: LazyLock<Vec<Trap>> = LazyLock::new(|| {
        let read = |variable: &str, signal| -> Vec<Trap> {
            let text = std::env::var(variable).unwrap_or_default();
            text.split(',').filter_map(|place| parse(place, signal)).collect()
        };
        [read("LIFEBOAT_KILL_AT", Signal::SIGKILL), read("LIFEBOAT_STOP_AT", Signal::SIGSTOP)].concat()
    });

    fn parse(place: &str, signal: Signal) -> Option<Trap> {
        let (name, pass) = match place.rsplit_once(':') {
            Some((name, pass)) => (name.to_owned(), pass.parse().ok()?),
            None => (place.to_owned(), 1),
        };
        Some(Trap { name, pass, passed: Arc::default(), signal })
    }

    pub fn pass(name: &str) {
        // Each trap counts for itself, and all of them before any strikes: no pass may go uncounted.
        let counted = |trap: &&Trap| trap.passed.fetch_add(1, Ordering::SeqCst) + 1 == trap.pass;
        let struck: Vec<&Trap> = TRAPS.iter().filter(|trap| trap.name == name).filter(counted).collect();
        for trap in struck {
            eprintln!("fault: {} at {name}, pass {}", trap.signal, trap.pass);
            // Sent to this thread: of a signal to the process another thread may take note, and this one run on.
            let _ = raise(trap.signal);
        }
    }
}
