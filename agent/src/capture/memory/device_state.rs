//! vCPU and device state of a stopped guest, by `xen-save-devices-state` (which has nothing to do with Xen here).
//! Promises: the state lands in memory of ours, through a passed descriptor, so that a confined QEMU needs no path. One
//! descriptor serves all points of a QEMU process: a stopped QEMU never closes those it is told to give back, and would
//! run out of them. Called by `capture::guest` inside the pause.

use super::MemoryError;
use lifeboat::{
    hypervisor::{
        monitor::{Monitor, MonitorError},
        version::QemuVersion,
    },
    qemu::stream::MAGIC_LEN,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::fd::{AsFd, AsRawFd},
};

/// Bytes of device state at the most. An ordinary guest has about 100 KiB.
const STATE_MAX: u64 = 512 << 20;
/// By which a descriptor of ours is known, also to the next agent. Not `lifeboat-…`: those are the disks', which take
/// all of theirs away between points.
const OPAQUE: &str = "device-state-lifeboat";

/// Room for the state of one QEMU process.
pub struct DeviceState {
    memory: File,
    /// Shares its position with QEMU's descriptor, so that each state can start at 0.
    writer: File,
    set: i64,
    version: QemuVersion,
}

impl DeviceState {
    /// Makes the room and shows it to QEMU; to be done while the guest runs. Takes away what an earlier agent left.
    pub fn prepare(monitor: &dyn Monitor) -> Result<Self, MemoryError> {
        remove_left_over(monitor)?;
        let version = QemuVersion::ask(monitor)?;
        let io = MemoryError::io;
        let memory = memfd_create(c"lifeboat-device-state", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| io("making room for device state")(errno.into()))?;
        // QEMU takes a descriptor from a set only if its access mode is the one asked for: write-only.
        let writer = OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
            .map_err(io("opening the room for device state"))?;
        let added = monitor.execute_with_fds("add-fd", json!({ "opaque": OPAQUE }), &[writer.as_fd()])?;
        let set = added
            .get("fdset-id")
            .and_then(Value::as_i64)
            .ok_or_else(|| MonitorError::Unexpected { command: "add-fd".into(), what: added.to_string() })?;
        Ok(Self { memory: File::from(memory), writer, set, version })
    }

    /// Of the QEMU whose state it is.
    pub fn version(&self) -> QemuVersion {
        self.version
    }

    /// Whether QEMU still has the room: it closes descriptors when libvirtd's connection to it ends.
    pub fn is_known(&self, monitor: &dyn Monitor) -> Result<bool, MemoryError> {
        let sets = monitor.execute("query-fdsets", json!({}))?;
        let mut ids = sets.as_array().into_iter().flatten().filter_map(|set| set["fdset-id"].as_i64());
        Ok(ids.any(|id| id == self.set))
    }

    /// Saves the state of a stopped guest: device sections and the end mark, without magic and version.
    pub fn save(&mut self, monitor: &dyn Monitor) -> Result<Vec<u8>, MemoryError> {
        let io = MemoryError::io;
        self.memory.set_len(0).map_err(io("emptying the room for device state"))?;
        self.writer.seek(SeekFrom::Start(0)).map_err(io("emptying the room for device state"))?;
        let filename = format!("/dev/fdset/{}", self.set);
        monitor.execute("xen-save-devices-state", json!({ "filename": filename, "live": false }))?;
        let mut state = Vec::new();
        self.memory.seek(SeekFrom::Start(0)).map_err(io("reading device state back"))?;
        let mut bounded = (&self.memory).take(STATE_MAX);
        bounded.read_to_end(&mut state).map_err(io("reading device state back"))?;
        check(&state)?;
        state.drain(..MAGIC_LEN);
        Ok(state)
    }
}

pub(super) fn remove_left_over(monitor: &dyn Monitor) -> Result<(), MemoryError> {
    let sets = monitor.execute("query-fdsets", json!({}))?;
    for set in sets.as_array().into_iter().flatten() {
        let fds = set["fds"].as_array().map_or(&[][..], Vec::as_slice);
        if !fds.is_empty() && fds.iter().all(|fd| fd["opaque"] == OPAQUE) {
            // One that stays costs QEMU a descriptor; it must not cost the guest its point.
            if let Err(error) = monitor.execute("remove-fd", json!({ "fdset-id": set["fdset-id"] })) {
                tracing::debug!(%error, "QEMU kept a descriptor that an earlier agent had passed");
            }
        }
    }
    Ok(())
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
