//! Hand-overs: a VM that this site once had, or fenced, is another site's again, and that site's agent protects it to here.
//! Two halves: [`claim`], at the site where the VM runs now, and [`accept`], at the one that is to be protected to.
//! Promises: generations order all failovers and hand-overs of a VM over both sites, so that of two sites that both have
//! had it only the later one's claim counts; nothing changes hands while the VM runs here; what the replica here wrote is
//! taken in as a seed first; each step may be done again, and a controller that dies in between is followed by the same
//! command. Called by `api`.

mod accept;
mod claim;

use crate::{
    catalog::CatalogError,
    failover::{error::FailoverError, hosts::HostError, journal::JournalError, runbook::Runbook},
    seed::{SeedError, SeedProgress, SeedReport, Seeder},
    store::StoreError,
};
use lifeboat::{
    id::{PointId, VmId},
    units::{Generation, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A site's word that a VM runs there since it was failed over to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Claim {
    pub site: String,
    pub vm: VmId,
    pub name: String,
    /// Of the failover.
    pub generation: Generation,
    pub point: PointId,
    pub running_at: Option<UnixMs>,
}

/// `POST /v1/handovers`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Acceptance {
    /// Name or UUID; where a claim is given, the claim's.
    pub vm: String,
    /// Without one it is the operator's word.
    #[serde(default)]
    pub claim: Option<Claim>,
    /// Whose points are taken from now on; where it is left out, the only agent that watches the VM.
    #[serde(default)]
    pub agent: Option<String>,
    /// Leave the disks that lie here alone.
    #[serde(default)]
    pub no_seed: bool,
}

/// One line of what an acceptance answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum AcceptLine {
    Step {
        step: String,
    },
    Seeding(SeedProgress),
    /// The last line.
    Done {
        report: AcceptReport,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AcceptReport {
    pub vm: VmId,
    pub name: String,
    /// Whose points are taken; `None`: of whoever is first, as nobody has written any.
    pub agent: Option<String>,
    pub generation: Generation,
    pub seed: Option<SeedReport>,
}

#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("{name} was never failed over to this site; only the site where it runs can claim it")]
    NotHere { name: String },
    #[error("{name} was failed over to this site, but it is {state} here now")]
    NotRunning { name: String, state: String },
    #[error(
        "{name} was handed over to another site since it was failed over to this one (generation {ours}, then {now})"
    )]
    GivenAway { name: String, ours: Generation, now: Generation },
    #[error(
        "{site} claims {name} with generation {theirs}, and this site has seen generation {ours}: it was failed over or \
         handed over since. The copy at {site} is not the right one"
    )]
    Outdated { site: String, name: String, theirs: Generation, ours: Generation },
    #[error("a failover of {name} to this site is unfinished; finish it, or move its journal away")]
    Unfinished { name: String },
    #[error("{0}")]
    WhichAgent(String),
    #[error("{0}")]
    Held(String),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Seed(#[from] SeedError),
    #[error(transparent)]
    Failover(Box<FailoverError>),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Host(#[from] HostError),
}

impl From<FailoverError> for HandoverError {
    fn from(error: FailoverError) -> Self {
        Self::Failover(Box::new(error))
    }
}

/// Hands VMs over at this site.
#[derive(Clone)]
pub struct Handovers {
    /// This site's name.
    pub site: String,
    pub runbook: Arc<Runbook>,
    pub seeder: Seeder,
}
