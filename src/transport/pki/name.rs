//! Names that certificates carry. Promises: a name that exists is short, printable and safe in a path or a log line.

use super::PkiError;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Who an agent is: the common name of its certificate.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentName(String);

impl AgentName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AgentName {
    type Err = PkiError;
    fn from_str(given: &str) -> Result<Self, PkiError> {
        check(given).map(|()| Self(given.to_owned()))
    }
}

impl TryFrom<String> for AgentName {
    type Error = PkiError;
    fn try_from(given: String) -> Result<Self, PkiError> {
        given.parse()
    }
}

impl From<AgentName> for String {
    fn from(name: AgentName) -> Self {
        name.0
    }
}

impl fmt::Display for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The rule for agents' and sites' names alike.
pub(super) fn check(given: &str) -> Result<(), PkiError> {
    let fits = (1..=NAME_MAX).contains(&given.len());
    let starts = given.starts_with(|first: char| first.is_ascii_alphanumeric());
    if fits && starts && given.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Ok(());
    }
    Err(PkiError::BadName {
        given: given.escape_default().take(80).collect(),
        why: "is no usable name; take 1 to 63 letters, digits, `-`, `_` or `.`, starting with a letter or digit",
    })
}

const NAME_MAX: usize = 63;
