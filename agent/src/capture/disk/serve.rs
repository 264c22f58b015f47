//! Serving views: QEMU's NBD server on a socket that we made, one export per disk, connections to each.
//! Promises: QEMU gets open files, never a path; the server is only stopped if we started it. Called by `disk`.
//!
//! QEMU 7.2's NBD server **aborts, and the guest with it**, in two cases, both only if the disk is in an iothread: when a
//! client hangs up (it is then closed in that thread, which asserts that it is the main one), and when the disk moves
//! between threads while a client is connected (at a guest's reset, stop or continue). So such disks are refused on QEMU
//! before 10.0 (`Qemu::iothread_risk`). Elsewhere a client that dies is what it should be: the socket's end, which QEMU
//! takes for the end of the connection. Nothing may keep the client's end open when we die: a reply that nobody reads
//! would hold the export, and with it every drain of the block layer, which is to say the guest.

use super::{
    DiskError,
    names::{LISTENER, SERVER_MARK},
    qemu::Qemu,
};
use lifeboat::hypervisor::monitor::MonitorError;
use serde_json::json;
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// What is to be served of one disk.
pub(super) struct Offer {
    pub filter: String,
    pub access: String,
    pub export: String,
    /// The node that has the mark, and the mark, where only changes are wanted.
    pub mark: Option<(String, String)>,
}

/// Connections to one export, not yet spoken on.
pub(super) struct Lines {
    pub contents: UnixStream,
    /// Where only changes are wanted. One connection is asked for the same things each time.
    pub changes: Option<UnixStream>,
}

/// Starts the server and exports all `offers`; returns connections to each.
pub(super) fn serve(qemu: &Qemu, dir: &Path, offers: &[Offer]) -> Result<Vec<Lines>, DiskError> {
    for Offer { filter, access, .. } in offers {
        qemu.run(
            "blockdev-add",
            json!({ "driver": "snapshot-access", "node-name": access, "file": filter, "read-only": true }),
        )?;
    }
    let door = Door::open(dir)?;
    start_server(qemu, &door.listener)?;
    let mut lines = Vec::with_capacity(offers.len());
    for offer in offers {
        let changes = offer.mark.as_ref().map(|_| door.connect()).transpose()?;
        lines.push(Lines { contents: door.connect()?, changes });
    }
    for Offer { access, export, mark, .. } in offers {
        let bitmaps: Vec<_> = mark.iter().map(|(node, name)| json!({ "node": node, "name": name })).collect();
        qemu.run(
            "block-export-add",
            json!({ "type": "nbd", "id": export, "node-name": access, "name": export, "bitmaps": bitmaps }),
        )?;
    }
    Ok(lines)
}

fn start_server(qemu: &Qemu, listener: &UnixListener) -> Result<(), DiskError> {
    qemu.run("blockdev-add", json!({ "driver": "null-co", "node-name": SERVER_MARK, "size": 0 }))?;
    qemu.run_with_fd("getfd", json!({ "fdname": LISTENER }), listener.as_fd())?;
    let addr = json!({ "type": "fd", "data": { "str": LISTENER } });
    // Newer QEMU takes 100 connections unless told otherwise, and lets the next one wait for ever.
    match qemu.run("nbd-server-start", json!({ "addr": addr, "max-connections": 0 })) {
        Ok(_) => Ok(()),
        Err(error) => {
            // Not ours, then: take the mark away at once, so that nobody thinks so.
            qemu.delete_node(SERVER_MARK)?;
            let taken = matches!(
                &error,
                DiskError::Monitor(MonitorError::Refused { reason, .. }) if reason.contains("already running")
            );
            Err(if taken { DiskError::Busy } else { error })
        }
    }
}

/// Our listening socket. It has a path only while it is being connected to, in a directory that is ours.
struct Door {
    dir: File,
    /// Doors of several VMs stand in one directory at once: each has a name of its own.
    no: u64,
    listener: UnixListener,
}

impl Door {
    fn open(dir: &Path) -> Result<Self, DiskError> {
        let failed = |step| move |source| DiskError::Scratch { step, dir: dir.into(), source };
        let handle = File::open(dir).map_err(failed("opening the directory"))?;
        let no = DOORS.fetch_add(1, Ordering::Relaxed);
        remove_socket(&handle, no).map_err(failed("removing an old socket"))?;
        let listener = UnixListener::bind(socket_path(&handle, no));
        Ok(Self { dir: handle, no, listener: listener.map_err(failed("making a socket"))? })
    }

    fn connect(&self) -> Result<UnixStream, DiskError> {
        let failed = |source| {
            let dir = fs::read_link(descriptor(&self.dir)).unwrap_or_default();
            DiskError::Scratch { step: "connecting to QEMU by a socket", dir, source }
        };
        let stream = UnixStream::connect(socket_path(&self.dir, self.no)).map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        Ok(stream)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // A socket that stays does no harm: the next one takes its place.
        let _ = remove_socket(&self.dir, self.no);
    }
}

fn remove_socket(dir: &File, no: u64) -> io::Result<()> {
    match fs::remove_file(socket_path(dir, no)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The directory's own path may be too long for a socket's address (107 bytes).
fn socket_path(dir: &File, no: u64) -> String {
    format!("{}/nbd-{}-{no}.sock", descriptor(dir), std::process::id())
}

static DOORS: AtomicU64 = AtomicU64::new(0);

fn descriptor(dir: &File) -> String {
    format!("/proc/self/fd/{}", dir.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doors_of_several_vms_in_one_directory_lead_each_to_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (Door::open(dir.path()).unwrap(), Door::open(dir.path()).unwrap());
        let _line = one.connect().unwrap();
        one.listener.set_nonblocking(true).unwrap();
        other.listener.set_nonblocking(true).unwrap();
        assert!(one.listener.accept().is_ok() && other.listener.accept().is_err());
        drop(other);
        one.connect().unwrap();
    }
}
