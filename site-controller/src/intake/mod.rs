//! Taking in what agents send: [`listener`] admits connections, [`session`] speaks with one agent, [`slot`] holds one
//! VM's open point and drives the store, [`board`] remembers what agents report.

pub mod board;
pub mod listener;

pub mod session;
pub mod slot;
