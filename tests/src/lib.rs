//! The rig: two sites on one machine, a shaped link between them, guests that can testify, and ways to
//! break it all.
//!
//! Drives the product as it ships, as binaries; depends on none of its crates. Reading order: [`Rig`] makes
//! sites and takes everything down, [`Site`] is a machine of its own (namespaces and a libvirtd) that can
//! lose power, [`Link`] is the WAN, [`Guest`] and [`Report`] are the witness, [`eventually`] is how
//! anything here waits. Used by `tests/tests/*` and the demo. Needs root and what `tests/setup.sh` fetched.

mod accel;
mod console;
pub mod database;
pub mod ends;
mod guest;
mod link;
mod log;
mod long_line;
pub mod older_qemu;
mod owners;
mod paths;
mod proc;
pub mod product;
mod rig;
mod second_host;
mod site;
mod spec;
pub mod stillness;
pub mod strikes;
mod wait;
mod watchdogs;

pub use accel::Accel;
pub use console::{Console, Report};
pub use guest::Guest;
pub use link::{Carried, Link, Shape};
pub use log::LogLine;
pub use long_line::LongLine;
pub use paths::{Assets, binary, target_dir};
pub use proc::{Cmd, Output, Proc, is_frozen};
pub use rig::Rig;
pub use second_host::SecondHost;
pub use site::Site;
pub use spec::{DiskFormat, DiskSpec, GuestSpec};
pub use wait::{eventually, patience, tail};
