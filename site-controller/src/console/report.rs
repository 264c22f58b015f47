//! The report in a few lines. Pure.

use super::text::table;
use crate::{
    readiness::Verdict,
    report::{
        Report,
        history::Outcome,
        html::{span, unknown, within},
    },
};
use std::fmt::Write;

pub fn summary(report: &Report) -> String {
    let mut out = format!("Site {}, from {} to {}\n\n", report.site, report.since, report.made_at);
    if report.subjects.is_empty() {
        return out + "Nothing is protected to this site yet.\n";
    }
    let rows: Vec<Vec<String>> = report
        .subjects
        .iter()
        .map(|subject| {
            let (rpo, none) = (&subject.rpo, || "-".to_owned());
            let passed = subject.drills.iter().filter(|drill| drill.passed).count();
            let ran = subject.failovers.iter().filter(|of| of.outcome == Outcome::Ran).count();
            vec![
                subject.name.clone(),
                if subject.is_group { "group".into() } else { subject.group.clone().unwrap_or_else(none) },
                subject.points.kept.to_string(),
                subject.target_ms.map_or_else(none, span),
                within(rpo),
                rpo.p95_ms.map_or_else(none, span),
                rpo.longest_ms.map_or_else(none, span),
                span(rpo.known_ms),
                format!("{passed} of {}", subject.drills.len()),
                format!("{ran} of {}", subject.failovers.len()),
                subject.readiness.as_ref().map_or_else(none, |of| verdict(of.verdict).into()),
            ]
        })
        .collect();
    let header = [
        "NAME",
        "GROUP",
        "POINTS",
        "RPO",
        "WITHIN",
        "95 %",
        "LONGEST",
        "KNOWN",
        "DRILLS",
        "FAILOVERS",
        "READY",
    ];
    out.push_str(&table(&header, &rows));
    for subject in &report.subjects {
        for of in &subject.rpo.unknown {
            let _ = writeln!(out, "{}: not known: {}", subject.name, unknown(of));
        }
    }
    out.push_str("\n`--out DIR` writes all of it, as a page and as JSON.\n");
    out
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ready => "yes",
        Verdict::Degraded => "degraded",
        Verdict::NotReady => "NO",
    }
}
