//! Protection groups: VMs that are protected, and fail over, as one. Owns `data_dir/groups` and `data_dir/group-points`.
//! [`spec`] is what an operator writes, [`address_spec`] a part of it whose meaning is in [`addresses`], [`book`] what
//! is remembered of it, [`coordinator`] leads the cuts of all members at one instant, which [`cut`] decides, and
//! [`points`] lists them.
//! Called by `api`, `failover` and `daemon`.

pub mod address_spec;
pub mod addresses;
pub mod book;
pub mod coordinator;
pub mod cut;
pub mod points;
pub mod spec;

pub use book::{Book, BookError, Group, MemberVm};
pub use spec::{GroupSpec, SpecError};
