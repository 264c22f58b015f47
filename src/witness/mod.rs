//! The witness: a third party that both the source's host and the site can ask, and that keeps two things of each VM: a
//! *word* (whose it is), and whether the *lease* of the host that keeps it is alive.
//! Promises: a word is changed only by whoever has seen the one before, so that of two who would take a VM one does; the site
//! takes it only while the lease is gone, in the same step. Whose lease it was can't come back after that. A witness that
//! can't be asked says nothing. See docs/decisions/0044-a-witness-and-two-leases.md. Called by both daemons; [`etcd`] is the
//! one that there is.

pub mod config;
pub mod etcd;

use crate::{error::chain, id::VmId, local_api::ClientError, units::Generation};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf, time::Duration};

/// Of one host, for one VM. Alive as long as it is renewed within its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// Which word was seen; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// Whose a VM is. It stays until somebody says another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Word {
    /// This agent's host runs it, and lets it stand before its lease can run out.
    Kept { agent: String, generation: Generation },
    /// This agent does not promise that: nobody takes the VM by himself.
    Free { agent: String, generation: Generation },
    /// The site fails it over, under this generation. `claim` tells two claims apart.
    Claimed { site: String, claim: String, generation: Generation },
}

impl Word {
    pub fn generation(&self) -> Generation {
        match self {
            Self::Kept { generation, .. }
            | Self::Free { generation, .. }
            | Self::Claimed { generation, .. } => *generation,
        }
    }
}

/// What the witness knows of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub word: Option<Word>,
    pub revision: Revision,
    /// A host's lease is alive.
    pub leased: bool,
}

/// What becomes of the lease together with the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leasing {
    /// It is this one from now on.
    Bind(LeaseId),
    /// There is none any more.
    Drop,
    /// There must be none.
    Gone,
}

/// Another word in the place of the one that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub vm: VmId,
    pub over: Revision,
    pub word: Word,
    pub leasing: Leasing,
}

#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    #[error("the witness does not answer: {}", chain(.0))]
    Unreachable(#[from] ClientError),
    #[error("the witness did not answer in time")]
    Late,
    /// It answered, and would or could not. `code`: gRPC's.
    #[error("the witness says: {words}")]
    Said { code: Option<u64>, words: String },
    #[error("the witness said what makes no sense: {0}")]
    Malformed(String),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("no endpoint of the witness is configured")]
    NoEndpoint,
}

impl WitnessError {
    /// It has said no: what was asked has not been done. Of the others nobody knows.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Said { code: Some(code), .. } if REFUSALS.contains(code))
    }
}

/// gRPC's numbers of what is said before anything is done: an argument is wrong, there is no such lease, permission is missing,
/// it can't be done as things are, nobody has logged in.
const REFUSALS: [u64; 5] = [3, 5, 7, 9, 16];

/// What is asked of a witness. Each answer is no older than its question.
#[async_trait]
pub trait Witness: Send + Sync {
    /// A lease that lasts no less than `ttl` from now on.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, WitnessError>;
    /// Begins its time anew; `false`: it has run out.
    async fn renew(&self, lease: LeaseId) -> Result<bool, WitnessError>;
    async fn look(&self, vms: &[VmId]) -> Result<Vec<Entry>, WitnessError>;
    /// All of it or nothing; `None`: it is not as was seen.
    async fn change(&self, changes: &[Change]) -> Result<Option<Revision>, WitnessError>;
}
