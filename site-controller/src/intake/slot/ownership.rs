//! Whose VM this is: what agents say of where the guest is, and what follows from it ([`crate::intake::owner`] judges).
//! Promises: a change of hands is on stable storage before the new owner is told; nothing that the former owner had begun
//! is committed after it; where the owner can't be read or written, nobody's points are taken.

use super::{Inner, Replies, Slot};
pub(super) use crate::intake::owner::Word;
use crate::{
    intake::owner::{Verdict, judge},
    store::StoreError,
};
use lifeboat::{
    fault,
    format::owner::Owner,
    units::Generation,
    wire::message::{Place, Refusal, SiteMessage},
};
use std::sync::{Arc, PoisonError};
use tokio::sync::oneshot;

/// A session that watches the VM.
#[derive(Debug)]
pub(super) struct Present {
    pub agent: String,
    place: Option<Place>,
    pub replies: Replies,
}

/// What became of an agent's wish to write the VM's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    Granted,
    Refused(String),
}

impl Slot {
    /// A session watches this VM; `true` if its agent is the owner, or nobody is.
    pub(super) async fn note_watch(
        &self,
        inner: &mut Inner,
        session: u64,
        agent: &str,
        replies: &Replies,
    ) -> bool {
        {
            let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
            let (agent, replies) = (agent.to_owned(), replies.clone());
            present.entry(session).or_insert_with(|| Present { agent, place: None, replies });
        }
        match self.owner(inner).await {
            Ok(owner) => owner.is_none_or(|owner| owner.agent() == agent),
            Err(_) => false,
        }
    }

    pub(super) fn forget(&self, session: u64) {
        self.present.lock().unwrap_or_else(PoisonError::into_inner).remove(&session);
    }

    /// An agent says where the guest is. If it has it, it is told whether its points are taken.
    pub async fn place(
        self: &Arc<Self>,
        session: u64,
        agent: &str,
        place: Place,
        replies: Replies,
    ) -> Option<Claim> {
        {
            let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
            let (agent, replies) = (agent.to_owned(), replies.clone());
            present.insert(session, Present { agent, place: Some(place), replies });
        }
        let (agent, (told, claim)) = (agent.to_owned(), oneshot::channel());
        self.apart(async move |slot| match place {
            Place::NotHere => drop(told),
            Place::Left => slot.has_left(&agent).await,
            Place::Here { migrated } => {
                let mut inner = slot.at_rest().await;
                let claimed = slot.claim(&mut inner, &agent, migrated).await;
                let held = slot.held().await;
                let (answer, claim) = match claimed {
                    Ok(()) => {
                        inner.replies = Some(replies.clone());
                        let (generation, latest) = (held.generation, held.latest);
                        (SiteMessage::Vm { vm: slot.vm, generation, latest }, Claim::Granted)
                    }
                    Err(refusal) => {
                        let why = refusal.to_string();
                        (SiteMessage::VmRefused { vm: slot.vm, refusal }, Claim::Refused(why))
                    }
                };
                // A closed channel is a session that has just ended.
                let _ = replies.send(answer).await;
                let _ = told.send(claim);
            }
        })
        .await;
        claim.await.ok()
    }

    /// An operator says that whoever has the guest running may take over; the agent that had it so far, if one had.
    /// Refused while the owner says that it has it running.
    pub async fn release(self: &Arc<Self>) -> Result<Option<String>, String> {
        let (told, answer) = oneshot::channel();
        self.apart(async move |slot| {
            let mut inner = slot.at_rest().await;
            // One that can't be read is replaced: that is what an operator's word is for.
            let owner = slot.owner(&mut inner).await.unwrap_or_else(|_| Some(Owner::Left(UNKNOWN.into())));
            let said = match owner {
                None => Ok(None),
                Some(owner) if slot.word_of(owner.agent()) == Word::Said(RUNS) => {
                    Err(format!("agent {} says that the guest runs on its host", owner.agent()))
                }
                Some(owner) => {
                    let agent = owner.agent().to_owned();
                    let released = slot.set_owner(&mut inner, Owner::Released(agent.clone())).await;
                    released.map(|()| Some(agent)).map_err(|error| error.to_string())
                }
            };
            let _ = told.send(said);
        })
        .await;
        answer.await.unwrap_or_else(|_| Err("it could not be done".into()))
    }

    pub(super) async fn is_owned_by(&self, inner: &mut Inner, agent: &str) -> bool {
        matches!(self.owner(inner).await, Ok(Some(owner)) if owner.writer() == Some(agent))
    }

    /// Gives the VM to this agent, if it may have it. No point is being made durable.
    pub(super) async fn claim(
        self: &Arc<Self>,
        inner: &mut Inner,
        agent: &str,
        migrated: bool,
    ) -> Result<(), Refusal> {
        if let Some(why) = self.reserved() {
            return Err(Refusal::HeldElsewhere { why });
        }
        let internal = |error: StoreError| Refusal::Internal { detail: error.to_string() };
        let owner = self.owner(inner).await.map_err(internal)?;
        if owner.as_ref().is_none_or(|owner| matches!(owner, Owner::Released(_)))
            && let Some(why) = self.is_off_at_several(agent)
        {
            return Err(Refusal::HeldElsewhere { why });
        }
        let word = owner.as_ref().map_or(Word::Absent, |owner| self.word_of(owner.agent()));
        match judge(owner.as_ref(), word, agent, migrated) {
            Verdict::Keep => Ok(()),
            Verdict::Refuse(why) => {
                tracing::warn!(vm = %self.vm, name = inner.name, agent, %why, "an agent was refused a VM");
                Err(Refusal::HeldElsewhere { why })
            }
            Verdict::Take => {
                let held = self.held().await;
                if owner.is_some() && held.raised_since_latest {
                    return Err(fenced(held.generation));
                }
                fault::point("owner.before");
                self.set_owner(inner, Owner::Agent(agent.to_owned())).await.map_err(internal)?;
                fault::point("owner.after");
                let from = owner.as_ref().map(Owner::agent);
                tracing::info!(vm = %self.vm, name = inner.name, agent, from, migrated, "this agent writes the history now");
                if from.is_some_and(|from| from != agent) {
                    self.drop_open(inner).await;
                }
                Ok(())
            }
        }
    }

    /// The guest was migrated away from this agent's host: nobody has the VM until it is found where it came in.
    async fn has_left(self: &Arc<Self>, agent: &str) {
        let mut inner = self.at_rest().await;
        if !self.is_owned_by(&mut inner, agent).await {
            return;
        }
        match self.set_owner(&mut inner, Owner::Left(agent.to_owned())).await {
            Ok(()) => {
                tracing::info!(vm = %self.vm, name = inner.name, agent, "the guest was migrated away from this agent's host");
                self.drop_open(&mut inner).await;
            }
            // It counts as its owner still, and as saying that the guest has left.
            Err(error) => tracing::warn!(vm = %self.vm, %error, "that a guest has left could not be noted"),
        }
    }

    /// What was begun by an owner before is never committed.
    async fn drop_open(self: &Arc<Self>, inner: &mut Inner) {
        let open: Vec<_> = inner.open.keys().copied().collect();
        for point in open {
            let todo = inner.receiver.abort(point);
            self.perform(inner, todo).await;
        }
    }

    pub(super) async fn owner(&self, inner: &mut Inner) -> Result<Option<Owner>, StoreError> {
        if let Some(owner) = &inner.owner {
            return Ok(owner.clone());
        }
        let owner = self.store.owner(self.vm).await.inspect_err(|error| {
            tracing::error!(vm = %self.vm, %error, "whose VM it is can't be read; no points of it are taken");
        })?;
        inner.owner = Some(owner.clone());
        Ok(owner)
    }

    pub(super) async fn set_owner(&self, inner: &mut Inner, owner: Owner) -> Result<(), StoreError> {
        // Whatever comes of it is read again.
        inner.owner = None;
        self.store.set_owner(self.vm, owner.clone()).await?;
        inner.owner = Some(Some(owner));
        Ok(())
    }

    /// A VM that is nobody's is not given to a copy that is off while another host has one too: it is that one's that runs.
    fn is_off_at_several(&self, agent: &str) -> Option<String> {
        if self.word_of(agent) != Word::Said(Place::NotHere) {
            return None;
        }
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let other = present.values().find(|present| present.agent != agent)?;
        Some(format!(
            "agent {} has this VM too, and it is off here: it is protected from where it is started first",
            other.agent
        ))
    }

    /// What the newest session of the agent says.
    pub(super) fn word_of(&self, agent: &str) -> Word {
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        match present.values().rev().find(|present| present.agent == agent).map(|present| present.place) {
            None => Word::Absent,
            Some(None) => Word::Unsaid,
            Some(Some(Place::Here { .. })) => Word::Said(RUNS),
            Some(Some(place)) => Word::Said(place),
        }
    }
}

fn fenced(current: Generation) -> Refusal {
    Refusal::Fenced { current }
}

pub(super) const RUNS: Place = Place::Here { migrated: false };
const UNKNOWN: &str = "unknown";

#[cfg(test)]
mod tests;
