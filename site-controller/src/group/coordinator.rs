//! Leads the cuts of every group: when they begin, who is told what, and what is remembered of them.
//! Promises: a group point is recorded only once every member's point of that cut is durable; a cut that can't become whole
//! costs the group that cut, and no member more than its bound; of a group that somebody else leads (a failover), none is
//! begun. One task per group, started by the daemon; also called by `failover`, for the last cut.

use super::{
    book::{Book, Group},
    cut::{Cut, Order, Outcome, Patience},
    points::{GroupPoint, GroupPointError, GroupPoints, PointOf},
};
use crate::intake::{session::Intake, slot::MadeDurable, switchboard::Switchboard};
use lifeboat::{
    clock::Clock,
    id::{CutId, GroupId, PointId, VmId},
    units::{Seq, UnixMs},
    wire::order::{Assignment, ConsistencyWish, CutKind},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{broadcast, watch},
    task::JoinSet,
};

/// How the cuts of a group go, for status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CutsSoFar")]
pub struct Progress {
    /// Cuts that became whole since the start.
    pub whole: u64,
    /// Cuts that did not.
    pub partial: u64,
    /// Why the last one did not become whole, by member, if it did not.
    pub held_up: BTreeMap<String, String>,
    /// Since when none has become whole.
    pub since: Option<UnixMs>,
}

#[derive(Debug, thiserror::Error)]
pub enum CutError {
    #[error("there is no such instant: {}", told(.0))]
    Partial(BTreeMap<String, String>),
    #[error("the points of this cut did not become durable in time")]
    NotDurable,
    #[error(transparent)]
    Points(#[from] GroupPointError),
}

fn told(why: &BTreeMap<String, String>) -> String {
    let words: Vec<String> = why.iter().map(|(vm, why)| format!("{vm}: {why}")).collect();
    words.join("; ")
}

pub struct Coordinator {
    pub book: Arc<Book>,
    pub points: Arc<GroupPoints>,
    intake: Arc<Intake>,
    clock: Arc<dyn Clock>,
    progress: Mutex<BTreeMap<GroupId, Progress>>,
    /// Held by whoever leads a cut of the group: one at a time.
    led: Mutex<BTreeMap<GroupId, Arc<tokio::sync::Mutex<()>>>>,
    began: Instant,
}

impl Coordinator {
    pub fn new(
        book: Arc<Book>,
        points: Arc<GroupPoints>,
        intake: Arc<Intake>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (progress, led) = Default::default();
        let groups = book.clone();
        intake.switchboard.assign_by(move |vm| groups.group_of(vm).map(|group| assignment(&group)));
        Self { book, points, intake, clock, progress, led, began: Instant::now() }
    }

    /// How members' hosts are reached.
    pub fn switchboard(&self) -> &Switchboard {
        &self.intake.switchboard
    }

    pub fn progress(&self, group: GroupId) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).get(&group).cloned().unwrap_or_default()
    }

    /// Whoever holds this leads the cuts of the group.
    fn lead(&self, group: GroupId) -> Arc<tokio::sync::Mutex<()>> {
        self.led.lock().unwrap_or_else(PoisonError::into_inner).entry(group).or_default().clone()
    }

    /// Tells the members' hosts what the group says of them, after it has changed. `before`: who was in it.
    pub async fn announce(&self, members: impl IntoIterator<Item = VmId>) {
        for vm in members {
            self.intake.switchboard.reassign(vm).await;
        }
    }

    /// Leads all groups until told to stop.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut changes = self.book.changes();
        let mut running = BTreeMap::<GroupId, tokio::task::AbortHandle>::new();
        let mut tasks = JoinSet::new();
        loop {
            changes.mark_unchanged();
            let groups = self.book.list();
            running.retain(|id, task| {
                let stays = groups.iter().any(|group| group.id == *id) && !task.is_finished();
                if !stays {
                    task.abort();
                }
                stays
            });
            for group in groups {
                let leader = self.clone();
                running
                    .entry(group.id)
                    .or_insert_with(|| tasks.spawn(async move { leader.lead_group(group.id).await }));
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { break },
                _ = stop.wait_for(|stop| *stop) => break,
                Some(ended) = tasks.join_next() => if let Err(error) = ended && error.is_panic() {
                    tracing::error!(%error, "the cuts of a group died; they are begun again");
                },
            }
        }
        tasks.shutdown().await;
    }

    async fn lead_group(self: Arc<Self>, id: GroupId) {
        let mut tidied = Instant::now();
        while let Some(group) = self.book.get(id) {
            let begun = Instant::now();
            let lead = self.lead(id);
            let leads = lead.try_lock();
            let reached = group.members.iter().any(|member| self.intake.switchboard.is_reached(member.vm));
            if !group.paused && leads.is_ok() && reached {
                self.clone().one(&group).await;
            }
            drop(leads);
            if tidied.elapsed() > TIDY_EVERY {
                tidied = Instant::now();
                if let Err(error) = self.points.tidy(&group).await {
                    tracing::warn!(group = %group.spec.name, %error, "group points could not be tidied");
                }
            }
            tokio::time::sleep(group.spec.interval().saturating_sub(begun.elapsed()).max(LEAST_REST)).await;
        }
    }

    /// One point of a group. Returns once it is cut everywhere; that it is durable is waited for beside the next one.
    async fn one(self: Arc<Self>, group: &Group) {
        let durables = self.intake.slots.made_durable();
        let interval = group.spec.interval();
        let ready = (interval * 2).clamp(READY_LEAST, READY_MOST);
        let ready_ms = u64::try_from(ready.as_millis()).unwrap_or(u64::MAX);
        let end = (group.spec.rpo() * 4).clamp(END_LEAST, END_MOST);
        let end_ms = u64::try_from(end.as_millis()).unwrap_or(u64::MAX);
        let patience = Patience { ready_ms, freeze_ms: FREEZE_MS, stop_ms: STOP_MS, end_ms };
        let cut = new_cut();
        match self.carry(group, cut, CutKind::Group, patience).await {
            Outcome::Partial { why } => self.note(group, Err(CutError::Partial(by_name(group, why)))),
            whole => {
                let (leader, group) = (self.clone(), group.clone());
                tokio::spawn(async move {
                    let recorded = leader.record(&group, cut, whole, durables).await;
                    leader.note(&group, recorded);
                });
            }
        }
    }

    /// The last cut before a planned failover: all members stand, durable, until they are told what becomes of them.
    /// On an error whoever stands is told to go on by the caller, who knows the generations.
    pub async fn final_cut(&self, group: &Group, cut: CutId) -> Result<GroupPoint, CutError> {
        let lead = self.lead(group.id);
        let _leads = lead.lock().await;
        let durables = self.intake.slots.made_durable();
        let patience = Patience {
            ready_ms: FINAL_READY_MS,
            freeze_ms: FREEZE_MS,
            stop_ms: FINAL_STOP_MS,
            end_ms: FINAL_END_MS,
        };
        match self.carry(group, cut, CutKind::Final, patience).await {
            Outcome::Partial { why } => Err(CutError::Partial(by_name(group, why))),
            whole => self.record(group, cut, whole, durables).await,
        }
    }

    async fn carry(&self, group: &Group, id: CutId, kind: CutKind, patience: Patience) -> Outcome {
        let board = &self.intake.switchboard;
        let mut words = board.listen();
        let members = group.members.iter().map(|member| member.vm);
        let freezes = group.spec.consistency == ConsistencyWish::App;
        let freezing = members.clone().filter(|vm| freezes && board.may_freeze(*vm));
        let (cut, mut orders) = Cut::begin(kind, members.clone(), patience, self.clock.now());
        let mut cut = cut.freezing(freezing);
        let mut told = BTreeMap::new();
        loop {
            self.give(&mut cut, id, orders, &mut told).await;
            if let Some(outcome) = cut.outcome() {
                return outcome;
            }
            let now = self.clock.now();
            let left = Duration::from_millis(cut.deadline().0.saturating_sub(now.0)).min(LOOK);
            orders = tokio::select! {
                heard = words.recv() => match heard {
                    Ok(heard) if heard.cut == id => {
                        let us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
                        cut.heard(heard.vm, heard.part, self.clock.now(), us)
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => Vec::new(),
                    Err(broadcast::error::RecvError::Closed) => cut.tick(UnixMs(u64::MAX)),
                },
                () = tokio::time::sleep(left.max(Duration::from_millis(1))) => {
                    let now = self.clock.now();
                    // An agent that had to connect anew has forgotten the cut, unless it holds its guest by now and says so.
                    let is_lost = |vm| board.session(vm).as_ref() != told.get(&vm);
                    let lost = group.members.iter().filter(|member| is_lost(member.vm));
                    let mut orders: Vec<Order> = lost.flat_map(|member| cut.lost(member.vm, now)).collect();
                    orders.extend(cut.tick(now));
                    orders
                }
            };
        }
    }

    /// `told`: the session in which each member heard of the cut first.
    async fn give(&self, cut: &mut Cut, id: CutId, orders: Vec<Order>, told: &mut BTreeMap<VmId, u64>) {
        let mut orders = std::collections::VecDeque::from(orders);
        while let Some((vm, order)) = orders.pop_front() {
            match self.intake.switchboard.order(vm, id, order).await {
                Some(session) if *told.entry(vm).or_insert(session) == session => {}
                _ => orders.extend(cut.lost(vm, self.clock.now())),
            }
        }
    }

    /// Waits until the points of a whole cut are durable, and records it.
    async fn record(
        &self,
        group: &Group,
        cut: CutId,
        outcome: Outcome,
        mut durables: broadcast::Receiver<MadeDurable>,
    ) -> Result<GroupPoint, CutError> {
        let Outcome::Whole { at, skew_us, points } = outcome else { return Err(CutError::NotDurable) };
        let mut seqs = BTreeMap::<PointId, Seq>::new();
        let all_there = async {
            while points.values().any(|(point, _)| !seqs.contains_key(point)) {
                match durables.recv().await {
                    Ok(made) => drop(seqs.insert(made.point, made.seq)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        for vm in points.keys() {
                            let of_vm = self.points.points_of(*vm).await.unwrap_or_default();
                            seqs.extend(of_vm);
                        }
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        };
        if tokio::time::timeout(DURABLE_WITHIN, all_there).await.is_err() {
            return Err(CutError::NotDurable);
        }
        let members = group.members.iter().map(|member| {
            let (point, pause_us) = points.get(&member.vm).copied()?;
            let seq = seqs.get(&point).copied()?;
            let (vm, name) = (member.vm, member.name.clone());
            Some(PointOf { vm, name, point, seq, pause_us, consistency: None })
        });
        let mut members = members.collect::<Option<Vec<_>>>().ok_or(CutError::NotDurable)?;
        for member in &mut members {
            member.consistency = self.points.consistency_of(member).await?;
        }
        let version = GroupPoint::VERSION;
        let point = GroupPoint { version, cut, no: 0, cut_at: at, skew_us, members };
        let (all, id) = (self.points.clone(), group.id);
        match tokio::task::spawn_blocking(move || all.record(id, point)).await {
            Ok(recorded) => Ok(recorded?),
            Err(_) => Err(CutError::NotDurable),
        }
    }

    fn note(&self, group: &Group, outcome: Result<GroupPoint, CutError>) {
        let now = self.clock.now();
        let mut all = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let progress = all.entry(group.id).or_default();
        match outcome {
            Ok(point) => {
                tracing::debug!(group = %group.spec.name, no = point.no, skew_us = point.skew_us, "group point");
                progress.whole += 1;
                (progress.held_up, progress.since) = (BTreeMap::new(), None);
            }
            Err(error) => {
                progress.partial += 1;
                if progress.since.is_none() {
                    tracing::warn!(group = %group.spec.name, why = %error, "no group point");
                }
                progress.since.get_or_insert(now);
                progress.held_up = match error {
                    CutError::Partial(why) => why,
                    other => BTreeMap::from([(group.spec.name.clone(), other.to_string())]),
                };
            }
        }
    }
}

/// How a group has its members protected.
fn assignment(group: &Group) -> Assignment {
    Assignment {
        group: group.spec.name.clone(),
        interval_ms: u64::try_from(group.spec.interval().as_millis()).unwrap_or(u64::MAX),
        memory: group.spec.memory,
        consistency: group.spec.consistency,
        together: true,
        paused: group.paused,
    }
}

pub fn new_cut() -> CutId {
    CutId::from_bytes(*uuid::Uuid::new_v4().as_bytes())
}

fn by_name(group: &Group, why: BTreeMap<VmId, String>) -> BTreeMap<String, String> {
    let name = |vm: VmId| {
        let member = group.members.iter().find(|member| member.vm == vm);
        member.map_or_else(|| vm.to_string(), |member| member.name.clone())
    };
    why.into_iter().map(|(vm, why)| (name(vm), why)).collect()
}

/// Between two looks whether hosts are still connected.
const LOOK: Duration = Duration::from_millis(200);
const LEAST_REST: Duration = Duration::from_millis(20);
const TIDY_EVERY: Duration = Duration::from_secs(60);
const READY_LEAST: Duration = Duration::from_secs(2);
const READY_MOST: Duration = Duration::from_secs(30);
/// A guest waits for the others for half of its `max_pause`, 1 s unless configured.
const STOP_MS: u64 = 2_000;
/// Longer than an agent lets file systems be frozen; one that asks a silent guest agent answers within it.
const FREEZE_MS: u64 = 15_000;
/// How long the next cut waits for a member's point to be sent.
const END_LEAST: Duration = Duration::from_secs(10);
const END_MOST: Duration = Duration::from_secs(60);
const FINAL_READY_MS: u64 = 300_000;
const FINAL_STOP_MS: u64 = 30_000;
const FINAL_END_MS: u64 = 1_800_000;
/// Points that are sent and not durable after so long are lost, or will be.
const DURABLE_WITHIN: Duration = Duration::from_secs(300);
