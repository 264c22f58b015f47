//! What a group's failover acts on: the replicas at this site and the sources at the other. Two traits, so that what may
//! never happen can be shown without either. `Runbook` is the one; who cuts points of groups is the other.

use super::record::Kind;
use crate::{
    failover::{
        error::FailoverError,
        journal::{Manner, Placed},
        progress::Watcher,
        report::FailoverReport,
    },
    group::{Group, spec::WaitFor},
};
use async_trait::async_trait;
use lifeboat::{
    id::{CutId, GroupId, PointId, VmId},
    units::{Generation, UnixMs},
    wire::order::CutOrder,
};
use std::time::Duration;

/// A point of a group that is whole: one durable point of each member, cut at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholePoint {
    pub cut: CutId,
    pub cut_at: UnixMs,
    pub members: Vec<(VmId, PointId)>,
}

/// The point that an emergency failover is to take.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    pub point: &'a WholePoint,
    /// It was asked for as the newest, not by name.
    pub newest: bool,
}

/// A replica that is to have a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToPlace {
    pub vm: VmId,
    /// Without one, the newest is as good: what the VM is made of hardly changes.
    pub point: Option<PointId>,
    pub manner: Manner,
}

/// This site's side: one VM at a time, each step safe to repeat.
#[async_trait]
pub trait Replicas: Send + Sync {
    /// Whether there is room for the replicas of all these points together.
    async fn room_for(&self, points: &[(VmId, PointId)]) -> Result<(), FailoverError>;
    /// Decides at which hosts of this site the replicas run, all of them together. One for each, in their order; `None` where
    /// there is one host.
    async fn place(
        &self,
        members: &[ToPlace],
        watcher: &Watcher,
    ) -> Result<Vec<Option<Placed>>, FailoverError>;
    /// Finds the point and asks whether it can work. Nothing that anybody would notice is changed. `true` if it begins
    /// here, `false` if it was begun before.
    async fn prepare(
        &self,
        vm: VmId,
        point: PointId,
        kind: Kind,
        manner: Manner,
        host: Option<Placed>,
        watcher: &Watcher,
    ) -> Result<bool, FailoverError>;
    /// Makes the images of another point beside the replica that runs. Nothing that anybody would notice is changed.
    async fn make_ready(
        &self,
        vm: VmId,
        point: PointId,
        window: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError>;
    /// Stops a replica that ran, sets it aside, and names another point; nothing where that was done before.
    async fn rewind(
        &self,
        vm: VmId,
        point: PointId,
        kept: Duration,
        watcher: &Watcher,
    ) -> Result<(), FailoverError>;
    async fn restore(&self, vm: VmId, watcher: &Watcher) -> Result<(), FailoverError>;
    /// `skip_command`: the source is known to be off.
    async fn fence(
        &self,
        vm: VmId,
        skip_command: bool,
        watcher: &Watcher,
    ) -> Result<Generation, FailoverError>;
    /// Whether it may be that the source's agent is refused by now, for the failover that is begun here.
    async fn is_fenced(&self, vm: VmId) -> Result<bool, FailoverError>;
    /// Returns once the replica runs; or is defined, where the VM was off.
    async fn start(&self, vm: VmId, watcher: &Watcher) -> Result<FailoverReport, FailoverError>;
    /// One that runs with its memory is ended, and booted from its point's disks, and `why` is told; nothing where that
    /// was done before, or where its operator lets it stand.
    async fn boot_instead(
        &self,
        vm: VmId,
        why: &str,
        watcher: &Watcher,
    ) -> Result<FailoverReport, FailoverError>;
    async fn is_active(&self, vm: VmId) -> Result<bool, FailoverError>;
    /// Whether the replica was ever seen to run.
    async fn has_run(&self, vm: VmId) -> Result<bool, FailoverError>;
    /// Whether its failover came to its end: it was seen to run, or is there, of a VM that was off.
    async fn is_done(&self, vm: VmId) -> Result<bool, FailoverError> {
        self.has_run(vm).await
    }
    /// Takes back whatever was prepared. Refuses if the replica is active.
    async fn withdraw(&self, vm: VmId) -> Result<(), FailoverError>;
    async fn generation(&self, vm: VmId) -> Generation;
    /// Raises the generation, so that whoever is given it is the VM.
    async fn raise(&self, vm: VmId, generation: Generation) -> Result<(), FailoverError>;
    /// `at`: of a trial, its host; otherwise that of the VM's failover.
    async fn is_up(&self, vm: VmId, at: Option<&Placed>, wait: &WaitFor) -> Result<bool, FailoverError>;
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// The other side, through the agents.
#[async_trait]
pub trait Sources: Send + Sync {
    /// Whole points of a group, oldest first.
    async fn points(&self, group: GroupId) -> Result<Vec<WholePoint>, SourceError>;
    /// All members stand, at one instant, and their points are durable; they stand until [`Self::end_hold`]. On an error
    /// some may stand.
    async fn final_cut(&self, group: &Group, cut: CutId) -> Result<WholePoint, SourceError>;
    /// `Resume`, `ShutOff` or `CallOff` of one member. Returns once its agent has said that the hold is over; `false` if it
    /// can't be reached now, or has not said so yet.
    async fn end_hold(&self, vm: VmId, cut: CutId, order: CutOrder) -> Result<bool, SourceError>;
}
