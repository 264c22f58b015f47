//! What a real reboot makes libvirt forget: the notes on files about who uses them.
//! libvirt keeps them in extended attributes stamped with the host's boot time. This host does not boot again when a site
//! does, so they are taken away by hand. Called by `site` when the power comes back.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Removes libvirt's notes from every file below `folder`.
pub(crate) fn forget(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
        let entry = entry.context("listing a site's files")?;
        if entry
            .file_type()
            .context("listing a site's files")?
            .is_dir()
        {
            forget(&entry.path())?;
        } else {
            forget_one(&entry.path()).with_context(|| {
                format!("removing libvirt's notes from {}", entry.path().display())
            })?;
        }
    }
    Ok(())
}

fn forget_one(file: &Path) -> io::Result<()> {
    let path = CString::new(file.as_os_str().as_bytes())?;
    for name in names(&path)? {
        // SAFETY: both strings are NUL-terminated and live through the call.
        if unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The attributes of a file that are libvirt's; none where the file system knows no attributes.
fn names(path: &CStr) -> io::Result<Vec<CString>> {
    let mut buffer = vec![0_u8; LIST_BYTES];
    // SAFETY: the path is NUL-terminated and the buffer is as long as we say.
    let length =
        unsafe { libc::llistxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    let Ok(length) = usize::try_from(length) else {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOTSUP) {
            Ok(Vec::new())
        } else {
            Err(error)
        };
    };
    let all = buffer[..length]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(LIBVIRTS));
    all.map(|name| CString::new(name).map_err(io::Error::other))
        .collect()
}

const LIBVIRTS: &[u8] = b"trusted.libvirt.security.";
/// The most that Linux ever returns.
const LIST_BYTES: usize = 64 << 10;
