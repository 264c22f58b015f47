//! QEMU's and libvirt's own byte formats: the migration stream ([`stream`]), libvirt's save image ([`save_image`]), and
//! what the header of a qcow2 image says of other files ([`qcow2`]).
//! Promises: pure; what is read is bounded and refused with an error, never believed. Called by the agent's memory
//! capture (parse) and by the site's restore (compose).

pub mod qcow2;
pub mod save_image;
pub mod stream;
