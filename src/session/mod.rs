//! The conversation about points as state machines: no sockets, no clock, no store of their own.
//! Events go in, actions come out; the daemons and the simulation perform them.
//! Read [`sender`] (the agent's half), then [`receiver`] (the site's), with [`frames`] as their bookkeeping.

pub mod frames;
pub mod receiver;
pub mod sender;
