//! Scratch space of one view: a nameless file that holds what the guest has overwritten since the cut.
//! Promises: it has no name, so nothing is left behind however anybody dies; QEMU gets it as open files, not as a
//! path; [`Scratch::check`] tells when others need the space. Called by `disk`.

use super::{
    DiskError,
    names::PREFIX,
    qemu::{Qemu, unexpected},
};
use lifeboat::units::ByteSize;
use nix::{
    errno::Errno,
    sys::statvfs::fstatvfs,
    unistd::{Whence, lseek},
};
use serde_json::json;
use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

#[derive(Debug)]
pub(super) struct Scratch {
    dir: PathBuf,
    writable: File,
}

impl Scratch {
    pub fn create(dir: &Path, bytes: u64) -> Result<Self, DiskError> {
        let failed = |step| move |source| DiskError::Scratch { step, dir: dir.into(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(nix::libc::O_TMPFILE);
        let writable = options.open(dir).map_err(failed("creating a nameless file"))?;
        writable.set_len(bytes).map_err(failed("sizing a file like the disk"))?;
        let scratch = Self { dir: dir.into(), writable };
        scratch.check()?;
        Ok(scratch)
    }

    /// Hands the file to QEMU; returns the name by which QEMU opens it.
    pub fn pass_to(&self, qemu: &Qemu, opaque: &str) -> Result<String, DiskError> {
        debug_assert!(opaque.starts_with(PREFIX));
        let path = format!("/proc/self/fd/{}", self.writable.as_raw_fd());
        // QEMU picks the descriptor whose access mode is the one it needs: give it both.
        let readable = File::open(path).map_err(|source| self.failed("reopening a file", source))?;
        let answer = qemu.run_with_fd("add-fd", json!({ "opaque": opaque }), self.writable.as_fd())?;
        let set = answer["fdset-id"].as_u64().ok_or_else(|| unexpected("add-fd", "no fdset-id"))?;
        qemu.run_with_fd("add-fd", json!({ "opaque": opaque, "fdset-id": set }), readable.as_fd())?;
        Ok(format!("/dev/fdset/{set}"))
    }

    /// Which bytes from `from` to `to` hold data: all of the old contents that were kept, but zeros.
    pub fn kept(&self, from: u64, to: u64) -> Result<Vec<Range<u64>>, DiskError> {
        let mut kept = Vec::new();
        let mut at = from;
        while at < to {
            let Some(start) = self.seek(at, Whence::SeekData)?.filter(|start| *start < to) else { break };
            let end = self.seek(start, Whence::SeekHole)?.map_or(to, |end| end.clamp(start + 1, to));
            kept.push(start..end);
            at = end;
        }
        Ok(kept)
    }

    /// `None`: there is none behind `from`.
    fn seek(&self, from: u64, whence: Whence) -> Result<Option<u64>, DiskError> {
        let failed = |errno: Errno| self.failed("looking for what was kept", errno.into());
        let from = i64::try_from(from).map_err(|_| failed(Errno::EOVERFLOW))?;
        match lseek(&self.writable, from, whence) {
            Ok(found) => u64::try_from(found).map(Some).map_err(|_| failed(Errno::EOVERFLOW)),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Refuses to go on when the file system is nearly full: it is shared, perhaps with the guests' own disks.
    pub fn check(&self) -> Result<(), DiskError> {
        let stat =
            fstatvfs(&self.writable).map_err(|errno| self.failed("looking for free space", errno.into()))?;
        let fragment = stat.fragment_size() as u64;
        let (total, free) = (stat.blocks() as u64 * fragment, stat.blocks_available() as u64 * fragment);
        if free < (total / RESERVE_FRACTION).min(RESERVE_MAX) {
            return Err(DiskError::ScratchFull { dir: self.dir.clone(), free: ByteSize(free) });
        }
        Ok(())
    }

    fn failed(&self, step: &'static str, source: io::Error) -> DiskError {
        DiskError::Scratch { step, dir: self.dir.clone(), source }
    }
}

/// A view leaves one part in this many of its file system free …
const RESERVE_FRACTION: u64 = 20;
/// … but needs not leave more than this, bytes.
const RESERVE_MAX: u64 = 2 << 30;
