//! Failovers for trial: the replicas of a group, or of a VM, are started beside whatever runs, under other names, and are
//! gone afterwards; what they showed is kept. Owns `data_dir/drills`.
//! Promises: nothing of the VM's changes by it: no generation, no owner, no journal of a failover; its history is only
//! read. What a drill makes is written down before it is made, so that nothing of it is left, whoever dies when. [`run`]
//! leads one, `hosts` says where, `stage` brings up one replica, `evidence` keeps what it showed, `teardown` removes all
//! of it, [`schedule`] begins those that are due, [`record`] is what is remembered. Called by `api` and `daemon`.

mod evidence;
mod hosts;
pub mod record;
pub mod run;
pub mod schedule;
mod stage;
mod teardown;

pub use record::{DrillBook, DrillRecord, DrillState, LastDrill};
pub use run::{DrillError, Driller};
