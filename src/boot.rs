//! The host's boot: which one this is, and how long ago it was.
//! Promises: the time goes on while the host sleeps, and is that of `/proc/uptime`, which libvirt's hook goes by. Called by the
//! agent, for whatever must not outlive a boot, or ends after a time.

use nix::time::{ClockId, clock_gettime};
use std::{fs, io, time::Duration};

/// Another one after each start of the kernel.
pub fn id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Time since the host was started, the time that it slept included. A clock that can't be read stands at the end of all
/// deadlines.
pub fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::MAX, Duration::from)
}

/// The same, in milliseconds.
pub fn uptime_ms() -> u64 {
    u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_that_of_proc_uptime() {
        let text = fs::read_to_string("/proc/uptime").unwrap();
        let proc: f64 = text.split_whitespace().next().unwrap().parse().unwrap();
        let (before, now) = (Duration::from_secs_f64((proc - 0.011).max(0.0)), uptime());
        assert!(now >= before && now.abs_diff(before) < Duration::from_secs(60), "{now:?} {proc}");
        assert!(uptime_ms() >= u64::try_from(now.as_millis()).unwrap() && id().unwrap().len() == 36);
    }
}
