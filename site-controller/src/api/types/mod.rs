//! What the API takes and gives. Times are milliseconds since 1970 UTC; sizes are bytes. One file for each family of routes.

mod audit;
mod failovers;
mod groups;
mod points;
mod replicas;
mod report;
mod seeds;
mod status;
mod tokens;
mod verify;

pub use audit::*;
pub use failovers::*;
pub use groups::*;
pub use points::*;
pub use replicas::*;
pub use report::*;
pub use seeds::*;
pub use status::*;
pub use tokens::*;
pub use verify::*;
