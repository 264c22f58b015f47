//! Keeping VMs under a witness: a VM that is *bound* may run only while one of two leases holds, that at the witness or the
//! site's promise, both counted from before they were asked for. Decision 0044 has the reasons.
//! Promises: a VM is bound, durably, before the witness may say that it is kept, and until it surely does not; the word
//! at the witness is another agent's or the site's only where it can't be ours again. [`hold`] decides, [`files`] is
//! what the guard and libvirt's hook go by, [`keeping`] asks the witness. What follows for the guest is `fence`'s
//! affair.

pub mod files;
pub mod hold;
pub mod keeping;
