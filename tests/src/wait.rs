//! Waiting without guessing: poll until it is so, or say what was missing when the time was up.
//! On a machine that is slower than those the times were chosen for, `LIFEBOAT_RIG_PATIENCE` multiplies them all.
//! Called by everything in the rig and by the tests.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Polls until `poll` yields a value. `Ok(None)` means not yet; an error ends the waiting at once.
pub fn eventually<T>(within: Duration, what: &str, mut poll: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let within = within * patience();
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = poll()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {within:?}");
        }
        sleep(PAUSE * patience()); // asking costs such a machine as much more
    }
}

/// How many times as long as its author thought anything may take: a whole number, 1 unless said.
pub fn patience() -> u32 {
    let said = std::env::var("LIFEBOAT_RIG_PATIENCE").ok();
    said.and_then(|times| times.parse().ok()).filter(|times| (1..=1000).contains(times)).unwrap_or(1)
}

/// The last `lines` lines of a file, for messages; says so when the file cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = match std::fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => return format!("--- {}: {error}\n", path.display()),
    };
    let all: Vec<&str> = text.lines().collect();
    let last = all[all.len().saturating_sub(lines)..].join("\n");
    format!("--- end of {}\n{last}\n", path.display())
}

const PAUSE: Duration = Duration::from_millis(20);
