//! Protection groups: VMs that are protected, and fail over, as one.
//! Owns `data_dir/groups`. [`spec`] is what an operator writes, [`book`] what is remembered of it. Called by `api` and
//! `daemon`.

pub mod book;
pub mod spec;

pub use book::{Book, BookError, Group, MemberVm};
pub use spec::{GroupSpec, SpecError};
