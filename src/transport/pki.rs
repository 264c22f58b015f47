//! Certificates: the site's authority (CA), the site's own certificate, and the agents' that it signs.
//! Owns the files in a site's and an agent's certificate directory. Promises: keys never leave the machine they were
//! made on and are readable by their owner only; a directory is complete or refused, never half used.
//! Called by both daemons at start, by `init` and by `enrol`.

mod agent;
mod certificate;
mod files;
mod name;
mod site;

pub use agent::AgentIdentity;
pub use certificate::Fingerprint;
pub use name::AgentName;
pub use site::{AGENT_VALIDITY, SiteIdentity};

pub(super) use agent::AgentKey;
pub(super) use certificate::{Facts, sha256};
pub(super) use files::{read_any_key, read_certificates, write_private};

use std::{io, path::PathBuf};

/// Why certificates could not be made, read or used; by who has to do something about it.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Nothing there yet: run the command that makes it.
    #[error("{path} is missing; {remedy}")]
    Missing { path: PathBuf, remedy: &'static str },
    /// Refused to overwrite what others trust already.
    #[error(
        "{dir} already holds a site's authority; agents trust it, so it is left alone (choose another directory)"
    )]
    Exists { dir: PathBuf },
    #[error("{path}: {step} failed")]
    Disk {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be: restore it, or make the identity anew.
    #[error("{path}: {why}")]
    Damaged { path: PathBuf, why: String },
    /// The operator gave a name or an address that a certificate can't carry.
    #[error("`{given}` {why}")]
    BadName { given: String, why: &'static str },
    /// A peer's request for a certificate was refused.
    #[error("certificate request refused: {0}")]
    BadRequest(&'static str),
    #[error("{step} failed")]
    Crypto {
        step: &'static str,
        #[source]
        source: rcgen::Error,
    },
}

#[cfg(test)]
mod tests;
