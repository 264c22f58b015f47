//! The site controller as a library: it takes in what agents send ([`intake`]), keeps it ([`store`], [`catalog`]), proves
//! it ([`verify`]), keeps it within bounds ([`retention`]), takes in disks that are here already ([`seed`]), knows which
//! VMs belong together ([`group`]), brings them back ([`restore`], [`failover`]), tries that out ([`drill`]), and knows
//! before whether it could ([`readiness`]), and does so by itself where it may ([`automatic`]); an auditor is told of all that
//! ([`report`]). [`api`] serves the operator's commands, which [`console`] shows; [`daemon`] wires the
//! rooms.

pub mod api;
pub mod automatic;
pub mod catalog;
pub mod config;
pub mod console;
pub mod daemon;
pub mod drill;
pub mod failover;
pub mod group;
pub mod handover;
pub mod intake;
pub mod readiness;
pub mod report;
pub mod restore;
pub mod retention;
pub mod seed;
pub mod setup;
pub mod store;
pub mod verify;
