//! The site controller as a library: it takes in what agents send ([`intake`]), keeps it ([`store`], [`catalog`]), proves
//! it ([`verify`]), and brings VMs back ([`restore`], [`failover`]). [`api`] serves the operator's commands.

pub mod failover;
pub mod intake;
pub mod restore;
pub mod store;
