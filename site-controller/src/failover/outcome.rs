//! What became of one thing that was to be done for a replica that runs: its clock, its network, its addresses, a hook.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// One thing that was to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Afterwards {
    pub what: String,
    pub done: bool,
    /// Why not; or how, where there is something to say.
    pub why: Option<String>,
}

impl Afterwards {
    pub(super) fn of(what: &str, outcome: Result<Option<String>, String>) -> Self {
        let what = what.to_owned();
        match outcome {
            Ok(why) => Self { what, done: true, why },
            Err(why) => Self { what, done: false, why: Some(why) },
        }
    }
}

impl fmt::Display for Afterwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = if self.done { "done" } else { "NOT done" };
        write!(f, "{}: {done}", self.what)?;
        self.why.as_ref().map_or(Ok(()), |why| write!(f, " ({why})"))
    }
}
