//! What a guest says on its serial port, read back.
//! Owns the meaning of the line that `tests/guest/init.rs` prints. A line torn by a power cut is never half
//! believed. Called by `guest` and the tests.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait::{eventually, tail};

/// One tick's testimony.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub tick: u64,
    /// Random, chosen once at boot: the same id means the guest was resumed, not booted.
    pub boot: String,
    pub up: Duration,
    pub mem_errors: u64,
    pub disk_errors: u64,
    pub disks: u64,
    /// Pages given a new content since boot.
    pub dirtied: u64,
    /// Blocks written since boot, all disks.
    pub writes: u64,
    /// How often all of the patterned memory has been checked.
    pub mem_sweeps: u64,
    /// How often every slot of the slowest disk has been checked.
    pub disk_sweeps: u64,
    /// Lines that this boot found on its file system, and the number of the last one that it has written; 0 without one.
    pub found: u64,
    pub lines: u64,
    /// Its clock, milliseconds since 1970.
    pub clock_ms: u64,
}

impl Report {
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = HashMap::new();
        for word in line.split_whitespace() {
            let (key, value) = word.split_once('=')?;
            if fields.insert(key, value).is_some() {
                return None;
            }
        }
        let number = |key: &str| fields.get(key)?.parse::<u64>().ok();
        let tick = number("tick")?;
        (number("end")? == tick && line.starts_with("tick=")).then_some(())?;
        Some(Self {
            tick,
            boot: (*fields.get("boot")?).to_owned(),
            up: Duration::from_millis(number("up")?),
            mem_errors: number("mem_errors")?,
            disk_errors: number("disk_errors")?,
            disks: number("disks")?,
            dirtied: number("dirtied")?,
            writes: number("writes")?,
            mem_sweeps: number("mem_sweeps")?,
            disk_sweeps: number("disk_sweeps")?,
            // What a guest of an older make does not say, it does not have.
            found: number("found").unwrap_or(0),
            lines: number("lines").unwrap_or(0),
            clock_ms: number("clock").unwrap_or(0),
        })
    }

    pub fn unharmed(&self) -> bool {
        self.mem_errors == 0 && self.disk_errors == 0
    }
}

/// A console log on disk.
#[derive(Clone, Debug)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every whole report so far, oldest first; none when the guest has not said anything.
    pub fn reports(&self) -> Vec<Report> {
        let bytes = std::fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        text.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .filter_map(|line| Report::parse(line.trim()))
            .collect()
    }

    pub fn last(&self) -> Option<Report> {
        self.reports().pop()
    }

    /// Whether the guest, or something in it, has said so.
    pub fn has_said(&self, words: &str) -> bool {
        String::from_utf8_lossy(&std::fs::read(&self.path).unwrap_or_default()).contains(words)
    }

    /// What the guest complained about, in its words (`error=memory …`, `error=disk …`).
    pub fn complaints(&self) -> Vec<String> {
        let bytes = std::fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        text.lines().filter(|line| line.starts_with("error=")).map(str::to_owned).collect()
    }

    /// Waits until the newest report satisfies `wanted`, and returns it.
    pub fn wait(&self, within: Duration, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<Report> {
        eventually(within, what, || Ok(self.last().filter(&wanted))).with_context(|| tail(&self.path, 12))
    }
}

#[cfg(test)]
mod tests {
    use super::Report;

    const LINE: &str = "tick=7 boot=00ff up=612 mem_errors=0 disk_errors=2 disks=1 \
        dirtied=448 writes=28 mem_sweeps=3 disk_sweeps=0 found=0 lines=0 clock=17 end=7";

    #[test]
    fn a_whole_line_is_read() {
        let Some(report) = Report::parse(LINE) else { panic!("refused: {LINE}") };
        assert_eq!((report.tick, report.boot.as_str(), report.disk_errors), (7, "00ff", 2));
        assert!(!report.unharmed());
    }

    /// Method: a line cut anywhere, and the start of one line joined to the end of another, as a power cut
    /// leaves them.
    #[test]
    fn a_torn_line_is_not_believed() {
        let other = LINE.replace("=7", "=9");
        for cut in 0..LINE.len() {
            assert_eq!(Report::parse(&LINE[..cut]), None, "cut at {cut}");
            let joined = format!("{}{other}", &LINE[..cut]);
            assert!(
                Report::parse(&joined).is_none_or(|report| cut == 0 && report.tick == 9),
                "joined at {cut}"
            );
        }
    }
}
