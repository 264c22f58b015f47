//! One VM's place at the site: the receiving half of the conversation, and the points that are open in the store.
//! Promises: points are made durable one after the other, in the order in which they build on each other; they outlive a
//! lost link and are taken up again; what the store refuses is told to the agent and thrown away, with all that was
//! begun over it. While a point is being made durable, frames of the next one are taken; points are taken of the VM's owner
//! only ([`super::owner`]). Called by `session` for events, by `failover` to fence.

mod hand_over;
mod ownership;
mod reserve;

use crate::store::{Head, OpenPoint, PointError, Store};
use lifeboat::{
    fault,
    format::{frame::Frame, manifest::PointMeta, owner::Owner},
    id::{PointId, VmId},
    session::receiver::{Do, Held, Receiver},
    units::{Generation, Seq},
    wire::message::{Latest, Refusal, SiteMessage},
};
pub use ownership::Claim;
use ownership::{Present, RUNS};
pub use reserve::Reservation;
use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{Arc, PoisonError},
};
use tokio::sync::{Mutex, MutexGuard, Notify, broadcast, mpsc, oneshot};

/// Where replies to an agent go.
pub type Replies = mpsc::Sender<SiteMessage>;

/// A point that was made durable.
#[derive(Clone, Copy, Debug)]
pub struct MadeDurable {
    pub vm: VmId,
    pub point: PointId,
    pub seq: Seq,
}

/// Points that a slow listener may be behind; then he looks at the store.
const DURABLES_QUEUED: usize = 4096;

/// All VMs' slots, made as they are first heard of.
#[derive(Debug)]
pub struct Slots {
    store: Store,
    durable: broadcast::Sender<MadeDurable>,
    slots: std::sync::Mutex<BTreeMap<VmId, Arc<Slot>>>,
}

#[derive(Debug)]
pub struct Slot {
    vm: VmId,
    store: Store,
    durable: broadcast::Sender<MadeDurable>,
    inner: Mutex<Inner>,
    /// Sessions that watch this VM.
    present: std::sync::Mutex<BTreeMap<u64, Present>>,
    /// Told when a point has been made durable, or could not be.
    committed: Notify,
    /// Why the site takes no agent's points just now, if so.
    reserved: std::sync::Mutex<Option<String>>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    receiver: Receiver,
    open: BTreeMap<PointId, Arc<OpenPoint>>,
    replies: Option<Replies>,
    /// Whose points are taken; `None` until it was read.
    owner: Option<Option<Owner>>,
}

impl Slots {
    pub fn new(store: Store) -> Self {
        Self { store, durable: broadcast::channel(DURABLES_QUEUED).0, slots: std::sync::Mutex::default() }
    }

    pub fn slot(&self, vm: VmId) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let (name, receiver, open) = (String::new(), Receiver::new(vm), BTreeMap::new());
            let inner = Mutex::new(Inner { name, receiver, open, replies: None, owner: None });
            let present = std::sync::Mutex::default();
            let (store, durable) = (self.store.clone(), self.durable.clone());
            let (committed, reserved) = (Notify::new(), std::sync::Mutex::default());
            Arc::new(Slot { vm, store, durable, inner, present, committed, reserved })
        };
        slots.entry(vm).or_insert_with(make).clone()
    }

    /// Points as they become durable, from now on.
    pub fn made_durable(&self) -> broadcast::Receiver<MadeDurable> {
        self.durable.subscribe()
    }

    /// The slot, if the VM has been heard of since the controller started.
    pub fn find(&self, vm: VmId) -> Option<Arc<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(&vm).cloned()
    }

    /// A session has ended: what it said of where guests are is no longer known.
    pub fn gone(&self, session: u64) {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.values().for_each(|slot| slot.forget(session));
    }
}

impl Slot {
    /// An agent's session says that it protects this VM; replies go there from now on.
    /// `true` if its agent may be the one that writes the history.
    pub async fn watch(
        self: &Arc<Self>,
        session: u64,
        agent: &str,
        name: String,
        generation: Option<Generation>,
        replies: Replies,
    ) -> bool {
        let (agent, (told, owns)) = (agent.to_owned(), oneshot::channel());
        self.apart(async move |slot| {
            let mut inner = slot.at_rest().await;
            let owns = slot.note_watch(&mut inner, session, &agent, &replies).await;
            if owns || inner.name.is_empty() {
                inner.name = name;
            }
            let held = slot.held().await;
            if let Some(adopt) = slot.may_adopt(&mut inner, &agent, held, generation).await {
                let _ = replies.send(adopt).await; // a closed channel is a session that has just ended
                let _ = told.send(owns);
                return;
            }
            let answer = inner.receiver.watch(held, generation);
            // A VM that moves between hosts has several agents that look at it; what is open belongs to who began it.
            let taken = inner.replies.as_ref().is_some_and(|replies| !replies.is_closed());
            if let (SiteMessage::Vm { .. }, true, false) = (&answer, owns, taken) {
                inner.replies = Some(replies.clone());
            }
            // A closed channel is a session that has just ended.
            let _ = replies.send(answer).await;
            let _ = told.send(owns);
        })
        .await;
        owns.await.unwrap_or(false)
    }

    pub async fn begin(
        self: &Arc<Self>,
        agent: &str,
        generation: Generation,
        point: PointId,
        parent: Option<PointId>,
        replies: Replies,
    ) {
        let agent = agent.to_owned();
        self.apart(async move |slot| {
            let mut inner = slot.inner.lock().await;
            if slot.reserved().is_some() || !slot.is_owned_by(&mut inner, &agent).await {
                drop(inner);
                inner = slot.at_rest().await;
                if let Err(refusal) = slot.claim(&mut inner, &agent, false).await {
                    // To the one who asked, and not to the owner.
                    let _ = replies.send(SiteMessage::PointRefused { vm: slot.vm, point, refusal }).await;
                    return;
                }
            }
            if !inner.receiver.continues(point, parent) {
                drop(inner);
                inner = slot.at_rest().await;
            }
            inner.replies = Some(replies);
            let todo = inner.receiver.begin(slot.held().await, generation, point, parent);
            slot.perform(&mut inner, todo).await;
        })
        .await;
    }

    /// A frame has arrived. Frames of several streams are verified side by side; only the bookkeeping is serial.
    pub async fn frame(self: &Arc<Self>, point: PointId, frame: Frame) {
        self.apart(async move |slot| slot.take_frame(point, frame).await).await;
    }

    pub async fn end(self: &Arc<Self>, point: PointId, frames: u32, meta: Box<PointMeta>) {
        self.apart(async move |slot| {
            let mut inner = slot.inner.lock().await;
            let todo = inner.receiver.end(point, frames, meta);
            slot.perform(&mut inner, todo).await;
        })
        .await;
    }

    pub async fn abort(self: &Arc<Self>, point: PointId) {
        self.apart(async move |slot| {
            let mut inner = slot.at_rest().await;
            let todo = inner.receiver.abort(point);
            slot.perform(&mut inner, todo).await;
        })
        .await;
    }

    pub async fn generation(&self) -> Generation {
        self.store.generation(self.vm).await
    }

    /// The VM's generation has been raised: whoever still writes is turned away.
    pub async fn fence(self: &Arc<Self>, current: Generation) {
        self.apart(async move |slot| {
            let mut inner = slot.at_rest().await;
            let mut todo = inner.receiver.fence(current);
            let refusal = Refusal::Fenced { current };
            todo.push(Do::Reply(SiteMessage::VmRefused { vm: slot.vm, refusal }));
            slot.perform(&mut inner, todo).await;
            inner.replies = None;
        })
        .await;
    }

    /// The controller is stopping: what is open can't be finished.
    pub async fn close(self: &Arc<Self>) {
        self.apart(async move |slot| {
            let open = std::mem::take(&mut slot.at_rest().await.open);
            for open in open.into_values() {
                open.abort().await;
            }
        })
        .await;
    }

    /// Runs to its end even if the caller's session goes away in the middle: receiver and store must not part.
    async fn apart<F>(self: &Arc<Self>, work: impl FnOnce(Arc<Self>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if let Err(panic) = tokio::spawn(work(self.clone())).await {
            tracing::error!(vm = %self.vm, %panic, "a slot's task died");
        }
    }

    /// Waits until no point is being made durable.
    async fn at_rest(&self) -> MutexGuard<'_, Inner> {
        loop {
            let committed = self.committed.notified();
            let inner = self.inner.lock().await;
            if !inner.receiver.is_committing() {
                return inner;
            }
            drop(inner);
            committed.await;
        }
    }

    async fn take_frame(self: &Arc<Self>, point: PointId, frame: Frame) {
        let seq = frame.head.seq;
        let open = {
            let mut inner = self.inner.lock().await;
            let todo = inner.receiver.frame(point, seq);
            if let [Do::Append { .. }] = todo.as_slice() {
                inner.open.get(&point).cloned()
            } else {
                self.perform(&mut inner, todo).await;
                None
            }
        };
        let Some(open) = open else { return };
        fault::point("intake.append");
        let appended = open.append(frame).await;
        let mut inner = self.inner.lock().await;
        if !inner.receiver.is_open(point) {
            return;
        }
        let todo = match appended {
            Ok(_) => inner.receiver.appended(point, seq),
            Err(error) => inner.receiver.failed(point, self.refusal(&error)),
        };
        self.perform(&mut inner, todo).await;
    }

    async fn held(&self) -> Held {
        let generation = self.store.generation(self.vm).await;
        let head = self.store.latest(self.vm).await;
        let raised_since_latest = head.as_ref().is_some_and(|head| head.generation < generation);
        // Nothing can be built on a damaged point: the agent is to start afresh, in full.
        let latest = head.filter(Head::is_whole).map(|head| Latest {
            point: head.point,
            seq: head.seq,
            cut_at: head.cut_at,
            committed_at: head.committed_at,
        });
        Held { generation, latest, raised_since_latest }
    }

    /// Does what the receiver asks, in order; each answer of the store may bring more to do.
    async fn perform(self: &Arc<Self>, inner: &mut Inner, todo: Vec<Do>) {
        let mut todo = VecDeque::from(todo);
        while let Some(next) = todo.pop_front() {
            let more = match next {
                Do::Reply(message) => {
                    if let Some(replies) = &inner.replies {
                        let _ = replies.send(message).await;
                    }
                    Vec::new()
                }
                Do::Open { generation, point, parent } => {
                    match self.store.open_point(self.vm, &inner.name, generation, point, parent).await {
                        Ok(open) => {
                            inner.open.insert(point, Arc::new(open));
                            inner.receiver.opened(generation, point, parent)
                        }
                        Err(error) => inner.receiver.failed(point, self.refusal(&error)),
                    }
                }
                // Appending is `frame`'s own business, so that it need not hold the lock.
                Do::Append { .. } => Vec::new(),
                Do::Commit { point, frames, meta } => {
                    // Not under the lock: a commit takes as long as the disk takes.
                    tokio::spawn(self.clone().commit(inner.open.get(&point).cloned(), point, frames, *meta));
                    Vec::new()
                }
                Do::Discard { point } => {
                    if let Some(open) = inner.open.remove(&point) {
                        open.abort().await;
                    }
                    Vec::new()
                }
            };
            todo.extend(more);
        }
    }

    /// Makes a point durable, and says so. Returns a boxed future: what follows may be the next commit.
    fn commit(
        self: Arc<Self>,
        open: Option<Arc<OpenPoint>>,
        point: PointId,
        frames: u32,
        meta: PointMeta,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let committed = match &open {
                Some(open) => {
                    let open = open.clone();
                    let work = async move {
                        fault::point("intake.commit");
                        let committed = open.commit(meta, frames).await;
                        fault::point("intake.committed");
                        committed
                    };
                    // A task of its own, so that the others do not wait for ever if it panics.
                    tokio::spawn(work).await.unwrap_or_else(|panic| {
                        tracing::error!(vm = %self.vm, %panic, "a commit died");
                        Err(PointError::Closed("its commit died"))
                    })
                }
                None => Err(PointError::Closed("it is not open")),
            };
            let mut inner = self.inner.lock().await;
            let inner = &mut *inner;
            let todo = match committed {
                Ok(done) => {
                    inner.open.remove(&point);
                    // Nobody may be listening.
                    let _ = self.durable.send(MadeDurable { vm: self.vm, point, seq: done.seq });
                    tracing::info!(vm = %inner.name, %point, seq = done.seq.0, "point committed");
                    inner.receiver.committed(point, done.seq, done.committed_at, done.manifest)
                }
                // What was written is thrown away as the receiver says.
                Err(error) => inner.receiver.failed(point, self.refusal(&error)),
            };
            self.perform(inner, todo).await;
            self.committed.notify_waiters();
        })
    }

    /// What the agent is told of an error of the store; the details are for this site's log.
    fn refusal(&self, error: &PointError) -> Refusal {
        tracing::warn!(vm = %self.vm, error = error.to_string(), "a point was refused");
        match error {
            PointError::Fenced { current, .. } | PointError::Unknown { current, .. } => {
                Refusal::Fenced { current: *current }
            }
            PointError::Parent { latest, .. } => Refusal::WrongParent { latest: *latest },
            PointError::Store(store) if store.is_full() => Refusal::SiteFull { detail: store.to_string() },
            PointError::Busy { .. } | PointError::Store(_) => Refusal::Internal { detail: error.to_string() },
            PointError::Incomplete { .. } | PointError::Closed(_) => Refusal::UnknownPoint,
            PointError::Frame(_) | PointError::Invalid(_) => Refusal::Invalid { detail: error.to_string() },
        }
    }
}
