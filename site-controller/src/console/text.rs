//! What several tables are made of: columns, spans of time, and the words for what stands in more than one.

use crate::failover::placing::{Foreseen, ForeseenHost};
use lifeboat::format::manifest::Consistency;
use std::fmt::Write;

/// Columns of text, each as wide as its widest cell.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
        cells.chain([header[at].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    let mut out = line(&mut header.iter().copied());
    rows.iter().for_each(|row| out.push_str(&line(&mut row.iter().map(String::as_str))));
    out
}

/// `3.2 s`, `4 min 5 s`, `2 h 1 min`, `3 d 4 h`.
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{}.{} s", seconds, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// What a point is, in a list.
pub(super) fn kind_of(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Memory => "memory",
        Consistency::App => "disks, app",
        Consistency::Crash => "disks, crash",
    }
}

/// At which hosts replicas would run, where there are several.
pub(super) fn hosts(foreseen: Option<&Foreseen>) -> String {
    let Some(Foreseen { placed, passed_over, problem }) = foreseen else { return String::new() };
    let mut out = String::new();
    for ForeseenHost { vm, host } in placed {
        let _ = writeln!(out, "  {vm} starts at host {host}");
    }
    for over in passed_over {
        let _ = writeln!(out, "  host {} is passed over: {}", over.host, over.why);
    }
    if let Some(problem) = problem {
        let _ = writeln!(out, "  It can't be done now: {problem}");
    }
    out
}
