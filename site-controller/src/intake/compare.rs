//! Answering agents that want to know how the site's copy of a VM differs from the guest.
//! Promises: only of the newest durable point, and only if it is whole, is anything said; one image is read at a time for
//! all agents together, so that intake and restores keep most of the disk; an image is read once for as many questions as
//! come, and forgotten when none came for a while; what waits for an answer is bounded. Called by `session`.

use crate::{
    intake::slot::Replies,
    restore::{Plan, Reader, fingerprints::ImageFingerprints},
    store::{Head, Store, StoreError},
};
use lifeboat::{
    error, fault,
    format::manifest::ImageKind,
    id::{PointId, VmId},
    wire::{
        compare::{Answer, Level, Question, Reply},
        message::SiteMessage,
    },
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{OnceCell, Semaphore, watch},
    time::Instant,
};

/// Answers questions of all agents.
#[derive(Debug)]
pub struct Comparisons {
    store: Store,
    /// Where the nameless files go.
    dir: PathBuf,
    reading: Semaphore,
    desks: Mutex<BTreeMap<VmId, Arc<Desk>>>,
}

/// One VM's.
#[derive(Debug)]
struct Desk {
    waiting: Arc<Semaphore>,
    basis: Mutex<Option<Arc<Basis>>>,
}

/// The point that is compared with.
#[derive(Debug)]
struct Basis {
    point: PointId,
    reader: OnceCell<Reader>,
    images: Mutex<BTreeMap<(ImageKind, String), watch::Receiver<Found>>>,
    used: Mutex<Instant>,
}

/// How far reading an image is.
#[derive(Clone, Debug)]
enum Found {
    Reading { done_bytes: u64, total_bytes: u64 },
    Ready(Arc<ImageFingerprints>),
    Nothing(String),
}

impl Comparisons {
    pub fn new(store: Store, dir: PathBuf) -> Arc<Self> {
        Arc::new(Self { store, dir, reading: Semaphore::new(1), desks: Mutex::default() })
    }

    /// Answers in its own time; a question too many is refused at once.
    pub async fn ask(self: &Arc<Self>, vm: VmId, question: Question, replies: &Replies) {
        fault::point("compare.ask");
        let desk = lock(&self.desks).entry(vm).or_default().clone();
        let no = question.no;
        let refused = |why: &str| {
            let answer = Answer { no, reply: Reply::Refused { why: why.into() } };
            SiteMessage::Compared { vm, answer }
        };
        let permit = match desk.waiting.clone().try_acquire_owned() {
            _ if !question.is_sound() => {
                let _ = replies.send(refused("the question makes no sense")).await;
                return;
            }
            Ok(permit) => permit,
            Err(_) => {
                let _ = replies.send(refused("too many questions at once")).await;
                return;
            }
        };
        let (site, replies) = (self.clone(), replies.clone());
        tokio::spawn(async move {
            tokio::select! {
                reply = site.find(vm, &desk, &question, &replies) => {
                    // A closed channel is a session that has just ended.
                    let _ = replies.send(SiteMessage::Compared { vm, answer: Answer { no, reply } }).await;
                }
                () = replies.closed() => {}
            }
            drop(permit);
        });
    }

    async fn find(
        self: &Arc<Self>,
        vm: VmId,
        desk: &Arc<Desk>,
        question: &Question,
        replies: &Replies,
    ) -> Reply {
        match self.try_find(vm, desk, question, replies).await {
            Ok(reply) => reply,
            Err(why) => {
                tracing::info!(%vm, image = question.image, %why, "nothing to compare with");
                Reply::Refused { why }
            }
        }
    }

    async fn try_find(
        self: &Arc<Self>,
        vm: VmId,
        desk: &Arc<Desk>,
        question: &Question,
        replies: &Replies,
    ) -> Result<Reply, String> {
        let head = self.store.latest(vm).await.filter(|head| head.point == question.point);
        let head = head.ok_or("it is not the newest point (any more)")?;
        if !head.is_whole() {
            return Err("the newest point is damaged".into());
        }
        let basis = self.basis(desk, head.point);
        let mut found = self.image(vm, &head, &basis, question.kind, &question.image);
        let ready = loop {
            let settled = found.wait_for(|found| !matches!(found, Found::Reading { .. }));
            // Waiting for it is cancel-safe: nothing is lost with the time-out.
            let settled = match tokio::time::timeout(TELL_EVERY, settled).await {
                Ok(Ok(settled)) => Some(settled.clone()),
                Ok(Err(_)) => return Err("reading the site's copy was given up".into()),
                Err(_) => None,
            };
            match settled.unwrap_or_else(|| found.borrow().clone()) {
                Found::Ready(ready) => break ready,
                Found::Nothing(why) => return Err(why),
                Found::Reading { done_bytes, total_bytes } => {
                    let reply = Reply::Reading { done_bytes, total_bytes };
                    let answer = Answer { no: question.no, reply };
                    let _ = replies.send(SiteMessage::Compared { vm, answer }).await;
                }
            }
        };
        *lock(&basis.used) = Instant::now();
        let (level, first, count) = (question.level, question.first, question.count);
        let looked_up = tokio::task::spawn_blocking(move || match level {
            Level::Regions => ready.regions(first, count),
            Level::Pages => ready.pages(first, count),
        });
        let told = looked_up.await.map_err(|error| error.to_string())?;
        told.map(Reply::Fingerprints).map_err(|error| error::chain(&error))
    }

    /// What is known of `point`; replaces what was known of an older one.
    fn basis(self: &Arc<Self>, desk: &Arc<Desk>, point: PointId) -> Arc<Basis> {
        let mut slot = lock(&desk.basis);
        if let Some(basis) = slot.as_ref().filter(|basis| basis.point == point) {
            *lock(&basis.used) = Instant::now();
            return basis.clone();
        }
        let used = Mutex::new(Instant::now());
        let basis = Arc::new(Basis { point, reader: OnceCell::new(), images: Mutex::default(), used });
        *slot = Some(basis.clone());
        tokio::spawn(forget_when_idle(Arc::downgrade(desk), Arc::downgrade(&basis)));
        basis
    }

    /// The image's fingerprints, which begin to be read if nobody has asked for them yet.
    fn image(
        self: &Arc<Self>,
        vm: VmId,
        head: &Head,
        basis: &Arc<Basis>,
        kind: ImageKind,
        name: &str,
    ) -> watch::Receiver<Found> {
        let mut images = lock(&basis.images);
        if let Some(found) = images.get(&(kind, name.to_owned())) {
            return found.clone();
        }
        let (tell, found) = watch::channel(Found::Reading { done_bytes: 0, total_bytes: 0 });
        if images.len() >= IMAGES_MAX {
            tell.send_replace(Found::Nothing("more images than a point has".into()));
            return found;
        }
        images.insert((kind, name.to_owned()), found.clone());
        let (site, head, basis, name) = (self.clone(), head.clone(), basis.clone(), name.to_owned());
        tokio::spawn(async move {
            let end = match site.read(vm, &head, &basis, kind, &name, &tell).await {
                Ok(ready) => Found::Ready(Arc::new(ready)),
                Err(error) => Found::Nothing(error::chain(&error)),
            };
            tell.send_replace(end);
        });
        found
    }

    async fn read(
        &self,
        vm: VmId,
        head: &Head,
        basis: &Basis,
        kind: ImageKind,
        name: &str,
        tell: &watch::Sender<Found>,
    ) -> Result<ImageFingerprints, crate::restore::RestoreError> {
        let turn = self.reading.acquire().await;
        let _turn = turn.map_err(|error| StoreError::disk("compare", "waiting for a turn", error))?;
        let objects = self.store.objects();
        // Pinned: the point may be folded while it is read.
        let plan = || async {
            let plan = Plan::of(&self.store, vm, head.seq).await?;
            Ok::<_, crate::restore::RestoreError>(Reader::new(objects.clone(), Arc::new(plan)))
        };
        let reader = basis.reader.get_or_try_init(plan).await?;
        ImageFingerprints::read(reader, kind, name, &self.dir, |progress| {
            tell.send_replace(Found::Reading {
                done_bytes: progress.done_bytes,
                total_bytes: progress.total_bytes,
            });
        })
        .await
    }
}

impl Default for Desk {
    fn default() -> Self {
        Self { waiting: Arc::new(Semaphore::new(WAITING_MAX)), basis: Mutex::default() }
    }
}

/// Gives the file and the plan back once nobody has asked for a while.
async fn forget_when_idle(desk: std::sync::Weak<Desk>, basis: std::sync::Weak<Basis>) {
    loop {
        tokio::time::sleep(IDLE / 2).await;
        let (Some(desk), Some(basis)) = (desk.upgrade(), basis.upgrade()) else { return };
        let reading = lock(&basis.images)
            .values()
            .any(|found| found.has_changed().is_ok() && matches!(&*found.borrow(), Found::Reading { .. }));
        if reading || lock(&basis.used).elapsed() < IDLE {
            continue;
        }
        let mut slot = lock(&desk.basis);
        if slot.as_ref().is_some_and(|held| Arc::ptr_eq(held, &basis)) {
            *slot = None;
        }
        return;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Questions of one VM that may wait for an answer. An agent asks 32 at a time; those of its last session may linger.
const WAITING_MAX: usize = 256;
/// Images of one VM that may be asked for: as many as a point can have.
const IMAGES_MAX: usize = lifeboat::format::manifest::IMAGES_MAX;
/// How often an agent is told how far reading is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// What nobody has asked for so long is forgotten.
const IDLE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests;
