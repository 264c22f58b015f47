//! Cutting points of a running guest.
//! [`source`] is the contract that protection relies on.

pub mod source;
