//! A guest whose memory has gone out: into a save, a dump or to another host, all of which are migrations to QEMU. If it
//! stood in a pause of ours when that began, libvirt resumes it neither after a dump nor after a failure.
//! Promises: says that such a guest may go on only where it can be told that it goes on nowhere else. A migration to
//! another host whose client died before its last step leaves a guest that nobody knows to run there or not: it stands
//! here until its operator decides. Asks only. Called by the watchdog and by `protect::saves`.

use super::capabilities::{capabilities, migration_status};
use lifeboat::hypervisor::{
    libvirt::{Domain, HypervisorError},
    monitor::{Monitor, MonitorError},
};

/// QEMU's states of such a guest.
const ENDS: [&str; 2] = ["finish-migrate", "postmigrate"];

/// Set by libvirt for the time of each migration to another host, and for nothing else: the source waits before it
/// gives its disks away (`qemu_migration_params.c`, `qemuMigrationParamsAlwaysOn`).
const TO_ANOTHER_HOST: &str = "pause-before-switchover";

#[derive(Debug, thiserror::Error)]
pub enum GoneOutError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

/// Whether QEMU's word on the guest, [`super::guest_status`], is that of one whose memory has gone out.
pub fn is_end(status: &str) -> bool {
    ENDS.contains(&status)
}

/// Whether such a guest may go on here, once libvirt is done with it. `false` as well while that can't be told yet.
pub fn may_go_on(domain: &Domain, monitor: &dyn Monitor) -> Result<bool, GoneOutError> {
    match migration_status(monitor)?.as_str() {
        // What has not come out whole is started by nobody: libvirt lets it go at the other end only after success here.
        "failed" | "cancelled" => Ok(true),
        // The capability goes before the client's death is forgotten, but after libvirt has noted what was done: this
        // order of questions can't take a migration for an older dump.
        "completed" => Ok(!is_to_another_host(monitor)? && domain.was_dumped_last()?),
        _ => Ok(false),
    }
}

fn is_to_another_host(monitor: &dyn Monitor) -> Result<bool, MonitorError> {
    Ok(capabilities(monitor)?.iter().any(|found| found.state && found.capability == TO_ANOTHER_HOST))
}
