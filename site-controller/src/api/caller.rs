//! Who makes a call.

use super::role::Role;
use lifeboat::local_api::Origin;
use std::fmt;

/// Who asks; each request that was let in bears it as an extension.
#[derive(Clone, Debug)]
pub struct Caller {
    pub who: Who,
    pub role: Role,
    pub origin: Origin,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// A user of this machine, through the socket.
    Local { uid: Option<u32> },
    /// Nobody: the site by itself, as a witness let it.
    Witness,
    /// The holder of a token.
    Token { name: String, id: String },
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.who {
            Who::Local { uid: Some(uid) } => write!(f, "uid {uid}"),
            Who::Local { uid: None } => f.write_str("a user of this machine"),
            Who::Witness => f.write_str("witness"),
            Who::Token { name, id } => write!(f, "token {name} ({id})"),
        }
    }
}
