//! Which failover put a copy on this host, by the label on its domain. Promises: what can't be asked is an error, and never
//! taken for a copy without a label. Called by `keeper`.

use lifeboat::{
    hypervisor::{
        domain_xml::label,
        libvirt::{Domain, HypervisorError, XmlView},
    },
    units::Generation,
};

/// Of the copy that is here now: the one that runs or stands, else the one that would be started.
pub fn of(domain: &Domain) -> Result<Option<Generation>, HypervisorError> {
    let view = if domain.state()?.is_active() { XmlView::Active } else { XmlView::Inactive };
    Ok(label::of(&domain.xml(view)?))
}
