//! Emergency failovers that the site begins by itself, of groups that ask for it, with a witness.
//! Promises: nothing is begun before the witness has taken the word, in one step with its saying that no source's lease is
//! alive; from before that until the failover is done no agent is told that the VM is its own. A controller that dies anywhere
//! goes on from the record. Why a group is not failed over is told; a failover that goes wrong is tried again, later and later;
//! one that takes long keeps no other group waiting.
//! See docs/decisions/0044-a-witness-and-two-leases.md. Started by the daemon; asked by `api`.

pub mod decide;
pub mod record;

use crate::{
    catalog::Selector,
    failover::{
        group::{
            GroupError, Groups,
            record::Phase as Step,
            world::{Chosen, WholePoint},
        },
        progress::Watcher,
        runbook::Runbook,
    },
    group::{Group, coordinator::Coordinator},
    readiness::{Verdict, watch::Watch},
};
use async_trait::async_trait;
use decide::{Failed, Member};
use lifeboat::{
    error::chain,
    fault,
    id::{GroupId, VmId},
    witness::{Change, Leasing, Witness, WitnessError, Word},
};
use record::{ClaimBook, ClaimRecord, Phase};
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};

/// Writes down what is done by nobody's order.
#[async_trait]
pub trait Scribe: Send + Sync {
    /// Before it is done. Returns what its end is to be told with, or why it can't be written down.
    async fn begin(&self, group: &str, claim: &str) -> Result<String, String>;
    async fn ended(&self, id: String, error: Option<String>);
}

#[derive(Debug, thiserror::Error)]
enum AutomaticError {
    #[error("{}", chain(.0))]
    Witness(#[from] WitnessError),
    #[error("what is remembered of a claim: {0}")]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Failover(#[from] GroupError),
    #[error("{0}")]
    Other(String),
}

/// All that it works with.
pub struct Parts {
    pub site: String,
    pub witness: Arc<dyn Witness>,
    pub runbook: Arc<Runbook>,
    pub coordinator: Arc<Coordinator>,
    pub groups: Arc<Groups>,
    pub readiness: Arc<Watch>,
    pub scribe: Arc<dyn Scribe>,
    pub book: ClaimBook,
    /// How long an agent must not have been heard.
    pub silent: Duration,
}

pub struct Automatic {
    parts: Parts,
    /// How each group stands, in words.
    said: Mutex<BTreeMap<GroupId, String>>,
    /// Of claims whose failover went wrong.
    failed: Mutex<BTreeMap<GroupId, Failed>>,
    /// Failovers at once.
    turns: Semaphore,
}

impl Automatic {
    /// Closes the VMs of claims that a controller before us has begun. Before any agent is listened to.
    pub fn open(parts: Parts) -> io::Result<Self> {
        for record in parts.book.all()? {
            record.parts.iter().for_each(|part| parts.runbook.intake.promises.close(part.vm));
        }
        let turns = Semaphore::new(AT_ONCE);
        Ok(Self { parts, said: Mutex::default(), failed: Mutex::default(), turns })
    }

    /// How a group stands that may be failed over by itself.
    pub fn said(&self, group: GroupId) -> Option<String> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).get(&group).cloned()
    }

    /// The members that no agent keeps at the witness now.
    pub async fn not_kept(&self, group: &[(VmId, String)]) -> Result<Vec<String>, WitnessError> {
        let vms: Vec<VmId> = group.iter().map(|(vm, _)| *vm).collect();
        let entries = self.parts.witness.look(&vms).await?;
        let kept = |word: &Option<Word>| matches!(word, Some(Word::Kept { .. }));
        let pairs = group.iter().zip(entries).filter(|(_, entry)| !kept(&entry.word));
        Ok(pairs.map(|((_, name), _)| name.clone()).collect())
    }

    /// Until told to stop. A failover that is under way is taken up at the next start.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Each group is seen to by a task of its own. They end with this one.
        let (mut tasks, mut busy) = (JoinSet::new(), BTreeMap::new());
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                Some(ended) = tasks.join_next_with_id() => {
                    let id = ended.map_or_else(|died| died.id(), |(id, ())| id);
                    busy.remove(&id);
                }
                _ = looks.tick() => {
                    for (group, record) in self.look() {
                        if !busy.values().any(|at_work| *at_work == group.id) {
                            let (me, id) = (self.clone(), group.id);
                            let task = tasks.spawn(async move { me.see_to(&group, record).await });
                            busy.insert(task.id(), id);
                        }
                    }
                }
            }
        }
    }

    /// The groups that there is something to see to, with what is remembered of their claims.
    fn look(&self) -> Vec<(Group, Option<ClaimRecord>)> {
        let mut records = match self.parts.book.all() {
            Ok(records) => records,
            Err(error) => {
                tracing::error!(%error, "what is remembered of claims can't be read: nothing is failed over by itself");
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        for group in self.parts.coordinator.book.list() {
            let at = records.iter().position(|record| record.group.id == group.id);
            let record = at.map(|at| records.swap_remove(at));
            if record.is_none() && !group.spec.automatic {
                self.said.lock().unwrap_or_else(PoisonError::into_inner).remove(&group.id);
                continue;
            }
            found.push((group, record));
        }
        for record in records {
            // The group is gone since.
            let mut group = record.group.clone();
            group.spec.automatic = false;
            found.push((group, Some(record)));
        }
        found
    }

    async fn see_to(&self, group: &Group, record: Option<ClaimRecord>) {
        let done = match record {
            Some(record) => self.go_on(record, group).await,
            None => self.begin(group).await,
        };
        let said = done.unwrap_or_else(|error| chain(&error));
        let mut all = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(&group.id).is_none_or(|before| decide::news(before) != decide::news(&said)) {
            tracing::info!(group = %group.spec.name, %said, "automatic failover");
        }
        all.insert(group.id, said);
    }

    /// Returns how it stands.
    async fn begin(&self, group: &Group) -> Result<String, AutomaticError> {
        let parts = &self.parts;
        if group.paused {
            return Ok("not while the group is paused".into());
        }
        let mut members = Vec::new();
        for member in &group.members {
            members.push(self.member(member.vm, &member.name).await?);
        }
        if let Some(why) = members.iter().find_map(|member| decide::heard_of(member, parts.silent)) {
            return Ok(format!("not now: {why}"));
        }
        let vms: Vec<VmId> = members.iter().map(|member| member.vm).collect();
        for (member, entry) in members.iter_mut().zip(parts.witness.look(&vms).await?) {
            member.entry = entry;
        }
        if let Some(why) = members.iter().find_map(decide::why_not) {
            return Ok(format!("not now: {why}"));
        }
        let name = &group.spec.name;
        let ready = parts.readiness.one(name).await.map_err(|error| AutomaticError::Other(chain(&error)))?;
        if ready.verdict == Verdict::NotReady {
            let why = ready.findings.first().map(|finding| finding.what.clone()).unwrap_or_default();
            return Ok(format!("not now: a failover would not work: {why}"));
        }
        self.point(group).await?;
        self.claim(group, &members).await
    }

    /// Nothing is against it.
    async fn claim(&self, group: &Group, members: &[Member]) -> Result<String, AutomaticError> {
        let parts = &self.parts;
        members.iter().for_each(|member| parts.runbook.intake.promises.close(member.vm));
        // An agent that came meanwhile may have been promised something; from here on none is.
        for member in members {
            let now = self.member(member.vm, &member.name).await;
            let came = now.map(|now| decide::heard_of(&now, parts.silent));
            if let Some(why) = came.unwrap_or_else(|error| Some(error.to_string())) {
                members.iter().for_each(|member| parts.runbook.intake.promises.open(member.vm));
                return Ok(format!("not now: {why}"));
            }
        }
        let record = ClaimRecord {
            version: ClaimRecord::VERSION,
            group: group.clone(),
            claim: uuid::Uuid::new_v4().simple().to_string(),
            parts: members.iter().map(decide::part).collect(),
            phase: Phase::Intended,
            at: parts.runbook.clock.now(),
        };
        if let Err(error) = parts.book.save(&record) {
            members.iter().for_each(|member| parts.runbook.intake.promises.open(member.vm));
            return Err(error.into());
        }
        tracing::warn!(group = %group.spec.name, "its agents are silent and no lease is alive: claiming it at the witness");
        fault::point("automatic.intended");
        self.go_on(record, group).await
    }

    /// `group`: as it is now.
    async fn go_on(&self, mut record: ClaimRecord, group: &Group) -> Result<String, AutomaticError> {
        if record.phase == Phase::Intended {
            let changes = decide::claims(&self.parts.site, &record.claim, &record.parts);
            let vms: Vec<VmId> = record.parts.iter().map(|part| part.vm).collect();
            // Of one that was not answered nobody knows; asked again, it is done once.
            let claimed = match self.parts.witness.change(&changes).await? {
                Some(_) => true,
                None => decide::is_claimed(&record.claim, &self.parts.witness.look(&vms).await?),
            };
            if !claimed {
                self.end(&record)?;
                return Ok("not now: a source was quicker at the witness".into());
            }
            fault::point("automatic.taken");
            record.phase = Phase::Claimed;
            self.parts.book.save(&record)?;
            fault::point("automatic.claimed");
        }
        let begun = self.parts.runbook.journal.load_group(record.group.id).map_err(GroupError::from)?;
        let begun = begun.filter(|begun| begun.started_at >= record.at);
        if !group.spec.automatic && begun.is_none() {
            return self.give_up(&record).await;
        }
        // Its operator may have done it meanwhile.
        let done = begun.is_some_and(|begun| matches!(begun.phase, Step::Running | Step::Done));
        let before = self.failed().get(&group.id).filter(|_| !done).cloned();
        let (now, changed_at) = (Instant::now(), group.changed_at);
        if let Some((before, left)) = before.as_ref().and_then(|of| Some((of, of.left(now, changed_at)?))) {
            return Ok(before.said(left));
        }
        let done = self.fail_over(&record, group).await;
        let Err(error) = &done else { return done };
        let failed = Failed::again(before.as_ref(), Instant::now(), changed_at, chain(error));
        let said = failed.said(failed.left(Instant::now(), changed_at).unwrap_or_default());
        self.failed().insert(group.id, failed);
        Ok(said)
    }

    async fn fail_over(&self, record: &ClaimRecord, now: &Group) -> Result<String, AutomaticError> {
        let parts = &self.parts;
        // Not waited for here: meanwhile the group may be changed, or no longer wanted to be failed over.
        let Ok(_turn) = self.turns.try_acquire() else {
            return Ok("it is claimed, and waits for the failovers of other groups".into());
        };
        // What its operator has mended since in its runbook counts.
        let group = if now.members == record.group.members { now } else { &record.group }.clone();
        let name = group.spec.name.clone();
        let point = self.point(&group).await?;
        let audit = parts.scribe.begin(&name, &record.claim).await.map_err(AutomaticError::Other)?;
        let id = group.id;
        let chosen = Chosen { point: &point, newest: true };
        let done = parts.groups.emergency(group, chosen, false, &Watcher::nobody()).await;
        let groups = parts.groups.clone();
        tokio::spawn(async move { groups.settle(id).await });
        let done = match done {
            Err(GroupError::DoneBefore(_)) => Ok(()),
            done => done.map(drop),
        };
        parts.scribe.ended(audit, done.as_ref().err().map(|error| chain(error))).await;
        done?;
        fault::point("automatic.done");
        self.end(record)?;
        tracing::warn!(group = %name, "failed over by itself: its agents are silent, and the witness says that no lease is alive");
        Ok("it was failed over by itself".into())
    }

    /// Nobody wants it any more, and nothing has been begun: whoever asks is the VM's again.
    async fn give_up(&self, record: &ClaimRecord) -> Result<String, AutomaticError> {
        let vms: Vec<VmId> = record.parts.iter().map(|part| part.vm).collect();
        let entries = self.parts.witness.look(&vms).await?;
        if decide::is_claimed(&record.claim, &entries) {
            let free = |(part, entry): (&decide::Part, &lifeboat::witness::Entry)| {
                let agent = self.parts.site.clone();
                // The generation that the source has: it may take it again.
                let generation = lifeboat::units::Generation(part.generation.0.saturating_sub(1));
                let word = Word::Free { agent, generation };
                Change { vm: part.vm, over: entry.revision, word, leasing: Leasing::Gone }
            };
            let changes: Vec<Change> = record.parts.iter().zip(&entries).map(free).collect();
            self.parts.witness.change(&changes).await?;
        }
        self.end(record)?;
        Ok("the claim at the witness was given up".into())
    }

    fn end(&self, record: &ClaimRecord) -> Result<(), AutomaticError> {
        self.parts.book.remove(record.group.id)?;
        self.failed().remove(&record.group.id);
        record.parts.iter().for_each(|part| self.parts.runbook.intake.promises.open(part.vm));
        Ok(())
    }

    fn failed(&self) -> MutexGuard<'_, BTreeMap<GroupId, Failed>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn point(&self, group: &Group) -> Result<WholePoint, AutomaticError> {
        let found = self.parts.coordinator.points.select(group, &Selector::Latest).await;
        let found = found.map_err(|error| AutomaticError::Other(chain(&error)))?;
        found.map(WholePoint::from).ok_or_else(|| GroupError::NoPoint(group.spec.name.clone()).into())
    }

    /// But for what the witness says.
    async fn member(&self, vm: VmId, name: &str) -> Result<Member, AutomaticError> {
        let (store, intake) = (&self.parts.runbook.store, &self.parts.runbook.intake);
        let owner = store.owner(vm).await.map_err(|error| AutomaticError::Other(chain(&error)))?;
        Ok(Member {
            vm,
            name: name.to_owned(),
            connected: intake.switchboard.runs_somewhere(vm)
                || intake.board.seen(vm).is_some_and(|seen| seen.connected),
            silent_for: intake.promises.silent_for(vm),
            owner: owner.and_then(|owner| owner.writer().map(str::to_owned)),
            generation: store.generation(vm).await,
            entry: lifeboat::witness::Entry::default(),
        })
    }
}

const LOOK: Duration = Duration::from_secs(1);
/// Each restores as fast as the disks go: more of them would all be done later.
const AT_ONCE: usize = 8;
