//! Cutting points of a running guest.
//! [`source`] is the contract that protection relies on; [`disk`] marks and reads disks, over [`nbd`].

pub mod disk;
pub mod nbd;
pub mod source;
