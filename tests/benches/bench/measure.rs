//! Stop-watches: wall time, processor time of this process, and percentiles.

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    time::{Duration, Instant},
};

/// What some work took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    pub wall: Duration,
    /// Of all threads of this process.
    pub cpu: Duration,
}

impl Took {
    /// Bytes a second of wall time, in GB.
    pub fn gb_per_s(self, bytes: u64) -> f64 {
        bytes as f64 / 1e9 / self.wall.as_secs_f64().max(1e-9)
    }

    /// Bytes a second of processor time, in GB.
    pub fn gb_per_cpu_s(self, bytes: u64) -> f64 {
        bytes as f64 / 1e9 / self.cpu.as_secs_f64().max(1e-9)
    }
}

/// Runs while [`Watch::stop`] was not called.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    wall: Instant,
    cpu: Duration,
}

impl Watch {
    pub fn start() -> Self {
        Self { wall: Instant::now(), cpu: cpu_time() }
    }

    pub fn stop(self) -> Took {
        Took { wall: self.wall.elapsed(), cpu: cpu_time().saturating_sub(self.cpu) }
    }
}

fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec of ours that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// The value that `share` of all values do not exceed; 0 of none.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).or(sorted.last()).copied().unwrap_or_default()
}

/// Forgets a file's pages, so that reading it reads the disk.
pub fn drop_cache(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// Reads files from start to end, as fast as that goes.
pub fn read_all(paths: &[impl AsRef<Path>]) -> io::Result<u64> {
    let mut buffer = vec![0; 4 << 20];
    let mut total = 0;
    for path in paths {
        let mut file = File::open(path)?;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => total += read as u64,
            }
        }
    }
    Ok(total)
}
