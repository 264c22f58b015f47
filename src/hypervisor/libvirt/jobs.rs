//! What libvirt itself is doing with a domain: a migration, a save, a dump, a snapshot, a backup.
//! Promises: asking costs one message and waits for nobody's job. Commands of ours on QEMU's monitor are no such jobs.

use super::{domain::Domain, error::HypervisorError};
use std::{ffi::c_int, ptr};
use virt::{error::Error, sys};

impl Domain {
    /// The job that libvirt runs on this domain now, in libvirt's words; `None` while there is none, and of a domain that
    /// does not run.
    pub fn job(&self) -> Result<Option<&'static str>, HypervisorError> {
        match self.with("asking for its job", operation) {
            Ok(operation) => Ok(operation),
            Err(HypervisorError::WrongState { .. } | HypervisorError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn operation(domain: &virt::domain::Domain) -> Result<Option<&'static str>, Error> {
    let (mut kind, mut count, mut operation): (c_int, c_int, c_int) = (0, 0, 0);
    let mut stats: sys::virTypedParameterPtr = ptr::null_mut();
    // SAFETY: all pointers outlive the call; libvirt allocates the array, which is freed below.
    let asked = unsafe { sys::virDomainGetJobStats(domain.as_ptr(), &mut kind, &mut stats, &mut count, 0) };
    if asked < 0 {
        return Err(Error::last_error());
    }
    // SAFETY: `stats` holds `count` parameters (null where that is 0, which libvirt allows); the name ends with a NUL.
    unsafe {
        sys::virTypedParamsGetInt(stats, count, c"operation".as_ptr(), &mut operation);
        sys::virTypedParamsFree(stats, count);
    }
    let kind = u32::try_from(kind).unwrap_or(sys::VIR_DOMAIN_JOB_NONE);
    let running = matches!(kind, sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED);
    Ok(running.then(|| name(u32::try_from(operation).unwrap_or_default())))
}

fn name(operation: u32) -> &'static str {
    match operation {
        sys::VIR_DOMAIN_JOB_OPERATION_START => "start",
        sys::VIR_DOMAIN_JOB_OPERATION_SAVE => "save",
        sys::VIR_DOMAIN_JOB_OPERATION_RESTORE => "restore",
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN => "incoming migration",
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT => "migration",
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT => "snapshot",
        sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT => "snapshot revert",
        sys::VIR_DOMAIN_JOB_OPERATION_DUMP => "dump",
        sys::VIR_DOMAIN_JOB_OPERATION_BACKUP => "backup",
        _ => "job",
    }
}
