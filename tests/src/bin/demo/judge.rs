//! What the failover did, and whether the guest went on unharmed. Pure: what was seen goes in, a judgement comes out.
//! Called by `play`.

use crate::{
    story::{Act, Check, Failover, Point, Step},
    witness::Sighting,
};
use anyhow::{Context, Result};
use rig::{LogLine, Report};
use serde_json::Value;

/// What there was when the power went.
pub struct Lost {
    pub power_cut_ms: u64,
    pub last_words: Vec<Sighting>,
    pub complaints: Vec<String>,
    pub agent_log: String,
    pub carried: u64,
}

/// What the failover brought back.
pub struct Found {
    pub command_ms: u64,
    pub report: Value,
    pub words: Vec<Sighting>,
    pub complaints: Vec<String>,
    /// The guest's testimony once it had checked everything, or why there is none.
    pub checked: Result<Report>,
}

pub fn failover(points: &[Point], lost: &Lost, found: &Found, site_log: &str) -> Result<Failover> {
    let report = &found.report;
    let id = report["point"].as_str().context("the failover report names no point")?;
    let point = points.iter().find(|point| point.id == id);
    let point = point.with_context(|| format!("point {id} was restored and is not in the list"))?;
    let before = &lost.last_words.last().context("the guest at A has said nothing")?.report;
    let first = found.words.first().context("the replica has said nothing")?;
    let last = &found.words.last().context("the replica has said nothing")?.report;
    let running_ms = report["running_at"].as_u64().unwrap_or_default();
    let restored = LogLine::saying(site_log, "disks and memory are restored").last();
    let restored_bytes = restored.and_then(|line| line.number("bytes"));
    let restore_ms = restored.and_then(|line| line.number("ms"));
    let rate = |(bytes, ms): (u64, u64)| bytes as f64 / 1e3 / ms.max(1) as f64;
    Ok(Failover {
        kind: report["kind"].as_str().unwrap_or_default().to_owned(),
        point: id.to_owned(),
        seq: point.seq,
        rpo_s: since(point.cut_at, lost.power_cut_ms),
        rto_s: since(found.command_ms, first.at_ms),
        running_after_s: since(found.command_ms, running_ms),
        resumed: report["resumed"] == true,
        same_boot_id: found.words.iter().all(|seen| seen.report.boot == before.boot),
        counter_before: before.tick,
        counter_after: first.report.tick,
        counter_at_cut: at_cut(&lost.last_words, point),
        counter_at_end: last.tick,
        memory_errors: last.mem_errors,
        disk_errors: last.disk_errors,
        steps: Step::read(site_log, found.command_ms),
        restored_bytes,
        restore_ms,
        restore_mb_per_s: restored_bytes.zip(restore_ms).map(rate),
    })
}

/// The last tick that was seen when the point was cut.
fn at_cut(words: &[Sighting], point: &Point) -> u64 {
    words.iter().rev().find(|seen| seen.at_ms <= point.cut_at).map_or(0, |seen| seen.report.tick)
}

pub fn checks(points: &[Point], failover: &Failover, lost: &Lost, found: &Found) -> Vec<Check> {
    let (boot, errors) = (&failover.same_boot_id, failover.memory_errors + failover.disk_errors);
    let complaints: Vec<&String> = lost.complaints.iter().chain(&found.complaints).collect();
    let full = match &found.checked {
        Ok(report) => format!("by tick {}", report.tick),
        Err(error) => format!("{error:#}"),
    };
    let ascending = found.words.windows(2).all(|two| two[0].report.tick < two[1].report.tick);
    // Seen before the cut: certainly part of the point. Seen well after it: certainly not.
    let later = points.iter().find(|point| point.id == failover.point).map_or(0, |point| {
        let resumed = point.cut_at + point.pause_ms as u64 + LATE_WITNESS_MS;
        let after = lost.last_words.iter().find(|seen| seen.at_ms >= resumed);
        after.or(lost.last_words.last()).map_or(0, |seen| seen.report.tick)
    });
    let (first, cut) = (failover.counter_after, failover.counter_at_cut);
    vec![
        Check {
            what: "resumed, not booted: the same boot id",
            holds: *boot && failover.resumed,
            found: found.words.first().map_or_else(String::new, |seen| seen.report.boot.clone()),
        },
        Check {
            what: "goes on from the point's instant",
            holds: first > cut && first <= later + 2,
            found: format!("first tick {first}; tick {cut} had been seen when the point was cut"),
        },
        Check {
            what: "its counter goes on",
            holds: ascending && failover.counter_at_end > first,
            found: format!("ticks {first} to {}", failover.counter_at_end),
        },
        Check { what: "all memory and disks checked since", holds: found.checked.is_ok(), found: full },
        Check {
            what: "no error in memory or on disks",
            holds: errors == 0 && complaints.is_empty(),
            found: complaints.first().map_or_else(|| format!("{errors} errors"), |line| (*line).clone()),
        },
        Check {
            what: "at least 5 points while it worked",
            holds: points.len() >= 5,
            found: points.len().to_string(),
        },
    ]
}

/// The second act.
pub fn group(story: &[Act]) -> Check {
    let harmed: Vec<&str> = story.iter().filter(|act| !act.is_unharmed()).map(|act| act.kind).collect();
    let kinds: Vec<&str> = story.iter().map(|act| act.kind).collect();
    Check {
        what: "a group of two was drilled, moved, brought home and saved, unharmed",
        holds: harmed.is_empty() && kinds == ["drill", "planned", "failback", "emergency"],
        found: if harmed.is_empty() { kinds.join(", ") } else { format!("harmed: {}", harmed.join(", ")) },
    }
}

/// Seconds from one time in milliseconds to another.
pub fn since(from_ms: u64, to_ms: u64) -> f64 {
    (to_ms as f64 - from_ms as f64) / 1e3
}

/// A line is seen later than this after it was written only if the machine is overloaded beyond sense.
const LATE_WITNESS_MS: u64 = 1000;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(ticks: std::ops::RangeInclusive<u64>, from_ms: u64, boot: &str) -> Vec<Sighting> {
        let sighting = |(at, tick)| {
            let line = format!(
                "tick={tick} boot={boot} up=1 mem_errors=0 disk_errors=0 disks=2 dirtied=1 writes=1 mem_sweeps=9 \
                 disk_sweeps=9 end={tick}"
            );
            let report = Report::parse(&line).expect("a whole line");
            Sighting { at_ms: from_ms + 100 * at as u64, line, report }
        };
        ticks.enumerate().map(sighting).collect()
    }

    /// Ticks 1 to 30 at A, one each 100 ms; the fifth point is cut at 2 s, just after tick 21.
    fn judged(replica: Vec<Sighting>, complaints: &[&str]) -> Vec<Check> {
        let point = |seq: u64| {
            Point::read(&json!({"point": format!("p{seq}"), "seq": seq, "cut_at": 400 * seq}), "", "")
        };
        let points: Vec<Point> = (1..=5).map(point).collect();
        let lost = Lost {
            power_cut_ms: 2_950,
            last_words: words(1..=30, 0, "aa"),
            complaints: Vec::new(),
            agent_log: String::new(),
            carried: 0,
        };
        let found = Found {
            command_ms: 3_000,
            report: json!({"point": "p5", "kind": "emergency", "resumed": true, "running_at": 3_500}),
            complaints: complaints.iter().map(|&line| line.to_owned()).collect(),
            checked: Ok(replica[replica.len() - 1].report.clone()),
            words: replica,
        };
        let failover = failover(&points, &lost, &found, "").expect("the point is in the list");
        assert_eq!((failover.rpo_s, failover.counter_before, failover.counter_at_cut), (0.95, 30, 21));
        checks(&points, &failover, &lost, &found)
    }

    fn broken(checks: &[Check]) -> Vec<&str> {
        checks.iter().filter(|check| !check.holds).map(|check| check.what).collect()
    }

    #[test]
    fn a_guest_that_goes_on_from_its_point_is_unharmed() {
        assert_eq!(broken(&judged(words(22..=60, 3_600, "aa"), &[])), Vec::<&str>::new());
    }

    /// Goal: whatever may be wrong with a replica is seen. Method: each fault alone.
    #[test]
    fn a_guest_that_booted_went_back_stands_still_or_complains_is_not() {
        let boot = broken(&judged(words(22..=60, 3_600, "bb"), &[])).join(" ");
        assert!(boot.contains("boot id"), "{boot}");
        for ticks in [1..=60, 21..=60, 33..=60] {
            let found = broken(&judged(words(ticks.clone(), 3_600, "aa"), &[])).join(" ");
            assert!(found.contains("instant"), "{ticks:?}: {found}");
        }
        let still = broken(&judged(words(22..=22, 3_600, "aa"), &[])).join(" ");
        assert!(still.contains("counter"), "{still}");
        let ill = broken(&judged(words(22..=60, 3_600, "aa"), &["error=disk disk=0"])).join(" ");
        assert!(ill.contains("no error"), "{ill}");
    }

    #[test]
    fn a_group_is_unharmed_only_if_every_act_was_played_and_harmed_nobody() {
        let act =
            |kind| Act { kind, rto_s: 1.0, rpo_s: 0.0, same_boot_id: true, memory_errors: 0, disk_errors: 0 };
        let all = ["drill", "planned", "failback", "emergency"].map(act);
        assert!(group(&all).holds);
        assert!(!group(&all[..3]).holds);
        let mut booted = all.clone();
        booted[1].same_boot_id = false;
        let mut ill = all;
        ill[3].disk_errors = 1;
        assert!(group(&booted).found.contains("planned") && group(&ill).found.contains("emergency"));
    }
}
