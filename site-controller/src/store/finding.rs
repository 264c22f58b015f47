//! What reopening or verifying found wrong, for people and for `--json`.

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
