//! The store as others hold it.
//! Promises: everything that changes a VM's history happens under that VM's lock; the generation only ever rises, and is
//! durable before anybody is told. Called by intake, failover, catalog, restore.

use crate::store::{
    error::StoreError,
    finding::ReopenReport,
    ids::PackIds,
    index::SummaryIndex,
    objects::Objects,
    order::{Ask, Order},
    paths, reopen,
    slot::{Head, History, Slot},
    summary::PointSummary,
    walk,
};
use bytes::Bytes;
use lifeboat::{
    chunk::digest::Digest,
    clock::Clock,
    format::header::{FileHeader, Kind},
    id::VmId,
    units::{ByteSize, Generation, UnixMs},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::{OwnedMutexGuard, Semaphore};

#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// A pack that has grown to this is finished and the next one begun.
    pub pack_size: ByteSize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { pack_size: ByteSize(256 << 20) }
    }
}

/// A handle to the store; clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub objects: Arc<dyn Objects>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn PackIds>,
    pub index: Arc<dyn SummaryIndex>,
    pub options: StoreOptions,
    /// Frames being verified at once.
    pub verifying: Semaphore,
    vms: Mutex<BTreeMap<VmId, Arc<Slot>>>,
}

impl Store {
    /// Opens what is there, after any ending of the process before: see [`reopen`].
    pub async fn open(
        objects: Arc<dyn Objects>,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn PackIds>,
        index: Arc<dyn SummaryIndex>,
        options: StoreOptions,
    ) -> Result<(Self, ReopenReport), StoreError> {
        let (vms, report) = reopen::reopen(objects.as_ref(), clock.now(), index.clone()).await?;
        let slots = vms.into_iter().map(|(vm, history)| {
            let history = Arc::new(tokio::sync::Mutex::new(history));
            (vm, Arc::new(Slot { history, ..Slot::default() }))
        });
        let verifying = Semaphore::new(std::thread::available_parallelism().map_or(2, Into::into));
        let vms = Mutex::new(slots.collect());
        let shared = Arc::new(Shared { objects, clock, ids, index, options, verifying, vms });
        Ok((Self { shared }, report))
    }

    /// The newest durable point of a VM, unless its manifest can't be read.
    pub async fn latest(&self, vm: VmId) -> Option<Head> {
        self.shared.lock(vm).await.head.clone()
    }

    pub async fn generation(&self, vm: VmId) -> Generation {
        self.shared.lock(vm).await.generation
    }

    /// Raises a VM's generation: from now on nothing of a lower one is committed, not even what is half there. Waits for
    /// a commit that is just writing its manifest. Not undone by cancelling.
    pub async fn raise(&self, vm: VmId) -> Result<Generation, StoreError> {
        let shared = self.shared.clone();
        apart(vm, async move {
            let mut history = shared.lock(vm).await;
            shared.raise(vm, &mut history, Generation::FIRST).await
        })
        .await
    }

    /// Adopts a generation that another site raised. Does nothing if the VM's is as high already.
    pub async fn raise_to(&self, vm: VmId, generation: Generation) -> Result<Generation, StoreError> {
        let shared = self.shared.clone();
        apart(vm, async move {
            let mut history = shared.lock(vm).await;
            if history.generation >= generation {
                return Ok(history.generation);
            }
            shared.raise(vm, &mut history, generation).await
        })
        .await
    }

    pub fn objects(&self) -> &Arc<dyn Objects> {
        &self.shared.objects
    }

    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.shared.clock
    }

    /// Points of one VM by seq, or of all VMs. From the index, or from the manifests if the index has failed.
    pub async fn points(&self, vm: Option<VmId>) -> Result<Vec<PointSummary>, StoreError> {
        let answer = move |index: &dyn SummaryIndex| index.points(vm);
        if let Some(points) = self.ask_index(answer).await {
            return Ok(points);
        }
        let truth = self.rebuild_index().await?;
        Ok(truth.into_iter().filter(|summary| vm.is_none_or(|vm| summary.vm == vm)).collect())
    }

    /// One point of a VM, if it has such a one. The time that it takes grows with the logarithm of the VM's points.
    pub async fn find(&self, vm: VmId, ask: Ask) -> Result<Option<PointSummary>, StoreError> {
        let answer = move |index: &dyn SummaryIndex| index.find(vm, ask);
        if let Some(found) = self.ask_index(answer).await {
            return Ok(found);
        }
        let truth = self.rebuild_index().await?;
        let seq = Order::of(&truth).find(vm, ask);
        Ok(truth.into_iter().find(|summary| summary.vm == vm && Some(summary.seq) == seq))
    }

    async fn ask_index<T: Send + 'static>(
        &self,
        answer: impl FnOnce(&dyn SummaryIndex) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let index = self.shared.index.clone();
        tokio::task::spawn_blocking(move || answer(index.as_ref())).await.unwrap_or_default()
    }

    /// From the manifests, which it returns the summaries of.
    async fn rebuild_index(&self) -> Result<Vec<PointSummary>, StoreError> {
        tracing::warn!("the index of points has failed; it is rebuilt from the manifests");
        let (_, truth) = walk::scan(self.shared.objects.as_ref()).await?;
        let index = self.shared.index.clone();
        let summaries = truth.clone();
        drop(tokio::task::spawn_blocking(move || index.reconcile(&summaries)).await);
        Ok(truth)
    }

    /// Whether a point of any VM is being received.
    pub fn is_receiving(&self) -> bool {
        let vms = self.shared.vms.lock().unwrap_or_else(PoisonError::into_inner);
        vms.values()
            .any(|slot| !slot.admission.lock().unwrap_or_else(PoisonError::into_inner).open.is_empty())
    }

    /// VMs that have a history or a generation here.
    pub fn vms(&self) -> Vec<VmId> {
        self.shared.vms.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

impl Shared {
    pub fn slot(&self, vm: VmId) -> Arc<Slot> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).entry(vm).or_default().clone()
    }

    pub async fn lock(&self, vm: VmId) -> OwnedMutexGuard<History> {
        self.slot(vm).history.clone().lock_owned().await
    }

    async fn raise(
        &self,
        vm: VmId,
        history: &mut History,
        least: Generation,
    ) -> Result<Generation, StoreError> {
        let mut next = history.generation.next().max(least);
        loop {
            let record = GenerationRecord { vm, generation: next, raised_at: self.clock.now() };
            match self.objects.put_durable(&paths::generation(vm, next), record.encode()).await {
                Ok(()) => break,
                // A former attempt failed, but not without a trace. Higher is always safe.
                Err(StoreError::Exists { .. }) if next < next.next() => next = next.next(),
                Err(error) => return Err(error),
            }
        }
        history.generation = next;
        Ok(next)
    }
}

/// Runs to its end even if the caller goes away: a half-done write must not be forgotten.
pub(super) async fn apart<T, E>(
    vm: VmId,
    work: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<StoreError> + Send + 'static,
{
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => Err(StoreError::disk(&paths::of_vm(vm), "running the task", error).into()),
    }
}

/// Reads and checks the record of one generation.
pub async fn read_generation(
    objects: &dyn Objects,
    vm: VmId,
    generation: Generation,
) -> Result<UnixMs, StoreError> {
    let path = paths::generation(vm, generation);
    let file = objects.get(&path, RECORD_MAX).await?;
    match GenerationRecord::decode(&file) {
        Some(record) if record.vm == vm && record.generation == generation => Ok(record.raised_at),
        Some(_) => Err(StoreError::damaged(&path, "it is the record of another generation")),
        None => Err(StoreError::damaged(&path, "it does not match its digest")),
    }
}

/// What stands in `vms/<vm>/generations/<n>`; the name is what counts, this says when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct GenerationRecord {
    vm: VmId,
    generation: Generation,
    raised_at: UnixMs,
}

impl GenerationRecord {
    fn encode(&self) -> Bytes {
        // Fixed-size fields only: postcard has nothing to refuse.
        let body = postcard::to_stdvec(self).unwrap_or_default();
        let body_digest = Digest::of(&body);
        let header =
            FileHeader { kind: Kind::Generation, version: 1, body_len: body.len() as u32, body_digest };
        [header.encode().as_slice(), &body].concat().into()
    }

    fn decode(file: &[u8]) -> Option<Self> {
        let header = FileHeader::decode(file, Kind::Generation, 1..=1).ok()?;
        let body = &file[FileHeader::LEN..];
        let whole = body.len() == header.body_len as usize && Digest::of(body) == header.body_digest;
        if whole { postcard::from_bytes(body).ok() } else { None }
    }
}

const RECORD_MAX: u64 = 4096;
