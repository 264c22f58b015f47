//! QEMU's locks on image files, as it takes them itself: for raw images, which its own tools read without any.
//! A process that writes to an image holds a shared lock on byte 101 of it; one that does not bear writers, on byte 201; each
//! looks at the other's byte (QEMU's `block/file-posix.c`). Promises: while a [`Hold`] lives, no QEMU of this host opens
//! the file for writing, and none had it open when it was made.

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};
use std::{fs::File, io, path::Path};

/// See the module.
#[derive(Debug)]
pub(super) struct Hold {
    _file: File,
}

impl Hold {
    /// `None` where files can't be locked, or for a block device.
    pub fn on(path: &Path) -> io::Result<Option<Self>> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, NO_WRITERS))) {
            Ok(_) => {}
            Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // One that could not be had for ourselves tells of somebody else's.
        let mut found = lock(libc::F_WRLCK, WRITES);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found))?;
        if found.l_type != libc::F_UNLCK as libc::c_short {
            return Err(io::Error::other("a QEMU has it open for writing"));
        }
        Ok(Some(Self { _file: file }))
    }
}

fn lock(kind: libc::c_int, byte: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Of whoever writes: 100 and the number of the permission.
const WRITES: libc::off_t = 101;
/// Of whoever does not bear that: 200 and the number of the permission.
const NO_WRITERS: libc::off_t = 201;
