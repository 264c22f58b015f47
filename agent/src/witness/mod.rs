//! Keeping VMs under a witness: a VM that is *bound* may run only while one of two leases holds, that at the witness or the
//! site's promise, both counted from before they were asked for. Decision 0044 has the reasons.
//! Promises: a VM is bound, durably, before the witness may say that it is kept, and until it surely does not; the word at
//! the witness is another agent's or the site's only where it can't be ours again. [`hold`] decides, [`files`] is what the guard
//! and libvirt's hook go by, [`keeping`] asks the witness. What follows for the guest is `fence`'s affair.

pub mod files;
pub mod hold;
pub mod keeping;

/// Milliseconds since the host was started, those included in which it slept.
pub fn boot_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes the one structure that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    // A clock that can't be read stands at the end of all deadlines.
    seconds.map_or(u64::MAX, |seconds| seconds * 1000 + nanos.unwrap_or_default() / 1_000_000)
}
