//! Bringing a VM back at this site: [`runbook`] walks the steps (`steps`), [`journal`] remembers them, [`preflight`] asks
//! first whether it can work, [`images`] makes disks and memory from the store in the folder of an [`attempt`],
//! [`replica_xml`] adapts the definition, [`addresses`] gives it other addresses where it is to have them, [`afterwards`] sees
//! to what a guest that goes on from an older instant needs ([`outcome`] is what became of each of these things), `cold_boot`
//! to one that does not go on, `waits` looks whether it is up, [`progress`] tells whoever watches, to its [`report`] or its
//! [`error`], [`stonith`] ends the source by an operator's command, [`undo`] takes a completed failover to another point,
//! [`folders`] tells which replicas' disks nobody needs any more; [`group`] does it for several VMs, planned or not. [`hosts`]
//! are those that replicas run on; where there are several, [`placing`] decides which replica goes to which (`placement` is the
//! decision itself, `probe` what it shows hosts, [`qemu_version`] whether their QEMU is a doubtful one).

pub mod addresses;
pub mod afterwards;
pub mod attempt;
mod cold_boot;
pub mod error;
pub mod folders;
pub mod group;
pub mod hosts;
pub mod huge_pages;
pub mod images;
pub mod journal;
pub mod outcome;
mod placement;
pub mod placing;
pub mod preflight;
mod probe;
pub mod progress;
pub mod qemu_version;
pub mod replica_xml;
mod replicas;
pub mod report;
pub mod runbook;
mod sources;
pub mod steps;
pub mod stonith;
pub mod undo;
mod waits;
