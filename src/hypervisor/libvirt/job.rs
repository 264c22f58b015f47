//! What libvirt itself does, or did last, with a domain. Called by `domain`.

use super::process::RUN_FOLDER;
use std::{
    ffi::{CString, c_int},
    fs,
    path::Path,
    ptr,
};
use virt::{error::Error, sys};

/// How libvirt calls a migration to another host, at the one that the guest leaves.
pub const MIGRATION_OUT: &str = "migration out";

/// And a save, managed or to a file.
pub const SAVE: &str = "save";

/// From the file in which libvirtd keeps, for its own next start, what goes on with the domain `name`. It is written when
/// an operation begins, before anything is done (`VIR_DOMAIN_TRACK_JOBS` in `virdomainjob.h`). No call tells as much: that
/// for the statistics of a job under way can crash libvirtd 9.0, and QEMU learns of a migration a second later.
pub fn under_way(name: &str) -> Option<String> {
    read(&fs::read_to_string(Path::new(RUN_FOLDER).join(format!("{name}.xml"))).ok()?).map(str::to_owned)
}

/// `<job type='none' async='migration out' …>`, absent where nothing goes on, before the definition: in that, anybody may
/// have written anything.
fn read(status: &str) -> Option<&str> {
    let (ours, _) = status.split_once("<domain ")?;
    let (job, _) = ours.split_once("<job ")?.1.split_once('>')?;
    let (name, _) = job.split_once("async='")?.1.split_once('\'')?;
    (name != "none").then_some(name)
}

/// Missing in the crate.
pub fn abort(domain: &virt::domain::Domain) -> Result<(), Error> {
    // SAFETY: the domain is alive.
    if unsafe { sys::virDomainAbortJob(domain.as_ptr()) } < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// Missing in the crate.
pub fn save_paused(domain: &virt::domain::Domain, file: &str) -> Result<(), Error> {
    let file = CString::new(file)?;
    // SAFETY: the domain is alive, and libvirt only reads the name.
    let status = unsafe {
        sys::virDomainSaveFlags(domain.as_ptr(), file.as_ptr(), ptr::null(), sys::VIR_DOMAIN_SAVE_PAUSED)
    };
    if status < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// What libvirt did last with the domain, if it came to its end. The crate's own call can't be used: where nothing was
/// done libvirt returns no array at all.
pub fn last_operation(domain: &virt::domain::Domain) -> Result<Option<sys::virDomainJobOperation>, Error> {
    let flags = sys::VIR_DOMAIN_JOB_STATS_COMPLETED | sys::VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED;
    let (mut kind, mut count, mut params) = (0, 0, ptr::null_mut());
    // SAFETY: the domain is alive and all pointers outlive the call.
    let status =
        unsafe { sys::virDomainGetJobStats(domain.as_ptr(), &mut kind, &mut params, &mut count, flags) };
    if status < 0 {
        return Err(Error::last_error());
    }
    let mut operation: c_int = 0;
    // SAFETY: `params` is null or an array of `count`, of ours to free, once; the name is a C string that stays.
    let found = unsafe {
        let name = sys::VIR_DOMAIN_JOB_OPERATION.as_ptr();
        let found = sys::virTypedParamsGetInt(params, count, name, &mut operation);
        sys::virTypedParamsFree(params, count);
        found
    };
    // It can't be negative: libvirt counts its operations from 0.
    Ok((found == 1).then_some(operation.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As libvirtd 9.0 writes it; that it does is pinned by the end-to-end tests, which see whom the agent yields to.
    #[test]
    fn what_goes_on_is_told_by_the_status_file() {
        let status = |job: &str, metadata: &str| {
            format!(
                "<!-- x -->\n<domstatus state='paused' reason='unknown' pid='7'>\n  <monitor path='/m' type='unix'/>\n  \
                 {job}  <domain type='qemu' id='1'>{metadata}</domain>\n</domstatus>\n"
            )
        };
        let moves = "<job type='none' async='migration out' phase='begin3' flags='0x0'>\n  </job>\n";
        assert_eq!(read(&status(moves, "")), Some(MIGRATION_OUT));
        assert_eq!(read(&status("<job type='destroy' async='none'/>\n", "")), None);
        assert_eq!(read(&status("", "<metadata><job async='save'/></metadata>")), None);
        for torn in ["", "<domstatus>", "<job async='", "<domstatus><job async='save"] {
            assert_eq!(read(torn), None, "{torn}");
        }
    }
}
