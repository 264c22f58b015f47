//! From what an operator asks to what is read: which VM, which files. Promises: nothing is read but what was named, or what
//! libvirt's definition of that very VM names. Called by `api` and `handover`.

use super::{
    Order, SeedError, Seeder,
    disks::{self, DiskFile},
};
use crate::{
    catalog::{Catalog, CatalogError},
    failover::hosts::HostError,
    intake::board::Board,
};
use lifeboat::{
    hypervisor::{
        domain_xml::DomainSpec,
        libvirt::{Hypervisor, HypervisorError, XmlView},
    },
    id::VmId,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf};

/// `POST /v1/seeds`. Disks are named one by one, or by a folder that holds them; where neither is given they are those of
/// the domain that libvirt has here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SeedRequest {
    /// Name or UUID; of a VM that this site has never heard of, the UUID.
    pub vm: String,
    /// What to call a VM that this site has never heard of.
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub disks: Vec<DiskFile>,
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// The domain's name, where it is not the VM's.
    #[serde(default)]
    pub domain: Option<String>,
}

/// What libvirt has of a VM here.
struct Defined {
    spec: DomainSpec,
    xml: String,
    /// The host, if it is another than this one.
    elsewhere: Option<String>,
}

impl Seeder {
    pub async fn order(
        &self,
        request: SeedRequest,
        catalog: &Catalog,
        board: &Board,
    ) -> Result<Order, SeedError> {
        let known = self.known(&request.vm, catalog, board).await?;
        let wanted = request.domain.clone().unwrap_or_else(|| match known.as_ref() {
            Some((vm, _)) => vm.to_string(),
            None => request.vm.clone(),
        });
        let defined = self.defined(wanted).await?;
        let (vm, name) = match (known, &defined, request.vm.parse(), request.name) {
            (Some(known), ..) => known,
            (None, Some(defined), ..) if request.domain.is_none() => {
                (defined.spec.uuid, defined.spec.name.clone())
            }
            (None, _, Ok(vm), Some(name)) => (vm, name),
            (None, ..) => {
                let why = format!("no VM here is called `{}`; give its UUID, and --name", request.vm);
                return Err(SeedError::Disks(why));
            }
        };
        if let Some(other) = defined.as_ref().filter(|defined| defined.spec.uuid != vm) {
            let why =
                format!("domain {} has another UUID ({}) than {name}", other.spec.name, other.spec.uuid);
            return Err(SeedError::Disks(why));
        }
        let disks = match (request.disks, request.dir, &defined) {
            (disks, None, _) if !disks.is_empty() => disks,
            (none, Some(dir), _) if none.is_empty() => blocking(move || disks::in_folder(&dir)).await?,
            (none, None, Some(defined)) if none.is_empty() => self.disks_of(defined)?,
            (none, None, None) if none.is_empty() => {
                let why = format!(
                    "libvirt has no domain of {name} here; name its disks, or a folder that holds them"
                );
                return Err(SeedError::Disks(why));
            }
            _ => return Err(SeedError::Disks("name disks or a folder, not both".into())),
        };
        Ok(Order { vm, name, disks, definition: defined.map(|defined| defined.xml) })
    }

    /// The disks that libvirt's definition of the VM names here; `None` without one.
    pub async fn own_disks(&self, vm: VmId, name: &str) -> Result<Option<Order>, SeedError> {
        let Some(defined) = self.defined(vm.to_string()).await? else { return Ok(None) };
        let disks = self.disks_of(&defined)?;
        Ok(Some(Order { vm, name: name.to_owned(), disks, definition: Some(defined.xml) }))
    }

    async fn known(
        &self,
        given: &str,
        catalog: &Catalog,
        board: &Board,
    ) -> Result<Option<(VmId, String)>, SeedError> {
        match catalog.find_vm(given).await {
            // One that has a generation and no point is called by its id; an agent may know better.
            Ok(found) if found.latest.is_some() => return Ok(Some((found.vm, found.name))),
            Ok(_) | Err(CatalogError::NoVm { .. }) => {}
            Err(CatalogError::Store(error)) => return Err(error.into()),
            Err(error) => return Err(SeedError::Disks(error.to_string())),
        }
        let mut seen = board.all().into_iter();
        let meant = seen.find(|(vm, seen)| seen.name == given || vm.to_string() == given);
        Ok(meant.map(|(vm, seen)| (vm, seen.name)))
    }

    /// Where its failover put it, or else at the first host that has it.
    async fn defined(&self, name: String) -> Result<Option<Defined>, SeedError> {
        let Some(here) = &self.here else { return Ok(None) };
        let record = match name.parse::<VmId>() {
            Ok(vm) => here.journal.load(vm).map_err(HostError::from)?,
            Err(_) => None,
        };
        let placed = record.as_ref().and_then(|record| record.host.as_ref());
        let own = placed.map(|placed| here.hosts.at(Some(placed))).transpose()?;
        let others = here.hosts.all().iter().filter(|host| own.is_none_or(|own| own.name != host.name));
        for host in own.into_iter().chain(others) {
            let wanted = name.clone();
            let found = host.ask(move |hypervisor| {
                match find(hypervisor, &wanted).and_then(|domain| domain.xml(XmlView::Inactive)) {
                    Err(HypervisorError::NotFound { .. }) => Ok(None),
                    found => found.map(Some),
                }
            });
            let xml = match found.await {
                Ok(Some(xml)) => xml,
                Ok(None) => continue,
                Err(HostError::Away { .. }) if own.is_none_or(|own| own.name != host.name) => continue,
                Err(error) => return Err(error.into()),
            };
            let spec = DomainSpec::read(&xml).map_err(|error| SeedError::Disks(error.to_string()))?;
            let elsewhere = here.hosts.are_several() && !host.is_local();
            return Ok(Some(Defined { spec, xml, elsewhere: elsewhere.then(|| host.name.clone()) }));
        }
        Ok(None)
    }

    /// Of what another host has, only what it shares with this one can be read.
    fn disks_of(&self, defined: &Defined) -> Result<Vec<DiskFile>, SeedError> {
        let disks = disks::of_domain(&defined.spec)?;
        let (Some(host), Some(here)) = (&defined.elsewhere, &self.here) else { return Ok(disks) };
        match disks.iter().find(|disk| !disk.path.starts_with(&here.replica_dir)) {
            Some(disk) => Err(SeedError::Disks(format!(
                "disk {} ({}) is a file of host {host}, and not in `replica_dir`, which this one shares with it; name files that \
                 lie here, or go on without a seed (`--no-seed`)",
                disk.target,
                disk.path.display()
            ))),
            None => Ok(disks),
        }
    }
}

fn find(
    hypervisor: &Hypervisor,
    given: &str,
) -> Result<lifeboat::hypervisor::libvirt::Domain, HypervisorError> {
    match given.parse() {
        Ok(vm) => hypervisor.domain_by_uuid(vm),
        Err(_) => hypervisor.domain_by_name(given),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SeedError> + Send + 'static,
) -> Result<T, SeedError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| Err(SeedError::Died(io::Error::other(panic))))
}
