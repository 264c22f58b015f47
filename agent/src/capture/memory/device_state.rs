//! vCPU and device state of a stopped guest, by `xen-save-devices-state` (which has nothing to do with Xen here).
//! Promises: the state lands in memory of ours, through a passed descriptor, so that a confined QEMU needs no path;
//! the descriptor is taken back whatever happens. Called by `capture::guest` inside the pause.

use super::MemoryError;
use lifeboat::{
    hypervisor::monitor::{Monitor, MonitorError},
    qemu::stream::MAGIC_LEN,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;
use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::fd::{AsFd, AsRawFd},
};

/// Bytes of device state at the most. An ordinary guest has about 100 KiB.
const STATE_MAX: u64 = 512 << 20;

/// Saves the state: device sections and the end mark, without magic and version.
pub fn save(monitor: &dyn Monitor) -> Result<Vec<u8>, MemoryError> {
    let io = MemoryError::io;
    let memory = memfd_create(c"lifeboat-device-state", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| io("making room for device state")(errno.into()))?;
    // QEMU takes a descriptor from a set only if its access mode is the one asked for: write-only.
    let writer = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
        .map_err(io("opening the room for device state"))?;
    let added = monitor.execute_with_fds("add-fd", json!({ "opaque": "lifeboat" }), &[writer.as_fd()])?;
    let set = added
        .get("fdset-id")
        .and_then(serde_json::Value::as_i64)
        .ok_or_else(|| MonitorError::Unexpected { command: "add-fd".into(), what: added.to_string() })?;
    let saved = monitor
        .execute("xen-save-devices-state", json!({ "filename": format!("/dev/fdset/{set}"), "live": false }));
    // A set that stays behind costs QEMU one descriptor; it must not cost the guest its point.
    if let Err(error) = monitor.execute("remove-fd", json!({ "fdset-id": set })) {
        tracing::debug!(%error, "QEMU kept a descriptor of saved device state");
    }
    saved?;
    // The memory's own descriptor has its own position, still at the start.
    let mut state = Vec::new();
    File::from(memory).take(STATE_MAX).read_to_end(&mut state).map_err(io("reading device state back"))?;
    check(&state)?;
    state.drain(..MAGIC_LEN);
    Ok(state)
}

fn check(state: &[u8]) -> Result<(), MemoryError> {
    let refuse = |what: &str| Err(MemoryError::DeviceState { what: what.into() });
    match state {
        [b'Q', b'E', b'V', b'M', 0, 0, 0, 3, 4, .., 0] => Ok(()),
        [b'Q', b'E', b'V', b'M', 0, 0, 0, 3, ..] => refuse("it does not hold whole sections"),
        [] => refuse("QEMU wrote nothing"),
        _ => refuse("it does not start as a migration stream does"),
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn only_whole_device_sections_are_taken() {
        assert!(check(b"QEVM\0\0\0\x03\x04section\0").is_ok());
        for bad in [&b""[..], b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x03\x04cut", b"QEVM\0\0\0\x02\x04x\0", b"noise"]
        {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
