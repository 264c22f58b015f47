//! Whether failovers would work, as text for people. Pure.

use super::text::span;
use crate::readiness::{Readiness, Verdict, Weight};
use lifeboat::units::ByteSize;
use std::fmt::Write;

pub fn all(found: &[Readiness]) -> String {
    if found.is_empty() {
        return "Nothing is protected to this site yet.\n".into();
    }
    found.iter().map(one).collect()
}

fn one(readiness: &Readiness) -> String {
    let mut out = String::new();
    let kind = if readiness.is_group { "group" } else { "VM" };
    let rpo =
        readiness.rpo_ms.map_or_else(|| "no point".into(), |ms| format!("newest point {} old", span(ms)));
    let (memory, disk) = (ByteSize(readiness.memory_bytes), ByteSize(readiness.disk_bytes));
    let _ = writeln!(
        out,
        "{} ({kind}): {}; {rpo}; its replicas take {memory} of memory and {disk} of disk",
        readiness.name,
        verdict(readiness.verdict)
    );
    for finding in &readiness.findings {
        let weight = match finding.weight {
            Weight::Blocks => "BLOCKS",
            Weight::Degrades => "degrades",
            Weight::Note => "note",
        };
        let vm = finding.vm.as_deref().map(|vm| format!("{vm}: ")).unwrap_or_default();
        let _ = writeln!(out, "  {weight:<8}  {vm}{} [{}]", finding.what, finding.code);
    }
    out
}

/// In a cell.
pub(super) fn ready(last: Option<Verdict>) -> String {
    last.map_or("-", verdict).to_owned()
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ready => "ready",
        Verdict::Degraded => "degraded",
        Verdict::NotReady => "NOT READY",
    }
}
