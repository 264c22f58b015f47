//! At which hosts the replicas of a drill run, and what of them is removed there again.
//! Promises: a host is written down before anything is made at it. Called by `run` and `teardown`.

use super::{
    record::{DrillMember, DrillRecord},
    run::{DrillError, Driller},
};
use crate::{
    failover::{
        error::FailoverError,
        hosts::{Host, HostError},
        journal::Manner,
        placing::Wanted,
        progress::Watcher,
    },
    group::GroupSpec,
};
use lifeboat::hypervisor::libvirt::{Hypervisor, HypervisorError};
use std::collections::BTreeSet;

impl Driller {
    /// Where the site has several.
    pub(super) async fn choose_hosts(
        &self,
        record: &mut DrillRecord,
        spec: &GroupSpec,
        watcher: &Watcher,
    ) -> Result<(), DrillError> {
        let hosts = &self.runbook.hosts;
        if !hosts.are_several() {
            return Ok(());
        }
        self.step(record, watcher, "choosing hosts")?;
        let own = record.network.as_ref().filter(|network| network.ours).map(|network| network.name.clone());
        let mut wanted = Vec::new();
        for member in &record.members {
            let needs = self.needs(record, member).await?.0;
            wanted.push(Wanted {
                vm: member.as_vm,
                name: member.as_name.clone(),
                needs: if member.left_off { needs.idle() } else { needs },
                hosts: Manner::of(spec, &member.name).hosts,
                before: None,
                own_network: own.clone(),
            });
        }
        let placement = hosts.place(&wanted, &self.runbook.replica_dir, true).await?;
        let over = placement.passed_over.iter();
        record.notes.extend(over.map(|over| format!("host {} was passed over: {}", over.host, over.why)));
        for (member, placed) in record.members.iter_mut().zip(placement.placed) {
            member.host = placed;
        }
        let names: BTreeSet<&str> = record.members.iter().filter_map(DrillMember::host_name).collect();
        if own.is_some() && names.len() > 1 {
            let note = "its replicas are at several hosts, each with an isolated network of its own: they do not reach each other";
            record.notes.push(note.into());
        }
        self.book.save(record)?;
        record.members.iter().for_each(|member| hosts.confirm(member.as_vm));
        Ok(())
    }

    /// The hosts at which there may be something of it.
    pub(super) fn hosts_of(&self, record: &DrillRecord) -> Result<Vec<&Host>, HostError> {
        let hosts = &self.runbook.hosts;
        let mut found: Vec<&Host> = Vec::new();
        for member in &record.members {
            match (&member.host, hosts.are_several()) {
                // It ended before a host was chosen, or it is of a time when there was one only.
                (None, true) => return Ok(hosts.all().iter().collect()),
                (host, _) => {
                    let host = hosts.at(host.as_ref())?;
                    if !found.iter().any(|known| known.name == host.name) {
                        found.push(host);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Ends all replicas of it that are at these hosts. A host at which nothing of it was begun need not answer.
    pub(super) async fn end_replicas(
        &self,
        record: &DrillRecord,
        hosts: &[&Host],
    ) -> Result<(), FailoverError> {
        for host in hosts {
            let replicas: Vec<_> = record.members.iter().map(|member| member.as_vm).collect();
            let ended = host
                .work(move |hypervisor| replicas.iter().try_for_each(|replica| end(hypervisor, *replica)));
            match ended.await {
                Err(FailoverError::Host(error @ HostError::Away { .. })) if !record.is_at(&host.name) => {
                    tracing::warn!(%error, drill = record.id, "whether anything of a drill is there is not known");
                }
                ended => ended?,
            }
        }
        Ok(())
    }
}

fn end(hypervisor: &Hypervisor, replica: lifeboat::id::VmId) -> Result<(), FailoverError> {
    let gone = |error: HypervisorError| match error {
        // It ended by itself meanwhile; nowhere defined, it is gone then.
        HypervisorError::NotFound { .. } | HypervisorError::WrongState { .. } => Ok(()),
        error => Err(error.into()),
    };
    match hypervisor.domain_by_uuid(replica) {
        Ok(domain) => domain.destroy().or_else(gone),
        Err(error) => gone(error),
    }
}
