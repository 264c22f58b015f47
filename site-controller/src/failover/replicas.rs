//! The steps of one VM's failover as a group's failover asks for them. Every step finds in the VM's own journal how far it
//! has come. Called by `group`, through its trait.

use super::{
    group::{
        record::Kind,
        world::{Replicas, ToPlace},
    },
    hosts::{HostError, Placed},
    journal::{Manner, Phase, Record},
    preflight::{self, PreflightError},
    progress::{FailoverReport, Watcher},
    runbook::{FailoverError, LATEST, Request, Runbook},
    steps::{blocking, remove_dir},
};
use crate::group::spec::WaitFor;
use async_trait::async_trait;
use lifeboat::{
    hypervisor::libvirt::{DomainState, Hypervisor, HypervisorError, XmlView},
    id::{PointId, VmId},
    units::Generation,
};
use std::{
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    time::Duration,
};

/// Of a console's file, how much of its end is looked at.
const CONSOLE_LOOKED_AT: u64 = 1 << 20;
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

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
        match wait {
            WaitFor::Delay(_) => Ok(true),
            WaitFor::Tcp { host: Some(host), port } => {
                let connect = tokio::net::TcpStream::connect((host.as_str(), *port));
                Ok(tokio::time::timeout(CONNECT_WITHIN, connect).await.is_ok_and(|made| made.is_ok()))
            }
            WaitFor::Tcp { host: None, .. } => Err(FailoverError::Wait(
                "write `tcp:HOST:PORT`: the guest's address is not known here".into(),
            )),
            WaitFor::Agent => Ok(agent_is_connected(&self.active_xml(vm, at).await?.0)),
            WaitFor::Console(text) => {
                let (xml, is_local) = self.active_xml(vm, at).await?;
                let file = console_file(&xml)
                    .ok_or_else(|| FailoverError::Wait("its console is not written to a file".into()))?;
                if !is_local && !file.starts_with(&self.replica_dir) {
                    let why = "its console is a file of another host, which can't be read from here";
                    return Err(FailoverError::Wait(why.into()));
                }
                let text = text.clone();
                blocking(move || Ok(end_of(&file)?.contains(&text))).await
            }
        }
    }
}

enum Step {
    Fence { skip_command: bool },
    Restore,
    GoOn,
}

impl Runbook {
    fn begun(&self, vm: VmId) -> Result<Record, FailoverError> {
        self.journal.load(vm)?.ok_or(FailoverError::NotBegun)
    }

    /// Does a step; what went wrong is noted for whoever asks for the VM's status.
    async fn noting(&self, record: &mut Record, step: Step, watcher: &Watcher) -> Result<(), FailoverError> {
        let done = match step {
            Step::Fence { .. } if record.kind == "planned" => self.raise_quietly(record).await,
            Step::Fence { skip_command } => match self.fence(record, watcher).await {
                Ok(()) => self.stop_source(record, skip_command, watcher).await,
                failed => failed,
            },
            Step::Restore => Runbook::restore(self, record, watcher).await,
            Step::GoOn => self.go_on(record, watcher).await,
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

    /// And whether what it names by path lies here.
    async fn active_xml(&self, vm: VmId, at: Option<&Placed>) -> Result<(String, bool), FailoverError> {
        let own = if at.is_none() { self.journal.load(vm)?.and_then(|record| record.host) } else { None };
        let host = self.hosts.at(at.or(own.as_ref()))?;
        let xml = host.ask(move |hypervisor| hypervisor.domain_by_uuid(vm)?.xml(XmlView::Active)).await?;
        // Of the only one that was always so.
        Ok((xml, host.is_local() || !self.hosts.are_several()))
    }
}

/// libvirt shows in the active XML whether anybody listens at the guest's end of the channel.
fn agent_is_connected(xml: &str) -> bool {
    let targets = xml.split("<target ").skip(1).filter_map(|rest| rest.split_once('>'));
    targets
        .into_iter()
        .any(|(target, _)| target.contains("org.qemu.guest_agent.0") && target.contains("state='connected'"))
}

fn console_file(xml: &str) -> Option<PathBuf> {
    let serial = xml.split_once("<serial type='file'")?.1.split_once("</serial>")?.0;
    Some(serial.split_once("path='")?.1.split_once('\'')?.0.into())
}

fn end_of(file: &PathBuf) -> Result<String, FailoverError> {
    let read = || {
        let mut opened = std::fs::File::open(file)?;
        let from = opened.metadata()?.len().saturating_sub(CONSOLE_LOOKED_AT);
        opened.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        opened.take(CONSOLE_LOOKED_AT).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().map_err(|source| FailoverError::File { path: file.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_agent_counts_as_up_only_when_it_is_connected_and_a_console_is_read_from_its_file() {
        let xml = |state: &str| {
            format!(
                "<domain><devices><serial type='file'><source path='/log/web' append='on'/></serial>\
                 <channel><target type='virtio' name='org.qemu.guest_agent.0' state='{state}'/></channel>"
            )
        };
        assert!(agent_is_connected(&xml("connected")) && !agent_is_connected(&xml("disconnected")));
        assert_eq!(console_file(&xml("connected")), Some("/log/web".into()));
        assert_eq!(console_file("<serial type='pty'><source path='/dev/pts/1'/></serial>"), None);
    }
}
