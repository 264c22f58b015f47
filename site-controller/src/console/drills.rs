//! Drills, as text for people. Pure: values in, text out.

use super::text::{span, table};
use crate::drill::{DrillRecord, DrillState};
use std::fmt::Write;

pub fn list(all: &[DrillRecord]) -> String {
    if all.is_empty() {
        return "There was no drill yet; `lifeboat drill NAME` runs one.\n".into();
    }
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|record| {
            vec![
                record.id.clone(),
                record.name.clone(),
                record.started_at.to_string(),
                verdict(record.state, record.passed).into(),
                span(record.rpo_ms),
                record.rto_ms.map_or_else(|| "-".into(), span),
                record.errors.first().cloned().unwrap_or_default(),
            ]
        })
        .collect();
    table(&["DRILL", "OF", "BEGUN", "RESULT", "RPO", "RTO", "ERROR"], &rows)
}

pub fn one(record: &DrillRecord) -> String {
    let mut out =
        format!("Drill {} of {}: {}.", record.id, record.name, verdict(record.state, record.passed));
    let rto = record.rto_ms.map_or_else(|| "not all came up".into(), |ms| format!("up after {}", span(ms)));
    let _ = writeln!(out, " Its point was {} old; {rto}.", span(record.rpo_ms));
    for member in &record.members {
        let how = if member.resumes { "resumed" } else { "booted" };
        let ran =
            member.running_ms.map_or_else(|| "not started".into(), |ms| format!("{how} after {}", span(ms)));
        let _ = writeln!(
            out,
            "  {} as {}{}: {ran}, from point {}",
            member.name,
            member.as_name,
            member.host_name().map_or_else(String::new, |host| format!(" at host {host}")),
            member.point.short()
        );
        for step in member.addresses.iter().chain(&member.after_resume) {
            let _ = writeln!(out, "    {step}");
        }
    }
    for check in &record.checks {
        let failed = check.failed.as_ref().map_or_else(|| "well".into(), |why| format!("FAILED: {why}"));
        let _ = writeln!(out, "  check {}: {failed}", check.command.join(" "));
    }
    for note in &record.notes {
        let _ = writeln!(out, "  {note}");
    }
    for error in &record.errors {
        let _ = writeln!(out, "ERROR: {error}");
    }
    if record.state == DrillState::Kept {
        let _ = writeln!(out, "Its replicas run on; `lifeboat drill {} --end` removes them.", record.name);
    }
    out
}

pub fn verdict(state: DrillState, passed: bool) -> &'static str {
    match (state, passed) {
        (DrillState::Running, _) => "under way",
        (DrillState::Interrupted, _) => "interrupted",
        (DrillState::Kept | DrillState::Done, true) => "passed",
        (DrillState::Kept | DrillState::Done, false) => "NOT PASSED",
    }
}
