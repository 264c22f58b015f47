//! The report as one page of HTML: no scripts, nothing from elsewhere, made to be printed. Pure.
//! Promises: whatever stands in the report, names of guests and words of their consoles too, is text on the page: only
//! [`Page`] writes, and it escapes all but what is written here.

use super::{
    Report, Subject,
    age::{Unknown, Why},
    history::{Failover, Outcome, What},
    rpo::Attained,
};
use crate::{
    drill::{DrillRecord, DrillState},
    readiness::{Readiness, Verdict, Weight},
};
use lifeboat::units::{ByteSize, UnixMs};

struct Page(String);

impl Page {
    fn escaped(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                '\n' | '\t' => self.0.push(c),
                // What a console may have said is shown, and does nothing.
                c if c.is_control() => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
    }

    fn tag(&mut self, tag: &'static str, text: &str) {
        self.0.push_str(&format!("<{tag}>"));
        self.escaped(text);
        self.0.push_str(&format!("</{tag}>\n"));
    }

    fn list(&mut self, items: impl IntoIterator<Item = String>) {
        self.0.push_str("<ul>\n");
        items.into_iter().for_each(|item| self.tag("li", &item));
        self.0.push_str("</ul>\n");
    }

    /// A table whose first column names the rows.
    fn facts(&mut self, rows: &[(&str, String)]) {
        self.0.push_str("<table class=\"facts\"><tbody>\n");
        for (name, value) in rows {
            self.0.push_str("<tr>");
            self.tag("th", name);
            self.tag("td", value);
            self.0.push_str("</tr>\n");
        }
        self.0.push_str("</tbody></table>\n");
    }

    fn table(&mut self, header: &[&str], rows: &[Vec<String>]) {
        self.0.push_str("<table><thead><tr>");
        header.iter().for_each(|cell| self.tag("th", cell));
        self.0.push_str("</tr></thead><tbody>\n");
        for row in rows {
            self.0.push_str("<tr>");
            row.iter().for_each(|cell| self.tag("td", cell));
            self.0.push_str("</tr>\n");
        }
        self.0.push_str("</tbody></table>\n");
    }
}

pub fn page(report: &Report) -> String {
    let mut page = Page(HEAD.to_owned());
    page.tag("title", &format!("Lifeboat: report of site {}", report.site));
    page.0.push_str("</head><body>\n");
    page.tag("h1", &format!("Disaster recovery report: site {}", report.site));
    page.tag(
        "p",
        &format!(
            "From {} to {}. Made by Lifeboat {}. Times are UTC.",
            report.since, report.made_at, report.release
        ),
    );
    overview(&mut page, report);
    report.subjects.iter().for_each(|subject| of_subject(&mut page, subject));
    page.tag("h2", "What these figures do not say");
    page.list(report.limits.iter().cloned());
    page.0.push_str("</body></html>\n");
    page.0
}

fn overview(page: &mut Page, report: &Report) {
    let rows: Vec<Vec<String>> = report
        .subjects
        .iter()
        .map(|subject| {
            let passed = subject.drills.iter().filter(|drill| drill.passed).count();
            let ran = subject.failovers.iter().filter(|of| of.outcome == Outcome::Ran).count();
            vec![
                subject.name.clone(),
                kind(subject),
                subject.points.kept.to_string(),
                subject.target_ms.map_or_else(|| "none".into(), span),
                within(&subject.rpo),
                format!("{passed} of {}", subject.drills.len()),
                format!("{ran} of {}", subject.failovers.len()),
                subject.readiness.as_ref().map_or_else(|| "see its group".into(), |of| verdict(of).into()),
            ]
        })
        .collect();
    page.tag("h2", "Overview");
    let header = [
        "Name",
        "",
        "Points kept",
        "RPO wanted",
        "Time within it",
        "Drills passed",
        "Failovers that came up",
        "Ready now",
    ];
    page.table(&header, &rows);
}

fn kind(subject: &Subject) -> String {
    match (&subject.group, subject.is_group) {
        (_, true) => format!("group of {}", subject.members.join(", ")),
        (Some(group), false) => format!("VM, in group {group}"),
        (None, false) => "VM".into(),
    }
}

fn of_subject(page: &mut Page, subject: &Subject) {
    page.0.push_str("<section>\n");
    page.tag("h2", &format!("{} ({})", subject.name, kind(subject)));
    if let Some(readiness) = &subject.readiness {
        of_readiness(page, readiness);
    }
    of_points(page, subject);
    of_rpo(page, subject);
    of_drills(page, subject);
    of_failovers(page, &subject.failovers);
    page.0.push_str("</section>\n");
}

fn of_readiness(page: &mut Page, readiness: &Readiness) {
    page.tag("h3", "Ready now?");
    page.tag("p", &format!("{}, looked at {}.", verdict(readiness), readiness.checked_at));
    page.list(readiness.findings.iter().map(|finding| {
        let weight = match finding.weight {
            Weight::Blocks => "blocks",
            Weight::Degrades => "degrades",
            Weight::Note => "note",
        };
        let vm = finding.vm.as_deref().map(|vm| format!("{vm}: ")).unwrap_or_default();
        format!("{weight}: {vm}{} [{}]", finding.what, finding.code)
    }));
}

fn of_points(page: &mut Page, subject: &Subject) {
    let points = &subject.points;
    page.tag("h3", if subject.is_group { "Group points" } else { "Recovery points" });
    let mut rows = vec![
        ("Kept now", points.kept.to_string()),
        ("Of these cut in the time of the report", points.kept_of_period.to_string()),
        ("With memory: the guest goes on where it stood", points.memory.to_string()),
        ("Disks, file systems frozen: the guest boots", points.app.to_string()),
        ("Disks as after a power cut: the guest boots", points.crash.to_string()),
        ("Known to be damaged", points.damaged.to_string()),
        ("Oldest", at(points.oldest)),
        ("Newest", at(points.newest)),
        ("Stored", ByteSize(points.stored_bytes).to_string()),
        ("Longest pause", format!("{} ms", points.longest_pause_us.div_ceil(1000))),
    ];
    if points.seeds > 0 {
        rows.push(("Seeds", points.seeds.to_string()));
    }
    if let Some(skew) = points.worst_skew_us {
        rows.push(("Members stood within", format!("{} ms", skew.div_ceil(1000))));
    }
    page.facts(&rows);
}

fn of_rpo(page: &mut Page, subject: &Subject) {
    let rpo = &subject.rpo;
    page.tag("h3", "RPO attained: the age of the newest durable point");
    let age = |ms: Option<u64>| ms.map_or_else(|| "not known".into(), span);
    page.facts(&[
        ("Wanted: no older than", subject.target_ms.map_or_else(|| "nobody has said".into(), span)),
        ("Time of which it is known", span(rpo.known_ms)),
        ("Of that time within it", within(rpo)),
        ("Not exceeded for 50 % of that time", age(rpo.p50_ms)),
        ("For 95 %", age(rpo.p95_ms)),
        ("For 99 %", age(rpo.p99_ms)),
        ("Longest", age(rpo.longest_ms)),
        ("Times that it was exceeded", rpo.exceeded.to_string()),
    ]);
    if !rpo.unknown.is_empty() {
        page.tag("p", "Not known, and counted neither way:");
        page.list(rpo.unknown.iter().map(unknown));
    }
    if !rpo.worst.is_empty() {
        page.tag("h4", "The longest times without a newer point");
        let rows: Vec<Vec<String>> = rpo
            .worst
            .iter()
            .map(|gap| vec![gap.from.to_string(), gap.until.to_string(), span(gap.age_ms)])
            .collect();
        page.table(&["Last point of", "Next one durable, or the end", "Age reached"], &rows);
    }
    if !rpo.over_time.is_empty() {
        page.tag("h4", "Over time");
        let rows: Vec<Vec<String>> = rpo
            .over_time
            .iter()
            .map(|of| {
                let within = of.within_percent.map_or_else(|| "-".into(), |share| format!("{share} %"));
                vec![of.from.to_string(), span(of.known_ms), within, age(of.longest_ms)]
            })
            .collect();
        page.table(&["From", "Known", "Within", "Longest"], &rows);
    }
}

pub(crate) fn unknown(of: &Unknown) -> String {
    let why = match of.why {
        Why::BeforeTheOldest => "before the oldest point that is kept".to_owned(),
        Why::ThinnedOut => format!("{} points in between are not kept any more", of.points_gone),
        Why::ChangedHands => "the VM was failed over or handed over, or a seed was taken in".to_owned(),
        Why::FailedOver => "failed over to this site".to_owned(),
        Why::Off => "the VM was off, until some time before the next point".to_owned(),
    };
    format!("{}: {why}", span(of.ms))
}

fn of_drills(page: &mut Page, subject: &Subject) {
    page.tag("h3", "Drills");
    if let Some(every) = &subject.drill_every {
        page.tag("p", &format!("One begins by itself every {every}."));
    }
    if subject.drills.is_empty() {
        return page.tag("p", "None in this time.");
    }
    let rows: Vec<Vec<String>> = subject
        .drills
        .iter()
        .map(|drill| {
            vec![
                drill.id.clone(),
                drill.started_at.to_string(),
                result(drill).into(),
                span(drill.rpo_ms),
                drill.rto_ms.map_or_else(|| "not all came up".into(), span),
                evidence(drill),
            ]
        })
        .collect();
    page.table(&["Drill", "Begun", "Result", "RPO", "RTO", "Evidence"], &rows);
}

fn result(drill: &DrillRecord) -> &'static str {
    match (drill.state, drill.passed) {
        (DrillState::Running, _) => "under way",
        (DrillState::Interrupted, _) => "interrupted",
        (DrillState::Kept | DrillState::Done, true) => "passed",
        (DrillState::Kept | DrillState::Done, false) => "NOT PASSED",
    }
}

/// What it showed, and the files that are kept of it.
fn evidence(drill: &DrillRecord) -> String {
    let mut said = Vec::new();
    for member in &drill.members {
        let how = match (member.running_ms, member.resumes) {
            (None, _) => "did not run".to_owned(),
            (Some(ms), true) => format!("resumed after {}", span(ms)),
            (Some(ms), false) => format!("booted after {}", span(ms)),
        };
        let place = member.host_name().map_or_else(String::new, |host| format!(" at host {host}"));
        said.push(format!("{}: {how}{place}, from point {}", member.name, member.point.short()));
        said.extend(member.console.iter().chain(&member.screen).cloned());
        said.extend(member.addresses.iter().map(ToString::to_string));
        said.extend(member.after_resume.iter().filter(|step| !step.done).map(ToString::to_string));
    }
    for check in &drill.checks {
        let end = check.failed.as_deref().map_or_else(|| "well".into(), |why| format!("FAILED: {why}"));
        said.push(format!("check {}: {end}", check.command.join(" ")));
    }
    said.extend(drill.notes.iter().cloned());
    said.extend(drill.errors.iter().map(|error| format!("ERROR: {error}")));
    said.join("\n")
}

fn of_failovers(page: &mut Page, failovers: &[Failover]) {
    page.tag("h3", "Failovers and undos");
    if failovers.is_empty() {
        return page.tag("p", "None in this time.");
    }
    let rows: Vec<Vec<String>> = failovers.iter().map(failover_row).collect();
    page.table(&["Begun", "Kind", "Outcome", "Point of", "RPO", "RTO", "Notes"], &rows);
}

fn failover_row(failover: &Failover) -> Vec<String> {
    let outcome = match (failover.outcome, failover.resumed) {
        (Outcome::Ran, Some(true)) => "resumed",
        (Outcome::Ran, Some(false)) => "booted",
        (Outcome::Ran, None) => "came up",
        (Outcome::NotCompleted, _) => "NOT COMPLETED",
        (Outcome::CalledOff, _) => "called off",
    };
    vec![
        failover.started_at.to_string(),
        what(failover.what).into(),
        failover.host.as_ref().map_or_else(|| outcome.into(), |host| format!("{outcome} at host {host}")),
        at(failover.cut_at),
        failover.rpo_ms.map_or_else(|| "-".into(), span),
        failover.rto_ms.map_or_else(|| "-".into(), span),
        failover.notes.join("\n"),
    ]
}

fn what(what: What) -> &'static str {
    match what {
        What::Planned => "planned",
        What::Emergency => "emergency",
        What::Undo => "undo",
    }
}

fn verdict(readiness: &Readiness) -> &'static str {
    match readiness.verdict {
        Verdict::Ready => "ready",
        Verdict::Degraded => "degraded",
        Verdict::NotReady => "NOT READY",
    }
}

pub(crate) fn within(rpo: &Attained) -> String {
    rpo.within_percent.map_or_else(|| "not known".into(), |share| format!("{share} %"))
}

fn at(instant: Option<UnixMs>) -> String {
    instant.map_or_else(|| "none".into(), |at| at.to_string())
}

/// As the tables of the commands show it, and milliseconds below ten seconds.
pub(crate) fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..10 => format!("{}.{:03} s", seconds, ms % 1000),
        10..120 => format!("{}.{} s", seconds, ms % 1000 / 100),
        120..7200 => format!("{} min {} s", seconds / 60, seconds % 60),
        7200..172_800 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

const HEAD: &str = "<!DOCTYPE html>
<html lang=\"en\"><head><meta charset=\"utf-8\">
<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">
<style>
body { font: 11pt/1.4 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #111; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.25em; margin-top: 2em; } h3 { font-size: 1.05em; } h4 { font-size: 1em; }
table { border-collapse: collapse; width: 100%; margin: .5em 0 1em; }
th, td { border: 1px solid #999; padding: .2em .5em; text-align: left; vertical-align: top; white-space: pre-line; }
td { overflow-wrap: anywhere; }
thead { display: table-header-group; background: #eee; }
.facts th { width: 24em; font-weight: normal; background: #f6f6f6; }
tr { break-inside: avoid; } h2, h3, h4 { break-after: avoid; }
@media print { body { margin: 0; max-width: none; font-size: 9pt; } section { break-before: page; } }
</style>
";

#[cfg(test)]
mod tests;
