//! Others at work on a guest: an operation of libvirt's, a migration that is not ours (saves and dumps
//! are migrations too), a block job (backups are some); we have no block jobs.
//! Promises: asks only, and nothing that costs more than a look; where nobody can be asked it says that nobody is at
//! work, and each step of a cut finds out by itself what stands in its way. A migration of ours is told by its brake, a
//! node whose name begins with [`OWN`], or by being a background snapshot. Called by `capture::guest` around a cut, and
//! by `protect::lookout` all the time.

use crate::watchdog::{gone_out, guest_status};
use lifeboat::hypervisor::{libvirt::Domain, monitor::Monitor};
use serde_json::{Value, json};

/// What libvirt, or somebody through libvirt, is doing with a domain.
pub fn somebody(domain: &Domain) -> Option<String> {
    let held = || domain.held_for().ok().flatten().map(str::to_owned);
    if let Some(operation) = domain.job().or_else(held) {
        return Some(format!("libvirt's {operation} of this VM"));
    }
    let monitor = domain.monitor();
    block_job(&monitor).or_else(|| migration(&monitor)).or_else(|| end_of_a_save(&monitor))
}

/// Its memory has gone out, and nobody has ended its QEMU or let it go on yet.
fn end_of_a_save(monitor: &dyn Monitor) -> Option<String> {
    let status = guest_status(monitor).ok()?;
    gone_out::is_end(&status).then(|| format!("the end of a migration, save or dump of this VM ({status})"))
}

fn block_job(monitor: &dyn Monitor) -> Option<String> {
    let jobs = monitor.execute("query-block-jobs", json!({})).ok()?;
    let job = jobs.as_array()?.first()?;
    let text = |key: &str| job.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    Some(format!("a block job ({} of {})", text("type"), text("device")))
}

fn migration(monitor: &dyn Monitor) -> Option<String> {
    let under_way = || {
        let answer = monitor.execute("query-migrate", json!({})).ok()?;
        let status = answer.get("status")?.as_str()?.to_owned();
        (!matches!(status.as_str(), "none" | "completed" | "cancelled" | "failed")).then_some(status)
    };
    under_way()?;
    let nodes = monitor.execute("query-named-block-nodes", json!({ "flat": true })).ok()?;
    let mut names = nodes.as_array()?.iter().filter_map(|node| node.get("node-name")?.as_str());
    if names.any(|name| name.starts_with(OWN)) || takes_snapshot(monitor)? {
        return None;
    }
    // Ours may have ended between the two questions.
    Some(format!("a migration, save or dump of this VM ({})", under_way()?))
}

/// A background snapshot is taken for ours: libvirt makes none.
fn takes_snapshot(monitor: &dyn Monitor) -> Option<bool> {
    let capabilities = monitor.execute("query-migrate-capabilities", json!({})).ok()?;
    let is_on = |name: &&Value| name["capability"] == "background-snapshot" && name["state"] == true;
    Some(capabilities.as_array()?.iter().any(|capability| is_on(&capability)))
}

/// How the node's name begins that brakes a migration of ours.
const OWN: &str = "lbrake-";
