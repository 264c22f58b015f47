//! From changed pages to the wire: [`delta`] leaves out what the site holds, over [`base_cache`]; [`seal`] compresses, as
//! hard as [`level`] says, [`budget`] bounds what all VMs hold, [`turns`] decides whose frame is next within [`limit`]s,
//! [`uplink`] keeps the link and its streams.

pub mod base_cache;
pub mod budget;
pub mod delta;
pub mod inventory;
pub mod level;
pub mod limit;
pub mod seal;
pub mod spare;
pub mod turns;
pub mod uplink;
