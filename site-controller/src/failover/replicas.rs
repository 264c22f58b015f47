//! The steps of one VM's failover as a group's failover asks for them. Every step finds in the VM's own journal how far it
//! has come. Called by `group`, through its trait.

use super::{
    attempt::{blocking, remove_dir},
    error::FailoverError,
    group::{
        record::Kind,
        world::{Replicas, ToPlace},
    },
    hosts::HostError,
    journal::{Manner, Phase, Placed, Record},
    preflight::{self, PreflightError},
    progress::Watcher,
    report::FailoverReport,
    runbook::{LATEST, Request, Runbook},
    waits,
};
use crate::group::spec::WaitFor;
use async_trait::async_trait;
use lifeboat::{
    hypervisor::libvirt::{DomainState, Hypervisor, HypervisorError, XmlView},
    id::{PointId, VmId},
    units::Generation,
};
use std::time::Duration;

#[async_trait]
impl Replicas for Runbook {
    async fn room_for(&self, points: &[(VmId, PointId)]) -> Result<(), FailoverError> {
        let mut bytes = 0u64;
        for (vm, point) in points {
            let point = self.catalog.find(*vm, &point.to_string()).await?;
            bytes = bytes.saturating_add(self.needs_of(&point, Manner::default()).await?.1);
        }
        let dir = self.replica_dir.clone();
        blocking(move || Ok(preflight::room(&dir, bytes)?)).await
    }

    async fn place(
        &self,
        members: &[ToPlace],
        watcher: &Watcher,
    ) -> Result<Vec<Option<Placed>>, FailoverError> {
        if !self.hosts.are_several() {
            return Ok(vec![None; members.len()]);
        }
        let mut points = Vec::new();
        for ToPlace { vm, point, manner } in members {
            let given = point.map_or_else(|| LATEST.to_owned(), |point| point.to_string());
            points.push((self.catalog.find(*vm, &given).await?, manner.clone()));
        }
        Runbook::place(self, &points, watcher).await
    }

    async fn prepare(
        &self,
        vm: VmId,
        point: PointId,
        kind: Kind,
        manner: Manner,
        host: Option<Placed>,
        watcher: &Watcher,
    ) -> Result<bool, FailoverError> {
        let _claim = self.claim(vm)?;
        let (vm_name, point_id) = (vm.to_string(), point.to_string());
        let request = Request { vm: vm_name, point: point_id, skip_fence_command: false, manner, host };
        let before = self.journal.load(vm)?;
        let begins = before.is_none();
        let mut record = match before {
            Some(record) if record.phase == Phase::Running && record.point == point => return Ok(false),
            Some(record) if record.phase == Phase::Running => {
                return Err(FailoverError::RunsFromAnother { point: record.point });
            }
            Some(record) => self.take_up(record, &request, watcher).await?,
            None => self.begin(vm, &request, watcher).await?,
        };
        let kind = if kind == Kind::Planned { "planned" } else { "emergency" };
        if record.kind != kind || record.manner != request.manner || record.host != request.host {
            record.kind = kind.into();
            record.manner = request.manner;
            record.host = request.host;
            self.journal.save(&record)?;
        }
        Ok(begins)
    }

    async fn make_ready(
        &self,
        vm: VmId,
        point: PointId,
        window: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let point = self.catalog.find(vm, &point.to_string()).await?;
        Runbook::make_ready(self, &point, window, watcher).await
    }

    async fn rewind(
        &self,
        vm: VmId,
        point: PointId,
        kept: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let point = self.catalog.find(vm, &point.to_string()).await?;
        Runbook::rewind(self, &point, kept, watcher).await
    }

    async fn restore(&self, vm: VmId, watcher: &Watcher) -> Result<(), FailoverError> {
        let _claim = self.claim(vm)?;
        let mut record = self.begun(vm)?;
        self.noting(&mut record, Step::Restore, watcher).await
    }

    async fn fence(
        &self,
        vm: VmId,
        skip_command: bool,
        watcher: &Watcher,
    ) -> Result<Generation, FailoverError> {
        let _claim = self.claim(vm)?;
        let mut record = self.begun(vm)?;
        self.noting(&mut record, Step::Fence { skip_command }, watcher).await?;
        Ok(record.generation)
    }

    async fn is_fenced(&self, vm: VmId) -> Result<bool, FailoverError> {
        let Some(record) = self.journal.load(vm)? else { return Ok(false) };
        // The generation is raised before the journal says so.
        Ok(record.phase > Phase::Begun || self.store.generation(vm).await >= record.generation)
    }

    async fn start(&self, vm: VmId, watcher: &Watcher) -> Result<FailoverReport, FailoverError> {
        let _claim = self.claim(vm)?;
        let mut record = self.begun(vm)?;
        let done = record.phase == Phase::Running;
        self.keep_or_place(&mut record, watcher).await?;
        if record.phase == Phase::Starting && !self.is_active(&record).await? {
            self.attempt_anew(&mut record)?;
        }
        self.noting(&mut record, Step::Restore, watcher).await?;
        self.noting(&mut record, Step::GoOn, watcher).await?;
        Ok(FailoverReport::of(&record, done))
    }

    async fn boot_instead(
        &self,
        vm: VmId,
        why: &str,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError> {
        let _claim = self.claim(vm)?;
        let mut record = self.begun(vm)?;
        if record.phase == Phase::Running && record.resumes {
            self.noting(&mut record, Step::BootInstead { why }, watcher).await?;
        }
        Ok(FailoverReport::of(&record, false))
    }

    async fn is_active(&self, vm: VmId) -> Result<bool, FailoverError> {
        let (_, state) = self.hosts.whereabouts(vm, self.journal.load(vm)?.as_ref()).await?;
        Ok(state.is_some_and(DomainState::is_active))
    }

    async fn has_run(&self, vm: VmId) -> Result<bool, FailoverError> {
        let ran = |record: Record| record.has_run || (record.phase == Phase::Running && !record.leaves_off());
        Ok(self.journal.load(vm)?.is_some_and(ran))
    }

    async fn is_done(&self, vm: VmId) -> Result<bool, FailoverError> {
        Ok(self.journal.load(vm)?.is_some_and(|record| record.has_run || record.phase == Phase::Running))
    }

    async fn withdraw(&self, vm: VmId) -> Result<(), FailoverError> {
        let _claim = self.claim(vm)?;
        self.hosts.release(vm);
        let Some(record) = self.journal.load(vm)? else { return Ok(()) };
        if Runbook::is_active(self, &record).await? {
            return Err(PreflightError::AlreadyRunning.into());
        }
        let dir = self.attempt_dir(&record);
        for host in self.hosts.all() {
            let ours = dir.to_string_lossy().into_owned();
            let undefine = move |hypervisor: &Hypervisor| match hypervisor.domain_by_uuid(vm) {
                // What is defined here otherwise, an operator's, stays.
                Ok(domain) if domain.xml(XmlView::Inactive)?.contains(&ours) => domain.undefine(),
                Ok(_) | Err(HypervisorError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            };
            match host.ask(undefine).await {
                // Nothing was started there, or it would not be said to be inactive.
                Err(error @ HostError::Away { .. }) => {
                    tracing::warn!(%vm, %error, "its definition may be left there")
                }
                done => done?,
            }
        }
        blocking(move || remove_dir(&dir)).await?;
        Ok(self.journal.remove(vm)?)
    }

    async fn generation(&self, vm: VmId) -> Generation {
        self.store.generation(vm).await
    }

    async fn raise(&self, vm: VmId, generation: Generation) -> Result<(), FailoverError> {
        if self.store.generation(vm).await < generation {
            self.store.raise_to(vm, generation).await?;
        }
        Ok(())
    }

    async fn is_up(&self, vm: VmId, at: Option<&Placed>, wait: &WaitFor) -> Result<bool, FailoverError> {
        waits::is_up(self, vm, at, wait).await
    }
}

enum Step<'a> {
    Fence { skip_command: bool },
    Restore,
    GoOn,
    BootInstead { why: &'a str },
}

impl Runbook {
    fn begun(&self, vm: VmId) -> Result<Record, FailoverError> {
        self.journal.load(vm)?.ok_or(FailoverError::NotBegun)
    }

    /// Does a step; what went wrong is noted for whoever asks for the VM's status.
    async fn noting(
        &self,
        record: &mut Record,
        step: Step<'_>,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let done = match step {
            Step::Fence { .. } if record.kind == "planned" => self.raise_quietly(record).await,
            Step::Fence { skip_command } => match self.fence(record, watcher).await {
                Ok(()) => self.stop_source(record, skip_command, watcher).await,
                failed => failed,
            },
            Step::Restore => Runbook::restore(self, record, watcher).await,
            Step::GoOn => self.go_on(record, watcher).await,
            Step::BootInstead { why } => self.boot_what_ran(record, why, watcher).await,
        };
        if let Err(error) = &done {
            record.last_error = Some(error.to_string());
            self.journal.save(record)?;
        }
        done
    }

    /// Of a planned failover the source stands, and its agent waits for word. It is told that its VM is off for good when
    /// that is true.
    async fn raise_quietly(&self, record: &mut Record) -> Result<(), FailoverError> {
        if record.phase >= Phase::Fenced {
            return Ok(());
        }
        self.store.raise_to(record.vm, record.generation).await?;
        self.enter(record, Phase::Fenced)
    }
}
