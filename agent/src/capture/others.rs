//! Others at work on a guest: libvirt's jobs, and block jobs, none of which are ever ours.
//! Promises: asks only; where nobody can be asked it says that nobody is at work, and each step of a cut finds out by
//! itself what stands in its way. Called by `capture::guest` before a cut, and by `protect::lookout` all the time.

use lifeboat::hypervisor::{libvirt::Domain, monitor::Monitor};
use serde_json::{Value, json};

/// What libvirt, or somebody through libvirt, is doing with a domain.
pub fn somebody(domain: &Domain) -> Option<String> {
    if let Some(job) = domain.job().ok()? {
        return Some(format!("libvirt's {job} of this VM"));
    }
    block_job(&domain.monitor())
}

/// A block job that runs in its QEMU.
pub fn block_job(monitor: &dyn Monitor) -> Option<String> {
    let jobs = monitor.execute("query-block-jobs", json!({})).ok()?;
    let job = jobs.as_array()?.first()?;
    let text = |key: &str| job.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    Some(format!("a block job ({} of {})", text("type"), text("device")))
}
