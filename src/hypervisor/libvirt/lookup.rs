//! The domains of a libvirtd: by name, by UUID, all, and new ones.

use super::{connection::Hypervisor, domain::Domain, error::HypervisorError};
use crate::id::VmId;

impl Hypervisor {
    pub fn domain_by_name(&self, name: &str) -> Result<Domain, HypervisorError> {
        let what = format!("domain `{name}`");
        let uuid = self.with(&what, |link| link.connect.lookup_domain_by_name(name)?.uuid_string())?;
        Domain::attach(self.clone(), parse_uuid(&what, &uuid)?)
    }

    pub fn domain_by_uuid(&self, vm: VmId) -> Result<Domain, HypervisorError> {
        Domain::attach(self.clone(), vm)
    }

    /// A domain by name or, where no domain has that name, by UUID.
    pub fn domain(&self, name_or_uuid: &str) -> Result<Domain, HypervisorError> {
        match (self.domain_by_name(name_or_uuid), name_or_uuid.parse()) {
            (Err(HypervisorError::NotFound { .. }), Ok(vm)) => self.domain_by_uuid(vm),
            (found, _) => found,
        }
    }

    /// All domains, running or not.
    pub fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        let what = "listing domains";
        let uuids = self.with(what, |link| {
            link.connect
                .list_all_domains(0)?
                .iter()
                .map(virt::domain::Domain::uuid_string)
                .collect::<Result<Vec<_>, _>>()
        })?;
        let attached = uuids.iter().map(|uuid| Domain::attach(self.clone(), parse_uuid(what, uuid)?));
        // A domain may go away between the list and the look at it.
        attached.filter(|domain| !matches!(domain, Err(HypervisorError::NotFound { .. }))).collect()
    }

    /// Defines (or redefines) a persistent domain.
    pub fn define(&self, xml: &str) -> Result<Domain, HypervisorError> {
        let what = "defining a domain";
        let uuid = self.with(what, |link| link.connect.define_domain_xml(xml)?.uuid_string())?;
        Domain::attach(self.clone(), parse_uuid(what, &uuid)?)
    }
}

fn parse_uuid(what: &str, uuid: &str) -> Result<VmId, HypervisorError> {
    uuid.parse().map_err(|_| HypervisorError::Refused {
        what: what.into(),
        words: format!("it gave `{uuid}` as a UUID"),
    })
}
