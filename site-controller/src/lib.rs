//! The site controller: stores recovery points and resumes replicas.
//!
//! Imports point right: `main → restore, verify → catalog → store → lifeboat`.

pub mod catalog;
pub mod restore;
pub mod store;
pub mod verify;
