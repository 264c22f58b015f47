//! Cutting points of a running guest.
//! [`source`] is the contract that protection relies on; [`guest`] is its one real implementation, made of
//! [`memory`], [`disk`] (over [`lifeboat::nbd`]), the pause ([`quiesce`]), and file systems frozen for it ([`freeze`]).

pub mod disk;
pub mod freeze;
pub mod guest;
pub mod meeting;
pub mod memory;
pub mod others;
pub mod quiesce;
pub mod source;
