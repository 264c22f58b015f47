//! One VM's place at the site: the receiving half of the conversation, and the point that is open in the store.
//! Promises: one point of a VM is open at a time; it outlives a lost link and is taken up again; what the store refuses
//! is told to the agent and thrown away. Called by `session` for events, by `failover` to fence.

use crate::store::{OpenPoint, Store, StoreError};
use lifeboat::{
    fault,
    format::{frame::Frame, manifest::PointMeta},
    id::{PointId, VmId},
    session::receiver::{Do, Held, Receiver},
    units::Generation,
    wire::message::{Latest, Refusal, SiteMessage},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, PoisonError},
};
use tokio::sync::{Mutex, mpsc};

/// Where replies to an agent go.
pub type Replies = mpsc::Sender<SiteMessage>;

/// All VMs' slots, made as they are first heard of.
#[derive(Debug)]
pub struct Slots {
    store: Arc<Store>,
    slots: std::sync::Mutex<BTreeMap<VmId, Arc<Slot>>>,
}

#[derive(Debug)]
pub struct Slot {
    vm: VmId,
    store: Arc<Store>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    receiver: Receiver,
    open: Option<OpenPoint>,
    replies: Option<Replies>,
}

impl Slots {
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, slots: std::sync::Mutex::default() }
    }

    pub fn slot(&self, vm: VmId) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let inner =
                Inner { name: String::new(), receiver: Receiver::new(vm), open: None, replies: None };
            Arc::new(Slot { vm, store: self.store.clone(), inner: Mutex::new(inner) })
        };
        slots.entry(vm).or_insert_with(make).clone()
    }

    /// The slot, if the VM has been heard of since the controller started.
    pub fn find(&self, vm: VmId) -> Option<Arc<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(&vm).cloned()
    }
}

impl Slot {
    /// An agent's session says that it protects this VM; replies go there from now on.
    pub async fn watch(&self, name: String, generation: Option<Generation>, replies: Replies) {
        let mut inner = self.inner.lock().await;
        inner.name = name;
        let answer = inner.receiver.watch(self.held(), generation);
        if let SiteMessage::Vm { .. } = answer {
            inner.replies = Some(replies.clone());
        }
        // A closed channel is a session that has just ended.
        let _ = replies.send(answer).await;
    }

    pub async fn begin(&self, generation: Generation, point: PointId, parent: Option<PointId>) {
        let mut inner = self.inner.lock().await;
        let todo = inner.receiver.begin(self.held(), generation, point, parent);
        self.perform(&mut inner, todo).await;
    }

    pub async fn frame(&self, point: PointId, frame: Frame) {
        let mut inner = self.inner.lock().await;
        let todo = inner.receiver.frame(point, frame);
        self.perform(&mut inner, todo).await;
    }

    pub async fn end(&self, point: PointId, frames: u32, meta: Box<PointMeta>) {
        let mut inner = self.inner.lock().await;
        let todo = inner.receiver.end(point, frames, meta);
        self.perform(&mut inner, todo).await;
    }

    pub async fn abort(&self, point: PointId) {
        let mut inner = self.inner.lock().await;
        let todo = inner.receiver.abort(point);
        self.perform(&mut inner, todo).await;
    }

    /// The VM's generation has been raised: whoever still writes is turned away.
    pub async fn fence(&self, current: Generation) {
        let mut inner = self.inner.lock().await;
        let mut todo = inner.receiver.fence(current);
        let refusal = Refusal::Fenced { current };
        todo.push(Do::Reply(SiteMessage::VmRefused { vm: self.vm, refusal }));
        self.perform(&mut inner, todo).await;
        inner.replies = None;
    }

    /// The controller is stopping: what is open can't be finished.
    pub async fn close(&self) {
        let mut inner = self.inner.lock().await;
        if let Some(open) = inner.open.take() {
            open.abort().await;
        }
    }

    fn held(&self) -> Held {
        let (generation, latest) = self.store.standing(self.vm);
        let raised_since_latest = latest.as_ref().is_some_and(|latest| latest.generation < generation);
        let latest = latest.map(|latest| Latest {
            point: latest.point,
            seq: latest.seq,
            cut_at: latest.cut_at,
            committed_at: latest.committed_at,
        });
        Held { generation, latest, raised_since_latest }
    }

    /// Does what the receiver asks, in order; each answer of the store may bring more to do.
    async fn perform(&self, inner: &mut Inner, todo: Vec<Do>) {
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
                            inner.open = Some(open);
                            inner.receiver.opened(generation, point, parent)
                        }
                        Err(error) => inner.receiver.failed(point, self.refusal(&error)),
                    }
                }
                Do::Append(frame) => self.append(inner, frame).await,
                Do::Commit { frames, meta } => self.commit(inner, frames, *meta).await,
                Do::Discard => {
                    if let Some(open) = inner.open.take() {
                        open.abort().await;
                    }
                    Vec::new()
                }
            };
            todo.extend(more);
        }
    }

    async fn append(&self, inner: &mut Inner, frame: Frame) -> Vec<Do> {
        let Some(open) = inner.open.as_mut() else { return Vec::new() };
        let (seq, point) = (frame.head.seq, open.point());
        fault::point("intake.append");
        match open.append(frame).await {
            Ok(()) => inner.receiver.appended(seq),
            Err(error) => inner.receiver.failed(point, self.refusal(&error)),
        }
    }

    async fn commit(&self, inner: &mut Inner, frames: u32, meta: PointMeta) -> Vec<Do> {
        let Some(open) = inner.open.take() else { return Vec::new() };
        let point = open.point();
        fault::point("intake.commit");
        let committed = open.commit(frames, meta).await;
        fault::point("intake.committed");
        match committed {
            Ok(done) => {
                tracing::info!(vm = %inner.name, %point, seq = done.seq.0, "point committed");
                inner.receiver.committed(done.seq, done.committed_at, done.manifest)
            }
            Err(error) => inner.receiver.failed(point, self.refusal(&error)),
        }
    }

    fn refusal(&self, error: &StoreError) -> Refusal {
        tracing::warn!(vm = %self.vm, error = %error.chain(), "the store refused a point");
        error.refusal()
    }
}
