//! The story on one screen: at most 40 lines of at most 100 columns. Colour only where a person looks.

use crate::story::{Point, Story};
use std::{
    fmt::Write,
    io::{self, IsTerminal},
    path::Path,
};

pub fn render(story: &Story, report: &Path) -> String {
    let paint = Paint(io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    let mut out = String::new();
    title(&mut out, paint, story);
    happened(&mut out, paint, story);
    points(&mut out, paint, story);
    console(&mut out, paint, story);
    verdict(&mut out, paint, story, report);
    out
}

fn title(out: &mut String, paint: Paint, story: &Story) {
    let (guest, host) = (&story.guest, &story.host);
    let facts = format!(
        "{} MiB, {} · {} Gbit/s · {} · {}",
        guest.memory_mib,
        guest.disks.join(" + "),
        story.link.rate_mbit as f64 / 1e3,
        host.qemu,
        host.accelerator.split(" (").next().unwrap_or_default(),
    );
    let _ = writeln!(out, "\n{}  {}", paint.bold("LIFEBOAT"), paint.dim(&cut(&facts, WIDTH - 10)));
}

fn happened(out: &mut String, paint: Paint, story: &Story) {
    heading(out, paint, "What happened");
    for event in &story.events {
        let line = cut(&format!("{:7.1} s  {}", event.at_s, event.what), WIDTH);
        let line = if event.what.starts_with("POWER CUT") { paint.red(&line) } else { line };
        let _ = writeln!(out, "{line}");
    }
}

fn points(out: &mut String, paint: Paint, story: &Story) {
    heading(out, paint, "\nRecovery points");
    let header = format!(
        "{:>8}  {:<8}  {:>14}  {:>9}  {:>10}  {:>10}  {:>12}  {:>10}",
        "#", "id", "cut → durable", "pause", "memory", "disk", "on the wire", "of changed"
    );
    let _ = writeln!(out, "{}", paint.dim(&header));
    let (first, rest) = story.points.split_at(story.points.len().min(1));
    let hidden = rest.len().saturating_sub(POINTS_SHOWN - 1);
    for point in first.iter().chain(&rest[hidden..]) {
        let restored = point.id == story.failover.point;
        let line = row(point, restored);
        let _ = writeln!(out, "{}", if restored { paint.bold(&line) } else { line });
    }
    if hidden > 0 {
        let _ = writeln!(
            out,
            "{}",
            paint.dim(&format!("          {hidden} points between the first two rows are not shown"))
        );
    }
}

fn row(point: &Point, restored: bool) -> String {
    let durable = point.cut_to_durable_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
    format!(
        "{:>8}  {:<8}  {durable:>14}  {:>6.0} ms  {:>10}  {:>10}  {:>12}  {:>10.0} %  {}",
        point.seq,
        point.id.get(..8).unwrap_or(&point.id),
        point.pause_ms,
        size(point.memory_changed_bytes),
        size(point.disk_changed_bytes),
        size(point.wire_bytes),
        100.0 * point.wire_bytes as f64 / point.changed_bytes().max(1) as f64,
        if restored { "◀" } else { "" },
    )
    .trim_end()
    .to_owned()
}

fn console(out: &mut String, paint: Paint, story: &Story) {
    heading(out, paint, "\nThe guest's console");
    for line in &story.console.last_before {
        let _ = writeln!(out, "  A  {}", cut(line, WIDTH - 5));
    }
    let _ = writeln!(out, "{}", paint.red("     ─ ─ ─  power cut at A, failover to B  ─ ─ ─"));
    for line in &story.console.first_after {
        let _ = writeln!(out, "  B  {}", cut(line, WIDTH - 5));
    }
    let _ = writeln!(out, "  {}", paint.dim(&continuity(story)));
}

/// Why the first tick at B may be lower than the last one at A.
fn continuity(story: &Story) -> String {
    let failover = &story.failover;
    let (after, before, seq) = (failover.counter_after, failover.counter_before, failover.seq);
    match (before + 1).saturating_sub(after) {
        0 => format!("Point {seq} was cut after tick {before}, the last at A: no tick was lost."),
        lost => format!(
            "It goes on from the instant of point {seq}; the {lost} ticks that A did in the {:.1} s since then are lost.",
            failover.rpo_s
        ),
    }
}

fn verdict(out: &mut String, paint: Paint, story: &Story, report: &Path) {
    let failover = &story.failover;
    let _ = writeln!(
        out,
        "\n{} {:.2} s {}   {} {:.2} s {}",
        paint.bold("RPO"),
        failover.rpo_s,
        paint.dim("(point's cut → power cut)"),
        paint.bold("RTO"),
        failover.rto_s,
        paint.dim(&format!(
            "(command → first word; libvirt: it runs, after {:.2} s)",
            failover.running_after_s
        )),
    );
    for check in story.checks.iter().filter(|check| !check.holds) {
        let _ = writeln!(
            out,
            "{}",
            cut(&format!("✗ {}: {}", check.what, check.found.lines().next().unwrap_or_default()), WIDTH)
        );
    }
    let words = if story.unharmed {
        paint.green(&format!(
            "✓ UNHARMED: the same boot, ticks {} to {} at B, memory errors {}, disk errors {}",
            failover.counter_after, failover.counter_at_end, failover.memory_errors, failover.disk_errors
        ))
    } else {
        paint.red("✗ HARMED: the guest did not go on as it should")
    };
    let _ = writeln!(out, "{words}");
    let mib = |kib: u64| kib.div_ceil(1024);
    let rate =
        failover.restore_mb_per_s.map_or_else(String::new, |rate| format!(" · restored at {rate:.0} MB/s"));
    let cost = format!(
        "  most memory used: agent {} MiB, site controller {} MiB{rate}\n  as numbers: {}",
        mib(story.protection.agent_peak_rss_kib),
        mib(story.site.controller_peak_rss_kib),
        report.display()
    );
    let _ = writeln!(out, "{}", paint.dim(&cost));
}

fn heading(out: &mut String, paint: Paint, text: &str) {
    let _ = writeln!(out, "{}", paint.bold(text));
}

/// At most `width` characters.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.0} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// Escape codes, or nothing.
#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn bold(self, text: &str) -> String {
        self.with("1", text)
    }
    fn dim(self, text: &str) -> String {
        self.with("2", text)
    }
    fn red(self, text: &str) -> String {
        self.with("1;31", text)
    }
    fn green(self, text: &str) -> String {
        self.with("1;32", text)
    }
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

const WIDTH: usize = 100;
const POINTS_SHOWN: usize = 8;
