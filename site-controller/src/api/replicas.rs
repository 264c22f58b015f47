//! The folders of replicas at this site, and removing those that nobody needs.

use super::{
    failovers::failover_error,
    site::{Site, catalog_error},
    types::{ReplicaList, ReplicaRow},
};
use crate::failover::folders::Folder;
use axum::{Json, extract::State};
use lifeboat::{id::VmId, local_api::ApiError};
use std::{collections::BTreeMap, sync::Arc};

pub(super) async fn list(State(site): State<Arc<Site>>) -> Result<Json<ReplicaList>, ApiError> {
    let folders = site.runbook.folders().await.map_err(|error| failover_error(&error))?;
    named(&site, folders).await
}

pub(super) async fn prune(State(site): State<Arc<Site>>) -> Result<Json<ReplicaList>, ApiError> {
    let gone = site.runbook.remove_unneeded().await.map_err(|error| failover_error(&error))?;
    named(&site, gone).await
}

async fn named(site: &Site, folders: Vec<Folder>) -> Result<Json<ReplicaList>, ApiError> {
    let vms = site.runbook.catalog.vms().await.map_err(catalog_error)?;
    let names: BTreeMap<VmId, String> = vms.into_iter().map(|vm| (vm.vm, vm.name)).collect();
    let row = |folder: Folder| ReplicaRow { name: names.get(&folder.vm).cloned(), folder };
    Ok(Json(ReplicaList { replicas: folders.into_iter().map(row).collect() }))
}
