//! From changed pages to the wire: [`seal`] compresses, [`limit`] paces, [`uplink`] keeps the link and its streams.

pub mod limit;
pub mod seal;
pub mod uplink;
