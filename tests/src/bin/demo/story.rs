//! Everything that was seen, as `report.json` holds it. Every value is read from what ran; nothing here computes more
//! than a difference or a quotient of such values.

use crate::host::Host;
use rig::LogLine;
use serde::Serialize;
use serde_json::Value;

#[derive(Clone, Debug, Serialize)]
pub struct Story {
    pub unharmed: bool,
    pub checks: Vec<Check>,
    pub points: Vec<Point>,
    pub failover: Failover,
    /// What operators do: the second act, with a group.
    pub story: Vec<Act>,
    pub events: Vec<Event>,
    pub console: Consoles,
    pub guest: GuestFacts,
    pub protection: Protection,
    pub site: SiteFacts,
    pub link: LinkFacts,
    pub host: Host,
}

/// What one operator's command came to. Of several guests the worst counts.
#[derive(Clone, Debug, Serialize)]
pub struct Act {
    pub kind: &'static str,
    /// From the command until all replicas were up, by the product's own report.
    pub rto_s: f64,
    /// What was lost at the most; of a drill, what would have been.
    pub rpo_s: f64,
    pub same_boot_id: bool,
    pub memory_errors: u64,
    pub disk_errors: u64,
}

impl Act {
    pub fn is_unharmed(&self) -> bool {
        self.same_boot_id && self.memory_errors + self.disk_errors == 0
    }
}

/// One thing that must hold for the guest to have gone on unharmed.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub what: &'static str,
    pub holds: bool,
    pub found: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Event {
    pub at_s: f64,
    pub what: String,
}

/// The guest's own words.
#[derive(Clone, Debug, Serialize)]
pub struct Consoles {
    pub last_before: Vec<String>,
    pub first_after: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct GuestFacts {
    pub name: String,
    pub memory_mib: u64,
    pub disks: Vec<String>,
    pub boot_id: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Protection {
    pub interval_ms: u64,
    pub memory_engine: String,
    pub agent_rss_kib: u64,
    pub agent_peak_rss_kib: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct SiteFacts {
    pub controller_rss_kib: u64,
    pub controller_peak_rss_kib: u64,
    pub stored_bytes: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct LinkFacts {
    pub rate_mbit: u64,
    /// All that went from A to B until the power cut: points, their overhead, and enrolling.
    pub a_to_b_bytes: u64,
}

/// One recovery point. Times are milliseconds since 1970 UTC.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    pub seq: u64,
    pub id: String,
    pub cut_at: u64,
    pub committed_at: u64,
    /// From the cut until the site had it on stable storage, by the site's log.
    pub cut_to_durable_ms: Option<u64>,
    /// From the cut until the agent knew that, by the agent's log; the last point's may have been lost with its site.
    pub cut_to_acknowledged_ms: Option<u64>,
    pub pause_ms: f64,
    pub memory_changed_bytes: u64,
    pub disk_changed_bytes: u64,
    pub wire_bytes: u64,
    pub stored_bytes: u64,
}

impl Point {
    /// One element of `lifeboat points --json`, and what both daemons' logs say of it.
    pub fn read(point: &Value, agent_log: &str, site_log: &str) -> Self {
        let number = |key: &str| point[key].as_u64().unwrap_or_default();
        let id = point["point"].as_str().unwrap_or_default().to_owned();
        let line = |log, what| LogLine::saying(log, what).find(|line| line.value("point") == Some(&id));
        let cut_at = number("cut_at");
        Self {
            seq: number("seq"),
            cut_at,
            committed_at: number("committed_at"),
            cut_to_durable_ms: line(site_log, "point committed")
                .and_then(LogLine::at)
                .map(|at| at.saturating_sub(cut_at)),
            cut_to_acknowledged_ms: line(agent_log, "point is durable")
                .and_then(|line| line.number("latency_ms")),
            pause_ms: number("pause_us") as f64 / 1e3,
            memory_changed_bytes: number("memory_changed_bytes"),
            disk_changed_bytes: number("disk_changed_bytes"),
            wire_bytes: number("wire_bytes"),
            stored_bytes: number("stored_bytes"),
            id,
        }
    }

    pub fn changed_bytes(&self) -> u64 {
        self.memory_changed_bytes + self.disk_changed_bytes
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Failover {
    pub kind: String,
    pub point: String,
    pub seq: u64,
    /// From the instant of the point to the power cut: what was lost.
    pub rpo_s: f64,
    /// From the failover command to the replica's first word.
    pub rto_s: f64,
    /// From the failover command until libvirt said that the replica runs.
    pub running_after_s: f64,
    pub resumed: bool,
    pub same_boot_id: bool,
    /// The last tick seen at A.
    pub counter_before: u64,
    /// The first tick seen at B: goes on from the point, so it is lower by what was lost.
    pub counter_after: u64,
    /// The last tick seen at A when the point was cut.
    pub counter_at_cut: u64,
    /// The last tick seen at B, when everything had been checked.
    pub counter_at_end: u64,
    pub memory_errors: u64,
    pub disk_errors: u64,
    pub steps: Vec<Step>,
    pub restored_bytes: Option<u64>,
    pub restore_ms: Option<u64>,
    pub restore_mb_per_s: Option<f64>,
}

/// A step of the failover, when it began, counted from the command.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub at_ms: u64,
    pub what: String,
}

impl Step {
    pub fn read(site_log: &str, command_ms: u64) -> Vec<Self> {
        let step = |line: LogLine<'_>| {
            Some(Self { at_ms: line.at()?.saturating_sub(command_ms), what: line.rest("step")?.to_owned() })
        };
        LogLine::saying(site_log, " failover step=").filter_map(step).collect()
    }
}
