//! QEMU's and libvirt's own byte formats: the migration stream ([`stream`]) and libvirt's save image ([`save_image`]).
//! Promises: pure; what is read is bounded and refused with an error, never believed. Called by the agent's memory
//! capture (parse) and by the site's restore (compose).

pub mod save_image;
pub mod stream;
