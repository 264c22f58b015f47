//! Seeds: the shapes.

pub use crate::seed::request::SeedRequest;
use crate::seed::{SeedProgress, SeedReport};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One line of what `POST /v1/seeds` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum SeedLine {
    Progress(SeedProgress),
    /// The last line.
    Done {
        report: SeedReport,
    },
}
