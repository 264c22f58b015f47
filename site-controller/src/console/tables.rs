//! Status and points as text for people. Pure: values in, text out.

use super::{
    groups,
    readiness::ready,
    text::{hosts, kind_of, span, table},
};
use crate::{
    api::types::{
        FailoverPreview, Kept, PointList, PrunePreview, PruneReport, Released, SiteStatus, UndoPreview, VmRow,
    },
    catalog::{PointState, PointSummary},
    failover::{journal::Phase, report::FailoverReport},
    verify::VerifyReport,
};
use lifeboat::{
    format::manifest::Consistency,
    units::{ByteSize, UnixMs},
    wire::message::VmState,
};
use std::fmt::Write;

pub fn status(status: &SiteStatus) -> String {
    let mut out = String::new();
    let free = ByteSize(status.store_free_bytes);
    let _ = writeln!(out, "Site {}  (Lifeboat {})", status.site, status.release);
    let _ = write!(out, "Store: {free} free");
    if status.store_free_bytes < status.store_reserve_bytes {
        let reserve = ByteSize(status.store_reserve_bytes);
        let _ = write!(out, "  FULL: below the reserve of {reserve}; no point is taken until there is room");
    }
    out.push('\n');
    const MONTH_MS: u64 = 30 * 86_400_000;
    if status.certificate_expires.0 < status.now.0 + MONTH_MS {
        let _ = writeln!(out, "WARNING: the site's certificate expires at {}", status.certificate_expires);
    }
    for finding in &status.findings {
        let _ = writeln!(out, "WARNING: {finding}");
    }
    out.push('\n');
    if status.vms.is_empty() {
        out.push_str(
            "No VM is protected to this site yet: enrol an agent (`lifeboat-site-controller token`).\n",
        );
        return out;
    }
    let rows: Vec<Vec<String>> = status.vms.iter().map(|row| vm_row(row, status.now)).collect();
    for (row, why) in status.vms.iter().filter_map(|row| Some((row, row.frozen.as_ref()?))) {
        let _ = writeln!(out, "WARNING: {}'s journal is neither pruned nor folded: {why}", row.name);
    }
    for (row, other) in
        status.vms.iter().filter_map(|row| Some((row, row.agent.as_ref()?.contender.as_ref()?)))
    {
        let _ = writeln!(
            out,
            "WARNING: {}: agent {} was refused at {}: {}",
            row.name, other.agent, other.at, other.why
        );
    }
    let header =
        ["VM", "STATE", "FAILOVER", "RPO", "POINTS", "OLDEST", "STORED", "MEMORY", "AGENT", "REASON"];
    out.push_str(&table(&header, &rows));
    if !status.groups.is_empty() {
        let _ = write!(out, "\n{}", groups::list(&status.groups));
    }
    out
}

fn vm_row(row: &VmRow, now: UnixMs) -> Vec<String> {
    let (state, reason) = state_of(row);
    let memory = match &row.latest {
        Some(latest) if latest.stays_off => "none: it is off".to_owned(),
        Some(latest) if !latest.has_memory => "off: boots cold".to_owned(),
        Some(_) => "yes".to_owned(),
        None => "-".to_owned(),
    };
    let agent = match &row.agent {
        Some(seen) if seen.connected => seen.agent.clone(),
        Some(seen) => format!("{} (gone)", seen.agent),
        None => "-".to_owned(),
    };
    let points = match row.damaged_points {
        0 => row.points.to_string(),
        damaged => format!("{} ({damaged} damaged)", row.points),
    };
    // After a failover the source's points are history: their age says nothing of what could be lost.
    let protected = row.failover.is_none();
    let rpo = row.rpo_ms.filter(|_| protected).map_or_else(|| "-".to_owned(), span);
    let oldest = row.oldest.map_or_else(|| "-".to_owned(), |at| span(now.0.saturating_sub(at.0)));
    let stored = ByteSize(row.stored_bytes).to_string();
    let ready = ready(row.readiness.filter(|_| protected));
    vec![row.name.clone(), state, ready, rpo, points, oldest, stored, memory, agent, reason]
}

fn state_of(row: &VmRow) -> (String, String) {
    if let Some(failover) = &row.failover {
        let words = if failover.phase == Phase::Running { "failed-over" } else { "failover-unfinished" };
        return (words.to_owned(), failover.last_error.clone().unwrap_or_default());
    }
    match &row.agent {
        Some(seen) if seen.connected => {
            let report = seen.report.as_ref();
            let state = report.map_or(VmState::Connecting, |report| report.state);
            (state.as_str().to_owned(), report.and_then(|report| report.reason.clone()).unwrap_or_default())
        }
        Some(seen) => ("no-agent".to_owned(), format!("last heard of it at {}", seen.last_heard)),
        None => ("no-agent".to_owned(), "not heard of since the controller started".to_owned()),
    }
}

pub fn points(list: &PointList) -> String {
    if list.points.is_empty() {
        return format!("{} has no points yet.\n", list.name);
    }
    let rows = list.points.iter().enumerate().map(|(at, point)| point_row(point, list.kept.get(at)));
    let rows: Vec<Vec<String>> = rows.collect();
    let header = ["SEQ", "ID", "CUT AT (UTC)", "KIND", "PAUSE", "MEMORY", "DISK", "WIRE", "KEPT", "STATE"];
    table(&header, &rows)
}

/// What pruning would take away.
pub fn prune_preview(preview: &PrunePreview) -> String {
    let mut out = String::new();
    let going = &preview.going;
    match (&preview.frozen, going.first().zip(going.last())) {
        (Some(why), _) => {
            let _ = writeln!(out, "Nothing of {} can be pruned: {why}", preview.name);
        }
        (None, None) => {
            let _ = writeln!(out, "No point of {} can go now; {} are kept", preview.name, preview.kept);
        }
        (None, Some((first, last))) => {
            let (count, kept) = (going.len(), preview.kept);
            let _ = writeln!(out, "{count} points of {} go, for good; {kept} are kept", preview.name);
            let _ = writeln!(
                out,
                "  from point {} ({}), cut at {}",
                first.seq,
                first.point.short(),
                first.cut_at
            );
            let _ = writeln!(out, "  to point {} ({}), cut at {}", last.seq, last.point.short(), last.cut_at);
        }
    }
    if preview.bases > 0 {
        let _ = writeln!(out, "  {} more that no rule keeps go once nothing lies over them", preview.bases);
    }
    out
}

pub fn prune(report: &PruneReport) -> String {
    let (gone, stored) = (ByteSize(report.pruned_bytes), ByteSize(report.stored_bytes));
    format!(
        "{}: {} points were taken away ({gone}), {} folded; {stored} are stored\n",
        report.name, report.pruned, report.folds
    )
}

pub fn released(released: &Released) -> String {
    let from = released.agent.as_ref().map_or_else(String::new, |agent| format!(" (so far: {agent})"));
    format!("{}: its history goes on from the agent that has it running next{from}\n", released.name)
}

fn point_row(point: &PointSummary, kept: Option<&Kept>) -> Vec<String> {
    let state = match &point.state {
        PointState::Ok => "ok".to_owned(),
        PointState::Damaged(why) => format!("damaged: {why}"),
    };
    vec![
        point.seq.to_string(),
        point.point.short(),
        point.cut_at.to_string(),
        match (point.seed, point.at_rest) {
            (true, _) => "seed",
            (false, true) => "disks, off",
            (false, false) => kind_of(point.consistency),
        }
        .to_owned(),
        format!("{:.1} ms", point.pause_us as f64 / 1e3),
        ByteSize(point.memory_changed_bytes).to_string(),
        ByteSize(point.disk_changed_bytes).to_string(),
        ByteSize(point.wire_bytes).to_string(),
        kept.map_or_else(String::new, |kept| kept.why.clone()),
        state,
    ]
}

/// What the operator is asked to confirm.
pub fn preview(preview: &FailoverPreview) -> String {
    let mut out = String::new();
    let point = &preview.point;
    let _ = writeln!(out, "Emergency failover of {} ({})", preview.name, preview.vm);
    let _ = writeln!(out, "  to point {} ({}), cut at {}", point.seq, point.point.short(), point.cut_at);
    let kind = match point.consistency {
        Consistency::Memory => "is RESUMED where it stood",
        Consistency::App => "is BOOTED: the point holds no memory, but file systems that were frozen for it",
        Consistency::Crash => "is BOOTED as after a power cut: the point holds no memory",
    };
    if preview.left_off {
        let _ = writeln!(
            out,
            "  the replica is DEFINED with its disks and NOT STARTED, as the VM was off; `--start` starts it"
        );
    } else {
        let _ = writeln!(out, "  the replica {kind}");
    }
    match preview.lost_ms {
        0 => out.push_str("  nothing is lost: the VM is off, and the point is of its disks as they stand\n"),
        lost => {
            let _ = writeln!(out, "  LOST: whatever the VM did in the {} since then", span(lost));
        }
    }
    let _ = writeln!(out, "  the source is fenced: its agent is refused from now on");
    if preview.source_connected && !(preview.left_off && preview.lost_ms == 0) {
        let agent = preview.source_agent.as_deref().unwrap_or("?");
        let _ = writeln!(
            out,
            "  WARNING: agent `{agent}` is connected now, so the source may be ALIVE. Shut the VM off there first, and use\n  \
             `--start`, or two copies of it will run."
        );
    }
    out += &hosts(preview.hosts.as_ref());
    if let Some(record) = &preview.unfinished {
        let _ = writeln!(out, "  this goes on with the failover that was begun at {}", record.started_at);
    }
    for addresses in &preview.addresses {
        let _ = writeln!(out, "  its addresses here: {addresses}");
    }
    out
}

/// What an undo would mean.
pub fn undo_preview(preview: &UndoPreview) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "Undo of {}'s failover: {} go on from the point of {}.",
        preview.name,
        preview.members.join(", "),
        preview.cut_at
    );
    match (preview.ran_ms, preview.open_until) {
        (Some(ran), Some(until)) => {
            let _ = writeln!(
                out,
                "The replicas are stopped. What they did in the {} since the failover is SET ASIDE: their disks are kept until {}, their memory is not.",
                span(ran),
                preview.kept_until
            );
            let _ = writeln!(out, "It can be done until {until}.");
        }
        _ => out.push_str("It was not failed over, or that is not completed.\n"),
    }
    out
}

/// What the operator is asked to confirm.
pub fn release_preview(row: &VmRow) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "Release of {} ({})", row.name, row.vm);
    if let Some(seen) = &row.agent {
        let connected =
            if seen.connected { "connected" } else { "NOT connected: its copy may run all the same" };
        let _ = writeln!(out, "  its history is agent `{}`'s so far ({connected})", seen.agent);
        if let Some(contender) = &seen.contender {
            let _ = writeln!(out, "  agent `{}` has it running and would go on with it", contender.agent);
        }
    }
    let _ = writeln!(
        out,
        "  the next agent that has it running goes on with its history, and no other does from then on"
    );
    let _ = writeln!(out, "  make sure that only one copy of it runs, and that it is the right one");
    out
}

pub fn failover(report: &FailoverReport) -> String {
    let verb = match (report.left_off, report.resumed) {
        (true, _) => "defined, and left off as it was,",
        (false, true) => "resumed",
        (false, false) => "booted",
    };
    if report.already_done && report.left_off {
        let at = report.running_at;
        return format!("{} was failed over before, at {at}, and left off. Nothing was done.\n", report.name);
    }
    if report.already_done {
        let at = report.running_at;
        return format!(
            "{} was failed over before, and its replica has run since {at}. Nothing was done.\n",
            report.name
        );
    }
    let place = report.host.as_ref().map_or_else(|| "this site".into(), |host| format!("host {host}"));
    let mut out = format!(
        "{} {verb} at {place} from point {} ({})\n  RPO {} (age of the point when the failover began)\n  RTO {} (until the \
         replica ran)\n",
        report.name,
        report.seq,
        report.point.short(),
        span(report.rpo_ms),
        span(report.rto_ms)
    );
    if report.left_off {
        let _ = writeln!(out, "  start it with `virsh start {}`", report.name);
    }
    if let Some(why) = &report.cold_boot {
        let _ = writeln!(out, "  BOOTED COLD, its memory is lost: {why}");
    }
    if let (None, Some(why)) = (&report.cold_boot, report.refused.last()) {
        let _ = writeln!(out, "  resumed when tried once more; it had been refused: {why}");
    }
    for step in report.addresses.iter().chain(&report.after_resume) {
        let _ = writeln!(out, "  {step}");
    }
    out
}

pub fn verify(report: &VerifyReport) -> String {
    let mut out = format!(
        "{} VMs, {} points, {} objects, {} read and hashed again: ",
        report.vms,
        report.points,
        report.objects,
        ByteSize(report.bytes)
    );
    if report.is_clean() {
        return out + "all as written.\n";
    }
    let _ = writeln!(out, "{} findings", report.findings.len());
    for finding in &report.findings {
        let _ = writeln!(out, "  {finding}");
    }
    out
}
