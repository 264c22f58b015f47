//! The one home of the `virt` crate: connections, domains, their monitors and their events.
//! Promises: handles are `Clone + Send + Sync` and outlive libvirtd: a call after a restart reconnects by itself.
//! Every call blocks, for as long as libvirtd and QEMU take: call from a blocking thread, never from a task.
//! Called by the agent's capture and watchdog, and by the site's failovers and drills.

mod connection;
mod domain;
mod error;
mod events;
mod host;
mod job;
mod lookup;
mod off;
mod process;
mod storage;
mod trial;

pub use connection::{Hypervisor, host_of};
pub use domain::{Domain, DomainAgent, DomainMonitor, DomainState, StartAs, XmlView};
pub use error::HypervisorError;
pub use events::{DomainEvent, Happened};
pub use host::{Load, Machine};
pub use job::{MIGRATION_OUT, SAVE};
pub use off::Off;
pub use process::QemuProcess;
pub use trial::Picture;
