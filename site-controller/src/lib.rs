//! The site controller.

pub mod restore;
pub mod store;
