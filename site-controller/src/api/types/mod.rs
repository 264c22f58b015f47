//! What the API takes and gives. Times are milliseconds since 1970 UTC; sizes are bytes. One file for each family of routes.

mod failovers;
mod points;
mod status;
mod verify;

pub use failovers::*;
pub use points::*;
pub use status::*;
pub use verify::*;
