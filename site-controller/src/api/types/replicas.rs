//! Folders of replicas.

use crate::failover::folders::Folder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/replicas`; of `POST /v1/replicas/prune`, those that were removed.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ReplicaList {
    pub replicas: Vec<ReplicaRow>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ReplicaRow {
    /// The VM's, if the site knows it.
    pub name: Option<String>,
    #[serde(flatten)]
    pub folder: Folder,
}
