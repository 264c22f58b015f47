//! How long a guest stood still, by three witnesses at once: QEMU's own record of its stops (the times in its STOP and
//! RESUME events), the lines that the guest writes on its console, and a thread that only sleeps and so tells how long the
//! machine itself kept everybody waiting. What the machine did is not held against the product. Called by the tests.

use std::{
    fmt,
    fs::File,
    io::{Read, Seek, SeekFrom},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};

use crate::guest::Guest;
use crate::proc::Proc;

/// Watches one guest from when it is made.
pub struct Stillness {
    events: Proc,
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Between two lines on the console, and when it ended, since 1970.
    silence: Duration,
    silent_until: Duration,
    lines: u64,
    /// By which a sleeper was woken too late.
    lateness: Duration,
}

/// What was seen so far.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Whole pauses, from QEMU's STOP to its RESUME, longest first.
    pub pauses: Vec<Duration>,
    /// The longest silence on the guest's console, how long of it QEMU had the guest stopped, and how many lines came.
    pub silence: Duration,
    pub stopped_in_silence: Duration,
    pub lines: u64,
    /// The longest that the machine kept a thread waiting that had nothing to do but to look at the clock.
    pub lateness: Duration,
}

impl Stillness {
    pub fn watch(guest: &Guest) -> Result<Self> {
        let site = guest.site();
        let virsh = ["virsh", "-q", "-c", "qemu:///system", "qemu-monitor-event", guest.name(), "--loop"];
        // Line by line, so that what was said is in the log when it is read.
        let events = site.command("stdbuf").arg("-oL").args(virsh).named("stops").spawn()?;
        let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let mut console = File::open(guest.console().path()).context("opening the guest's console")?;
        console.seek(SeekFrom::End(0)).context("the console's end")?;
        let listen = {
            let (over, seen) = (over.clone(), seen.clone());
            move || listen(&mut console, &over, &seen)
        };
        let doze = {
            let (over, seen) = (over.clone(), seen.clone());
            move || doze(&over, &seen)
        };
        let threads = vec![std::thread::spawn(listen), std::thread::spawn(doze)];
        Ok(Self { events, over, seen, threads })
    }

    /// When QEMU stopped the guest and when it let it go on, since 1970.
    pub fn stops(&self) -> Vec<(Duration, Duration)> {
        stops(&self.events.log())
    }

    pub fn verdict(&self) -> Verdict {
        let seen = *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let stops = stops(&self.events.log());
        let (from, until) = (seen.silent_until.saturating_sub(seen.silence), seen.silent_until);
        let overlap =
            |(stop, resume): &(Duration, Duration)| (*resume).min(until).saturating_sub((*stop).max(from));
        let stopped_in_silence = stops.iter().map(overlap).sum();
        let mut pauses: Vec<Duration> =
            stops.iter().map(|(stop, resume)| resume.saturating_sub(*stop)).collect();
        pauses.sort_unstable_by(|a, b| b.cmp(a));
        let Seen { silence, lines, lateness, .. } = seen;
        Verdict { pauses, silence, stopped_in_silence, lines, lateness }
    }
}

impl Drop for Stillness {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // They look at the flag many times a second, and have nothing to tell.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pauses, longest {:?}; longest silence {:?} (stopped for {:?} of it) in {} lines; the machine itself was \
             late by {:?}",
            self.pauses.len(),
            self.pauses.iter().take(5).collect::<Vec<_>>(),
            self.silence,
            self.stopped_in_silence,
            self.lines,
            self.lateness
        )
    }
}

fn listen(console: &mut File, over: &AtomicBool, seen: &Mutex<Seen>) {
    let (mut last, mut text) = (None::<Instant>, Vec::new());
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(POLL);
        text.clear();
        if console.read_to_end(&mut text).is_err() {
            continue;
        }
        let lines = text.iter().filter(|byte| **byte == b'\n').count() as u64;
        if lines == 0 {
            continue;
        }
        let now = Instant::now();
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.lines += lines;
        if let Some(last) = last.replace(now)
            && now - last > seen.silence
        {
            seen.silence = now - last;
            seen.silent_until = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        }
    }
}

fn doze(over: &AtomicBool, seen: &Mutex<Seen>) {
    while !over.load(Ordering::SeqCst) {
        let asleep = Instant::now();
        std::thread::sleep(POLL);
        let late = asleep.elapsed().saturating_sub(POLL);
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.lateness = seen.lateness.max(late);
    }
}

/// Pairs STOP with the next RESUME. Lines: `event STOP at 1700000000.123456 for domain 'web': <null>`.
fn stops(log: &str) -> Vec<(Duration, Duration)> {
    let (mut stopped, mut pauses) = (None, Vec::new());
    for line in log.lines() {
        let mut words = line.split_whitespace().skip_while(|word| *word != "event").skip(1);
        let (Some(event), Some("at"), Some(at)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let Some((seconds, micros)) = at.split_once('.') else { continue };
        let (Ok(seconds), Ok(micros)) = (seconds.parse(), micros.parse()) else { continue };
        let at = Duration::from_secs(seconds) + Duration::from_micros(micros);
        match event {
            "STOP" => stopped = Some(at),
            "RESUME" => pauses.extend(stopped.take().map(|stopped| (stopped, at))),
            _ => {}
        }
    }
    pauses
}

const POLL: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_from_a_stop_to_the_next_resume() {
        let log = "event STOP at 100.900000 for domain 'web': <null>\n\
                   event JOB_STATUS_CHANGE at 101.000000 for domain 'web': {}\n\
                   event RESUME at 101.100500 for domain 'web': <null>\n\
                   event RESUME at 102.000000 for domain 'web': <null>\ntorn\n";
        let at = Duration::from_micros;
        assert_eq!(stops(log), [(at(100_900_000), at(101_100_500))]);
    }
}
