//! Watches a guest's console and notes when each line came. Its clock is the host's, the one that the products' own
//! times are of, so that they can be compared.

use rig::{Console, Report, eventually};
use std::{
    fs::File,
    io::Read,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A line, and when it was seen: at most a few milliseconds after it was written, on an idle machine.
#[derive(Clone, Debug)]
pub struct Sighting {
    pub at_ms: u64,
    pub line: String,
    pub report: Report,
}

pub struct Witness {
    seen: Arc<Mutex<Vec<Sighting>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    /// Begins to watch; the console need not be there yet.
    pub fn of(console: &Console) -> Self {
        let (seen, stop) = (Arc::<Mutex<Vec<Sighting>>>::default(), Arc::<AtomicBool>::default());
        let (path, into, until) = (console.path().to_owned(), seen.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let (mut file, mut pending) = (None, Vec::new());
            while !until.load(Ordering::Relaxed) {
                file = file.or_else(|| File::open(&path).ok());
                if let Some(file) = &mut file {
                    let _ = file.read_to_end(&mut pending); // what could not be read now is read next time
                    take_lines(&mut pending, &into);
                }
                thread::sleep(PERIOD);
            }
        });
        Self { seen, stop, thread: Some(thread) }
    }

    /// Everything seen so far, oldest first.
    pub fn sightings(&self) -> Vec<Sighting> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn wait_first(&self, within: Duration) -> anyhow::Result<Sighting> {
        eventually(within, "the replica's first word", || Ok(self.sightings().first().cloned()))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it only reads; a panic of it has been printed
        }
    }
}

fn take_lines(pending: &mut Vec<u8>, into: &Mutex<Vec<Sighting>>) {
    let Some(end) = pending.iter().rposition(|byte| *byte == b'\n') else { return };
    let rest = pending.split_off(end + 1);
    let whole = std::mem::replace(pending, rest);
    let at_ms = now_ms();
    for line in String::from_utf8_lossy(&whole).lines() {
        if let Some(report) = Report::parse(line.trim()) {
            let line = line.trim().to_owned();
            into.lock().unwrap_or_else(PoisonError::into_inner).push(Sighting { at_ms, line, report });
        }
    }
}

/// Milliseconds since 1970, as the products count.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

const PERIOD: Duration = Duration::from_millis(5);
