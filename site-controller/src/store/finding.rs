//! What reopening or verifying found, and what reopening did, for people and for `--json`.

use lifeboat::{
    id::{PointId, VmId},
    units::Seq,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct PointRef {
    pub seq: Seq,
    pub point: PointId,
}

/// One thing that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Damage")]
pub struct Finding {
    pub vm: Option<VmId>,
    /// The point whose object it is, where that is known.
    pub point: Option<PointRef>,
    pub object: String,
    pub what: String,
    /// Points whose content runs through the damage. Restore refuses each of them that still needs what is damaged.
    pub affects: Vec<PointRef>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.what)?;
        match self.affects.as_slice() {
            [] => write!(f, " (no point is affected)"),
            [one] => write!(f, " (affects point {} of {})", one.seq, one.point.short()),
            [first, .., last] => {
                write!(f, " (affects {} points, seq {} to {})", self.affects.len(), first.seq, last.seq)
            }
        }
    }
}

/// What reopening found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReopenReport {
    pub vms: u64,
    pub points: u64,
    pub damaged_points: u64,
    pub partials_removed: u64,
    pub orphan_packs_removed: u64,
    /// Packs that no readable manifest names, kept because one that can't be read might.
    pub orphan_packs_kept: u64,
    /// Points, folds and records that had been pruned or replaced, and whose removal had not come to its end.
    pub leftovers_removed: u64,
    /// Entries that the index lacked or had wrong.
    pub index_entries_corrected: u64,
    pub findings: Vec<Finding>,
}
