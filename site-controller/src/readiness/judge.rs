//! Looks at all that a failover of a group, or of a VM, depends on. Asks the store, libvirt and the agents' reports;
//! changes nothing. Called by `watch`, and by `api` through it.

use super::{
    FAILED_OVER, Finding, Readiness, UNDER_WAY, Verdict, Weight,
    drills::{self, Tried},
    rules,
};
use crate::{
    catalog::{CatalogError, PointSummary},
    drill::Driller,
    failover::{
        addresses::plan::Cards,
        hosts::HostError,
        journal::{Manner, Phase},
        preflight,
        qemu_version::Takes,
        replica_xml::Needs,
        runbook::Runbook,
    },
    group::{Group, coordinator::Coordinator},
    intake::board::Seen,
};
use lifeboat::{
    error::chain,
    hypervisor::libvirt::Hypervisor,
    id::{GroupId, VmId},
    units::UnixMs,
    wire::message::VmState,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// What it asks.
pub struct Judge {
    pub runbook: Arc<Runbook>,
    pub coordinator: Arc<Coordinator>,
    pub driller: Arc<Driller>,
    /// Free bytes below which the store takes no points.
    pub reserve: u64,
    pub certificate_expires: UnixMs,
}

/// A VM in what is looked at, and the point that a failover now would take.
pub(super) struct Member {
    pub(super) vm: VmId,
    pub(super) name: String,
    point: Option<PointSummary>,
    /// What its group's runbook says.
    pub(super) manner: Manner,
}

impl Judge {
    /// All groups, and all VMs that are in none.
    pub async fn all(&self) -> Result<Vec<Readiness>, CatalogError> {
        let mut found = Vec::new();
        let groups = self.coordinator.book.list();
        for group in &groups {
            found.push(self.group(group).await);
        }
        for summary in self.runbook.catalog.vms().await? {
            if !groups.iter().any(|group| group.members.iter().any(|member| member.vm == summary.vm)) {
                found.push(self.alone(summary.vm, summary.name, summary.latest).await);
            }
        }
        Ok(found)
    }

    /// A group by its name or id, or a VM.
    pub async fn one(&self, name: &str) -> Result<Readiness, CatalogError> {
        if let Ok(group) = self.coordinator.book.find(name) {
            return Ok(self.group(&group).await);
        }
        let summary = self.runbook.catalog.find_vm(name).await?;
        Ok(self.alone(summary.vm, summary.name, summary.latest).await)
    }

    async fn group(&self, group: &Group) -> Readiness {
        let mut findings = Vec::new();
        if group.paused {
            let what = format!("it is paused; `lifeboat group resume {}` goes on", group.spec.name);
            findings.push(Finding::new(Weight::Degrades, "paused", None, what));
        }
        let newest = match self.coordinator.points.newest(group).await {
            Ok((newest, _)) => newest,
            Err(error) => {
                findings.push(Finding::new(Weight::Blocks, "points", None, chain(&error)));
                None
            }
        };
        let mut members = Vec::new();
        for member in &group.members {
            let of = newest.as_ref().and_then(|newest| newest.members.iter().find(|of| of.vm == member.vm));
            let point = match of {
                Some(of) => self.runbook.catalog.find(member.vm, &of.point.to_string()).await.map(Some),
                None => Ok(None),
            };
            let point = point.unwrap_or_else(|error| {
                findings.push(Finding::new(
                    Weight::Blocks,
                    "point-damaged",
                    Some(&member.name),
                    chain(&error),
                ));
                None
            });
            let manner = Manner::of(&group.spec, &member.name);
            members.push(Member { vm: member.vm, name: member.name.clone(), point, manner });
        }
        let cut_at = newest.map(|newest| newest.cut_at);
        match cut_at {
            None => {
                let what = "there is no point of all its members yet; see `lifeboat group show`";
                findings.push(Finding::new(Weight::Blocks, "no-point", None, what));
            }
            Some(at) => findings.extend(rules::rpo(None, self.age(at), group.spec.rpo())),
        }
        let every = group.spec.drill.every.as_deref().filter(|_| !group.paused);
        findings.push(self.drilled(group.id, &group.spec.name, every, group.changed_at));
        self.conclude(&group.spec.name, true, members, cut_at, findings).await
    }

    async fn alone(&self, vm: VmId, name: String, latest: Option<PointSummary>) -> Readiness {
        let mut findings = Vec::new();
        let point = match self.runbook.catalog.find(vm, crate::failover::runbook::LATEST).await {
            Ok(point) => Some(point),
            Err(error) => {
                let code = if latest.is_some() { "point-damaged" } else { "no-point" };
                findings.push(Finding::new(Weight::Blocks, code, Some(&name), chain(&error)));
                None
            }
        };
        let report = self.runbook.intake.board.seen(vm).and_then(|seen| seen.report);
        let rests = |point: &PointSummary| {
            let seen = self.runbook.intake.board.seen(vm);
            point.at_rest && seen.as_ref().is_some_and(Seen::is_protected)
        };
        if let (Some(point), Some(report)) = (point.as_ref().filter(|point| !rests(point)), &report) {
            // Two intervals, and a second on the way: what an agent keeps up without trouble.
            let target = Duration::from_millis(report.interval_ms.saturating_mul(2).saturating_add(1000));
            findings.extend(rules::rpo(Some(&name), self.age(point.cut_at), target));
        }
        let as_group = Group::alone(vm, &name, self.runbook.clock.now());
        findings.push(self.drilled(as_group.id, &name, None, as_group.created_at));
        let cut_at = point.as_ref().map(|point| point.cut_at);
        let member = Member { vm, name: name.clone(), point, manner: Manner::default() };
        self.conclude(&name, false, vec![member], cut_at, findings).await
    }

    /// What its drills have shown.
    fn drilled(&self, group: GroupId, name: &str, every: Option<&str>, since: UnixMs) -> Finding {
        let drills = self.driller.book.of(group);
        drills::finding(name, &Tried { drills: &drills, every, since, now: self.runbook.clock.now() })
    }

    /// What is the same for a group and a VM.
    async fn conclude(
        &self,
        name: &str,
        is_group: bool,
        members: Vec<Member>,
        cut_at: Option<UnixMs>,
        mut findings: Vec<Finding>,
    ) -> Readiness {
        let (mut memory_bytes, mut disk_bytes) = (0u64, 0u64);
        let (several, mut wanted) = (self.runbook.hosts.are_several(), Vec::new());
        for member in &members {
            findings.extend(self.source(member));
            let failed_over = self.failed_over(member, &mut findings);
            let Some(point) = member.point.as_ref().filter(|_| !failed_over) else { continue };
            match self.runbook.needs_of(point, member.manner.clone()).await {
                Ok((needs, bytes)) => {
                    let addresses = member.manner.addresses.at(&self.runbook.site);
                    let cards = Cards::new(addresses, needs.wiring.clone(), member.vm, point.has_memory);
                    findings.extend(rules::addresses(&member.name, &cards));
                    memory_bytes = memory_bytes.saturating_add(needs.memory);
                    disk_bytes = disk_bytes.saturating_add(bytes);
                    if several {
                        wanted.push(member.wanted(point, needs));
                    } else {
                        findings.extend(self.place(member, needs).await);
                    }
                }
                Err(error) => {
                    findings.push(Finding::new(
                        Weight::Blocks,
                        "point-unreadable",
                        Some(&member.name),
                        chain(&error),
                    ));
                }
            }
        }
        if several {
            findings.extend(self.places(wanted).await);
        } else {
            findings.extend(rules::memory(memory_bytes, preflight::free_memory()));
        }
        findings.extend(members.iter().flat_map(|member| self.strangers(member)));
        if let Err(problem) = preflight::room(&self.runbook.replica_dir, disk_bytes) {
            let found = rules::preflight(name, &problem);
            findings.push(Finding { vm: None, ..found });
        }
        findings.extend(rules::certificate(self.certificate_expires, self.runbook.clock.now()));
        findings.extend(self.certificates_of_agents(&members));
        if let Ok(free) = self.runbook.store.objects().free_bytes().await {
            findings.extend(rules::store(free, self.reserve));
        }
        let readiness = Readiness {
            name: name.to_owned(),
            is_group,
            verdict: Verdict::Ready,
            findings,
            rpo_ms: cut_at.map(|at| u64::try_from(self.age(at).as_millis()).unwrap_or(u64::MAX)),
            memory_bytes,
            disk_bytes,
            checked_at: self.runbook.clock.now(),
        };
        readiness.concluded()
    }

    /// What its agent says.
    fn source(&self, member: &Member) -> Option<Finding> {
        let found = |code: &str, what: String| Finding::new(Weight::Degrades, code, Some(&member.name), what);
        let Some(seen) = self.runbook.intake.board.seen(member.vm).filter(|seen| seen.connected) else {
            return Some(found("agent-away", "no agent that has it is connected: points do not come".into()));
        };
        let report = seen.report?;
        let why = report.reason.map(|why| format!(": {why}")).unwrap_or_default();
        let off = member.point.as_ref().filter(|point| point.at_rest);
        let memory_missing = member.point.as_ref().is_some_and(|point| !point.has_memory);
        match (report.state, off) {
            (VmState::Degraded | VmState::Refused | VmState::Yielding, _) => {
                Some(found("agent", format!("its agent says `{}`{why}", report.state.as_str())))
            }
            (VmState::Protected, Some(point)) => {
                let then = if point.stays_off { "is defined, and not started" } else { "boots from them" };
                let what = format!(
                    "it is off, and its newest point is of its disks as they stand: the replica {then}"
                );
                Some(Finding::new(Weight::Note, "off", Some(&member.name), what))
            }
            _ if memory_missing => {
                let what = "its newest point is of its disks alone: the replica will boot, and not go on where it stood";
                Some(Finding::new(Weight::Note, "disks-only", Some(&member.name), what))
            }
            _ => None,
        }
    }

    fn certificates_of_agents(&self, members: &[Member]) -> Vec<Finding> {
        let (board, now) = (&self.runbook.intake.board, self.runbook.clock.now());
        let seen = members.iter().filter_map(|member| board.seen(member.vm));
        let agents: BTreeSet<String> = seen.map(|seen| seen.agent).collect();
        let ends = |agent: String| rules::agent_certificate(&agent, board.certificate_expires(&agent)?, now);
        agents.into_iter().filter_map(ends).collect()
    }

    /// Whether the VM is this site's already.
    fn failed_over(&self, member: &Member, findings: &mut Vec<Finding>) -> bool {
        let (code, what) = match self.runbook.journal.load(member.vm) {
            _ if self.runbook.is_under_way(member.vm) => {
                (UNDER_WAY, "a failover of it is under way".to_owned())
            }
            Ok(None) => return false,
            Ok(Some(record)) if record.phase == Phase::Running => {
                (FAILED_OVER, format!("it was failed over to this site, to its point of {}", record.cut_at))
            }
            Ok(Some(record)) => {
                let why = record.last_error.map(|why| format!(" ({why})")).unwrap_or_default();
                (
                    "failover-unfinished",
                    format!("a failover of it is begun and not finished{why}; run it again"),
                )
            }
            Err(error) => ("journal", chain(&error)),
        };
        findings.push(Finding::new(Weight::Blocks, code, Some(&member.name), what));
        true
    }

    /// What this site must have for the replica.
    async fn place(&self, member: &Member, needs: Needs) -> Vec<Finding> {
        let (vm, name) = (member.vm, member.name.clone());
        let look = move |hypervisor: &Hypervisor| -> Result<_, HostError> {
            let mut findings: Vec<Finding> = match preflight::problems(hypervisor, vm, &name, &needs) {
                Ok((_, problems)) => {
                    problems.iter().map(|problem| rules::preflight(&name, problem)).collect()
                }
                Err(problem) => vec![rules::preflight(&name, &problem)],
            };
            findings.extend(rules::qemu(
                &name,
                "this site",
                &Takes::of(hypervisor, &needs.machine, needs.saved_by),
            ));
            let cpu = needs.machine.cpu.as_ref();
            findings.extend(cpu.and_then(|cpu| rules::processor(&name, hypervisor.has_processor(cpu))));
            Ok(findings)
        };
        let looked = match self.runbook.hosts.at(None) {
            Ok(host) => host.work(look).await,
            Err(error) => Err(error),
        };
        looked.unwrap_or_else(|error| {
            vec![Finding::new(Weight::Blocks, "check-failed", Some(&member.name), error.to_string())]
        })
    }

    fn age(&self, at: UnixMs) -> Duration {
        self.runbook.clock.now().since(at)
    }
}
