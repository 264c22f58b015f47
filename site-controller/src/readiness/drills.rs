//! What the last drill says of a failover. Pure: records in, a finding out. Called by `judge`.

use super::{Finding, Weight, rules::seconds};
use crate::drill::{DrillRecord, DrillState};
use lifeboat::units::{Span, UnixMs};
use std::time::Duration;

/// What there is to go by.
pub struct Tried<'a> {
    /// The group's, or the VM's, oldest first.
    pub drills: &'a [DrillRecord],
    /// As its group's `every` has it.
    pub every: Option<&'a str>,
    /// Since when that holds, at the latest.
    pub since: UnixMs,
    pub now: UnixMs,
}

/// One that failed, or that is overdue, degrades; any other is worth knowing.
pub fn finding(name: &str, tried: &Tried) -> Finding {
    let under_way = tried.drills.iter().any(|drill| drill.state == DrillState::Running);
    let last = tried.drills.iter().rfind(|drill| drill.state != DrillState::Running);
    let begun = tried.drills.iter().map(|drill| drill.started_at).max().unwrap_or(tried.since);
    let age = |at: UnixMs| seconds(tried.now.since(at));
    if let Some(last) = last.filter(|last| failed(last)) {
        let why = why(last);
        let what = format!(
            "its last drill, {} ago, did NOT pass: {why}; mend that and run `lifeboat drill {name}`",
            age(last.started_at)
        );
        return Finding::new(Weight::Degrades, "drill-failed", None, what);
    }
    let late = tried.every.and_then(overdue_after).filter(|allowed| tried.now.since(begun) > *allowed);
    if let Some(every) = tried.every.filter(|_| late.is_some() && !under_way) {
        let what = format!(
            "no drill has begun for {}, and one should every {every}; run `lifeboat drill {name}`, which says what is in its way",
            age(begun)
        );
        return Finding::new(Weight::Degrades, "drill-overdue", None, what);
    }
    let what = match last {
        None => format!("no drill of it was ever run; `lifeboat drill {name}` tries a failover out"),
        Some(last) if last.state == DrillState::Interrupted => {
            format!("its last drill, {} ago, was interrupted: the controller ended", age(last.started_at))
        }
        Some(last) => {
            let rto = last.rto_ms.map_or_else(String::new, |ms| {
                format!("; all were up after {}", seconds(Duration::from_millis(ms)))
            });
            format!("its last drill, {} ago, passed{rto}", age(last.started_at))
        }
    };
    Finding::new(Weight::Note, "drill", None, what)
}

fn failed(drill: &DrillRecord) -> bool {
    !drill.passed && matches!(drill.state, DrillState::Kept | DrillState::Done)
}

fn why(drill: &DrillRecord) -> String {
    let failed = drill.checks.iter().find_map(|check| {
        let why = check.failed.as_ref()?;
        Some(format!("check {}: {why}", check.command.join(" ")))
    });
    drill.errors.first().cloned().or(failed).unwrap_or_else(|| "see `lifeboat drills`".into())
}

/// Later than this somebody should look. One that is tied to an hour may have to wait for the next day's.
fn overdue_after(every: &str) -> Option<Duration> {
    let (span, grace) = match every.split_once(" at ") {
        Some((span, _)) => (span, Some(Duration::from_secs(26 * 3600))),
        None => (every, None),
    };
    let span = span.trim().parse::<Span>().ok()?.0;
    Some(span.saturating_add(grace.unwrap_or((span / 4).max(GRACE_MIN))))
}

const GRACE_MIN: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat::id::GroupId;

    const DAY_MS: u64 = 86_400_000;

    fn drill(day: u64, state: DrillState, passed: bool) -> DrillRecord {
        DrillRecord {
            version: DrillRecord::VERSION,
            id: day.to_string(),
            name: "shop".into(),
            group: GroupId::from_bytes([1; 16]),
            scheduled: true,
            state,
            passed,
            step: String::new(),
            members: Vec::new(),
            network: None,
            dir: "/x".into(),
            cut_at: UnixMs(0),
            started_at: UnixMs(day * DAY_MS),
            up_at: None,
            ended_at: None,
            rpo_ms: 0,
            rto_ms: Some(4200),
            checks: Vec::new(),
            notes: Vec::new(),
            errors: if passed { Vec::new() } else { vec!["web: it did not come up".into()] },
            torn_down: true,
        }
    }

    fn of(drills: &[DrillRecord], every: Option<&str>, day: u64) -> (Weight, String, String) {
        let now = UnixMs(day * DAY_MS);
        let found = finding("shop", &Tried { drills, every, since: UnixMs(DAY_MS), now });
        (found.weight, found.code, found.what)
    }

    #[test]
    fn a_drill_that_failed_degrades_until_one_passes_and_others_are_worth_knowing() {
        use DrillState::{Done, Interrupted, Running};
        let (weight, code, what) = of(&[], None, 9);
        assert_eq!((weight, code.as_str()), (Weight::Note, "drill"));
        assert!(what.contains("ever") && what.contains("lifeboat drill shop"), "{what}");

        let mut drills = vec![drill(2, Done, false)];
        let (weight, code, what) = of(&drills, None, 9);
        assert_eq!((weight, code.as_str()), (Weight::Degrades, "drill-failed"));
        assert!(what.contains("did not come up") && what.contains("168 h"), "{what}");
        drills.push(drill(3, Running, false));
        assert_eq!(of(&drills, None, 9).1, "drill-failed", "it may fail again");
        drills[1] = drill(3, Interrupted, false);
        assert!(of(&drills, None, 9).0 == Weight::Note && of(&drills, None, 9).2.contains("interrupted"));
        drills.push(drill(4, Done, true));
        assert!(of(&drills, None, 9).0 == Weight::Note && of(&drills, None, 9).2.contains("passed"));
        drills[2].checks.push(crate::drill::record::Check {
            command: vec!["curl".into(), "shop".into()],
            failed: Some("it ended with 7".into()),
        });
        (drills[2].passed, drills[2].errors) = (false, Vec::new());
        assert!(of(&drills, None, 9).2.contains("check curl shop: it ended with 7"));
    }

    #[test]
    fn a_drill_that_is_overdue_degrades_and_one_that_is_under_way_does_not() {
        let drills = [drill(2, DrillState::Done, true)];
        assert_eq!(of(&drills, Some("7d"), 10).1, "drill", "a little late is how things go");
        assert_eq!(of(&drills, Some("7d"), 11).1, "drill-overdue");
        assert_eq!(of(&drills, Some("7d at 03:00"), 10).1, "drill");
        assert_eq!(of(&drills, Some("7d at 03:00"), 11).1, "drill-overdue");
        assert_eq!(of(&drills, None, 500).1, "drill", "nobody has asked for one");
        assert_eq!(of(&[], Some("2d"), 3).1, "drill");
        assert_eq!(of(&[], Some("2d"), 4).1, "drill-overdue");
        let under_way = [drills[0].clone(), drill(11, DrillState::Running, false)];
        assert_eq!(of(&under_way, Some("7d"), 30).1, "drill");
    }
}
