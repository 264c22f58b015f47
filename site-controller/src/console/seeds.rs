//! Seeds as text for people. Pure.

use crate::seed::SeedReport;
use lifeboat::units::ByteSize;
use std::fmt::Write;

pub fn seed(report: &SeedReport) -> String {
    let mut out = format!("{}: seed {} is its point {}\n", report.name, report.point.short(), report.seq);
    for disk in &report.disks {
        let (bytes, changed) = (ByteSize(disk.bytes), ByteSize(disk.changed_bytes));
        let told = if report.over.is_some() { "differed from the point before" } else { "are not zero" };
        let _ =
            writeln!(out, "  {}: {}, {bytes}, of which {changed} {told}", disk.target, disk.path.display());
    }
    out.push_str("An agent that begins with this VM now sends what differs from it.\n");
    out
}
