//! Taking in what agents send: [`listener`] admits connections, [`session`] speaks with one agent, [`slot`] holds one
//! VM's open point and drives the store, [`compare`] tells agents how the newest point differs from their guest, [`board`]
//! remembers what they report, [`owner`] says which of them may write a VM's history, [`switchboard`] which host has which
//! VM, and takes orders there.

pub mod board;
pub mod compare;
pub mod listener;
pub mod owner;
pub mod promises;
pub mod session;
pub mod slot;
pub mod switchboard;
