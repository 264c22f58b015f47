//! Ranges of an address space and what they hold. Pure values.

pub mod overlay;
