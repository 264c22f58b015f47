//! What travels on the control stream. Frames travel beside it, on data streams, as `format::frame` lays them out.
//! docs/wire-protocol.md tells the whole conversation.

pub mod compare;
pub mod message;
pub mod order;
