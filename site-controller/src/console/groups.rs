//! Groups and what could be in one, as text for people. Pure: values in, text out.

use super::{
    readiness::ready,
    text::{hosts, kind_of, span, table},
};
use crate::{
    api::types::{GroupFailoverPreview, GroupPointList, GroupRow, GroupState, InventoryList},
    failover::report::GroupReport,
    group::Group,
};
use std::fmt::Write;

pub fn list(rows: &[GroupRow]) -> String {
    if rows.is_empty() {
        return "There are no groups; `lifeboat group create NAME --vm VM` makes one.\n".into();
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.group.spec.name.clone(),
                state(row.state).into(),
                ready(row.readiness),
                row.rpo_ms.map_or_else(|| "-".into(), span),
                span(row.rpo_target_ms),
                row.points.to_string(),
                row.group.spec.vms.join(", "),
                row.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    table(&["GROUP", "STATE", "FAILOVER", "RPO", "TARGET", "POINTS", "VMS", "REASON"], &cells)
}

pub fn one(row: &GroupRow) -> String {
    let spec = &row.group.spec;
    let mut out = format!("Group {}: {}", spec.name, state(row.state));
    if let Some(reason) = &row.reason {
        let _ = write!(out, " ({reason})");
    }
    let rpo = row.rpo_ms.map_or_else(|| "no point of all members yet".into(), span);
    let _ =
        writeln!(out, "\nRPO {rpo}, at the most {} wanted; {} points", span(row.rpo_target_ms), row.points);
    let keep = spec.keep.as_ref().map_or_else(|| "as site.toml says".into(), |rules| rules.join(", "));
    let _ = writeln!(out, "Kept: {keep}");
    if let Some(said) = &row.automatic {
        let _ = writeln!(out, "Automatic failover: {said}");
    }
    for member in &row.group.members {
        let _ = writeln!(out, "  {}  {}", member.vm, member.name);
    }
    if let Some(newest) = &row.newest {
        let _ = writeln!(
            out,
            "Newest point {} of {}, skew {}.{} ms",
            newest.no,
            newest.cut_at,
            newest.skew_us / 1000,
            newest.skew_us % 1000 / 100
        );
    }
    if let Some(drill) = &row.last_drill {
        let rto =
            drill.rto_ms.map_or_else(|| "not all came up".into(), |ms| format!("up after {}", span(ms)));
        let verdict = super::drills::verdict(drill.state, drill.passed);
        let _ = writeln!(out, "Last drill {} of {}: {verdict}, {rto}", drill.id, drill.started_at);
    }
    out
}

pub fn points(list: &GroupPointList) -> String {
    if list.points.is_empty() {
        return format!("Group {} has no point of all its members yet.\n", list.group);
    }
    let rows: Vec<Vec<String>> = list
        .points
        .iter()
        .map(|point| {
            let longest = point.members.iter().map(|member| member.pause_us).max().unwrap_or_default();
            let members: Vec<String> = point
                .members
                .iter()
                .map(|member| format!("{} {}", member.name, member.point.short()))
                .collect();
            vec![
                point.no.to_string(),
                point.cut.to_string().chars().take(8).collect(),
                point.cut_at.to_string(),
                format!("{:.1} ms", point.skew_us as f64 / 1e3),
                format!("{:.1} ms", longest as f64 / 1e3),
                point.consistency().map_or("-", kind_of).to_owned(),
                members.join(", "),
            ]
        })
        .collect();
    table(&["NO", "ID", "CUT AT", "SKEW", "LONGEST PAUSE", "KIND", "POINTS OF MEMBERS"], &rows)
}

pub fn deleted(group: &Group) -> String {
    format!(
        "Group {} is gone; the points of its VMs stay, and its history, for a group of its name.\n",
        group.spec.name
    )
}

/// What a failover would mean.
pub fn failover_preview(preview: &GroupFailoverPreview) -> String {
    let mut out = String::new();
    let (members, reached) = (preview.members.join(", "), preview.reached.join(", "));
    let order: Vec<String> = preview.starts.iter().map(|row| row.join(" and ")).collect();
    let order = order.join(", then ");
    if preview.planned {
        let _ = writeln!(
            out,
            "Planned failover of {members}: they stand, nothing is lost, and they start here: {order}."
        );
        let away: Vec<&str> =
            preview.members.iter().filter(|vm| !preview.reached.contains(vm)).map(String::as_str).collect();
        if !away.is_empty() {
            let _ = writeln!(out, "It can't be done now: no connected agent has {}.", away.join(", "));
        }
        return out + &details(preview);
    }
    let at = preview.cut_at.map_or_else(String::new, |at| at.to_string());
    let _ = writeln!(out, "Emergency failover of {members} to their point of {at}, started here: {order}.");
    if !preview.left_off.is_empty() {
        let off = preview.left_off.join(", ");
        let _ = writeln!(out, "Defined and NOT started, as they were off: {off}.");
    }
    let _ = writeln!(out, "LOST: everything since then, {}.", span(preview.lost_ms));
    if !preview.reached.is_empty() {
        let _ = writeln!(
            out,
            "WARNING: hosts are connected that have {reached}: these may be alive, and are fenced. A planned failover \
             loses nothing."
        );
    }
    out + &details(preview)
}

fn details(preview: &GroupFailoverPreview) -> String {
    let steps = preview.steps.iter().zip(1..).map(|(step, no)| format!("  {no}. {step}\n"));
    let steps: String = steps.collect();
    addresses(preview) + &hosts(preview.hosts.as_ref()) + &steps
}

fn addresses(preview: &GroupFailoverPreview) -> String {
    let lines = preview.addresses.iter().flat_map(|(vm, all)| all.iter().map(move |one| (vm, one)));
    lines.map(|(vm, one)| format!("Addresses of {vm} here: {one}.\n")).collect()
}

pub fn failover(report: &GroupReport) -> String {
    let run = report.members.iter().filter(|member| !member.left_off).count();
    let mut out = format!("Group {}: {run} replicas run.", report.group);
    let _ = writeln!(out, " RTO {}, lost {}.", span(report.rto_ms), span(report.rpo_ms));
    for member in &report.members {
        let how = match (member.left_off, member.resumed) {
            (true, _) => "left off, as it was, with disks",
            (false, true) => "resumed",
            (false, false) => "booted",
        };
        let place = member.host.as_ref().map_or_else(String::new, |host| format!(" at host {host}"));
        let _ = writeln!(out, "  {}: {how}{place} from point {}", member.name, member.point);
        if let Some(why) = &member.cold_boot {
            let _ = writeln!(out, "    BOOTED COLD, its memory is lost: {why}");
        }
        if let (None, Some(why)) = (&member.cold_boot, member.refused.last()) {
            let _ = writeln!(out, "    resumed when tried once more; it had been refused: {why}");
        }
        for step in member.addresses.iter().chain(&member.after_resume) {
            let _ = writeln!(out, "    {step}");
        }
    }
    for warning in &report.warnings {
        let _ = writeln!(out, "WARNING: {warning}");
    }
    if !report.sources_left.is_empty() {
        let left = report.sources_left.join(", ");
        let _ = writeln!(out, "Sources that stand and were not told yet that they are off for good: {left}");
    }
    out
}

/// What deleting means.
pub fn delete_preview(row: &GroupRow) -> String {
    let vms = row.group.spec.vms.join(", ");
    format!("{vms} will no longer be protected by group {}. Their points stay.\n", row.group.spec.name)
}

pub fn inventory(list: &InventoryList) -> String {
    if list.vms.is_empty() {
        return "No connected agent has told of a VM.\n".into();
    }
    let rows: Vec<Vec<String>> = list
        .vms
        .iter()
        .map(|row| {
            let running = if row.running { "running" } else { "off" };
            let group = row.group.clone().unwrap_or_else(|| "-".into());
            vec![row.name.clone(), running.into(), group, row.agent.clone(), row.vm.to_string()]
        })
        .collect();
    table(&["VM", "STATE", "GROUP", "AGENT", "UUID"], &rows)
}

fn state(state: GroupState) -> &'static str {
    match state {
        GroupState::Protected => "protected",
        GroupState::Seeding => "seeding",
        GroupState::Late => "late",
        GroupState::Paused => "paused",
    }
}
