//! One point on its way into the store, and the durability order, all of it, in `Open::commit`.
//! Promises: a frame is unpacked and hashed before it is taken; I-2, the caller hears `Committed` after packs, manifest
//! and their directories are synced, in that order; I-4, a fenced writer is refused at admission and again under the
//! VM's lock; a point that is not committed leaves nothing. Called by intake. Frames may come from several tasks at once.

use crate::store::{
    chain::{Images, Link, key},
    error::{PointError, StoreError},
    layer::Layer,
    leads::{self, Leads},
    pack::PackWriter,
    paths,
    site::{Shared, Store, apart},
    slot::{Head, History, Slot},
    summary::{PointState, PointSummary},
    tree::Node,
};
use lifeboat::{
    chunk::digest::Digest,
    format::{
        frame::Frame,
        manifest::{Image, Manifest, PointMeta, PreviousRef},
        pack::PackRef,
    },
    id::{PackId, PointId, VmId},
    page::{PAGE, pages_for},
    session::sender::{FRAMES_HELD_MAX, POINTS_MAX},
    units::{Generation, Seq, UnixMs},
};
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, PoisonError},
};
use tokio::sync::Mutex;

/// Whether a frame was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    Stored,
    /// It was here already; nothing was done.
    Repeat,
}

/// What may be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub seq: Seq,
    pub manifest: Digest,
    pub committed_at: UnixMs,
}

impl Store {
    /// Starts a point. Refuses a generation that is not the VM's, a second open point, and a store without room.
    /// `parent` is the point that the agent's delta is over; `commit` checks it once it knows which images are full.
    pub async fn open_point(
        &self,
        vm: VmId,
        name: &str,
        generation: Generation,
        point: PointId,
        parent: Option<PointId>,
    ) -> Result<OpenPoint, PointError> {
        OpenPoint::admit(self.shared.clone(), vm, name, generation, point, parent).await
    }
}

/// A point being received. Dropping it is an abort that leaves the tidying to the next point or the next start.
#[derive(Debug)]
pub struct OpenPoint {
    open: Arc<Open>,
}

struct Open {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    vm: VmId,
    name: String,
    generation: Generation,
    point: PointId,
    parent: Option<PointId>,
    intake: Mutex<Intake>,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("vm", &self.vm).field("point", &self.point).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Intake {
    stage: Stage,
    pack: Option<PackWriter>,
    done: Vec<PackRef>,
    /// Per frame seq: 0, or bits of its digest with the lowest one set, so that a repeat is told from a contradiction.
    seen: Vec<u32>,
    distinct: u32,
    wire_bytes: u64,
    /// Per image number, one past the highest page that a frame holds.
    reach: BTreeMap<u16, u64>,
    leads: Leads,
    /// Why a write did not finish, if it was for lack of room: whoever comes after it is to be told the same.
    full: Option<StoreError>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Receiving,
    /// A write is under way; still so at the next call if it failed or its task was dropped.
    Writing,
    Closed,
}

impl OpenPoint {
    pub(super) async fn admit(
        shared: Arc<Shared>,
        vm: VmId,
        name: &str,
        generation: Generation,
        point: PointId,
        parent: Option<PointId>,
    ) -> Result<Self, PointError> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(PointError::Invalid(format!("a VM's name has 1 to {NAME_MAX} bytes")));
        }
        shared.objects.check_room(&paths::of_vm(vm)).await?;
        let slot = shared.slot(vm);
        let mut history = slot.history.clone().lock_owned().await;
        history.check_generation(generation)?;
        settle_doubt(&shared, vm, &mut history).await?;
        let garbage = {
            let mut admission = slot.admission.lock().unwrap_or_else(PoisonError::into_inner);
            if admission.open.contains(&point) {
                return Err(PointError::Busy { open: point });
            }
            if let (true, Some(open)) = (admission.open.len() >= POINTS_MAX, admission.open.first()) {
                return Err(PointError::Busy { open: *open });
            }
            admission.open.insert(point);
            std::mem::take(&mut admission.garbage)
        };
        drop(history);
        let name = name.to_owned();
        let intake = Mutex::default();
        let open = Arc::new(Open { shared, slot, vm, name, generation, point, parent, intake });
        open.discard(garbage).await;
        Ok(Self { open })
    }

    /// Verifies a frame and takes it. On a store error the point is lost: abort it.
    pub async fn append(&self, frame: Frame) -> Result<Appended, PointError> {
        let (frame, leads) = leads::verified(&self.open.shared.verifying, self.open.vm, frame).await?;
        let mut intake = self.open.intake.lock().await;
        intake.leads.add(leads);
        let taken = self.open.take(&mut intake, frame).await;
        if let Err(PointError::Store(error)) = &taken {
            intake.full = error.full();
        }
        taken
    }

    /// Frames, of the first `frames`, that have not arrived: at most `most` ranges.
    pub async fn missing(&self, frames: u32, most: usize) -> Vec<Range<u32>> {
        self.open.intake.lock().await.missing(frames).take(most).collect()
    }

    pub fn point(&self) -> PointId {
        self.open.point
    }

    /// Makes the point durable, if frames 0 to `frames` are here and `meta` agrees with them. Runs to its end even if
    /// the caller goes away. After an error other than `Incomplete`, abort.
    pub async fn commit(&self, meta: PointMeta, frames: u32) -> Result<Committed, PointError> {
        let open = self.open.clone();
        apart(self.open.vm, async move { open.commit(meta, frames).await }).await
    }

    /// Leaves nothing of the point. Does nothing if it was committed.
    pub async fn abort(&self) {
        let open = self.open.clone();
        let done: Result<(), StoreError> = apart(self.open.vm, async move {
            open.abort().await;
            Ok(())
        })
        .await;
        if let Err(error) = done {
            tracing::warn!(error = error.chain(), "a point could not be tidied away; the next start does it");
        }
    }
}

impl Open {
    async fn take(&self, intake: &mut Intake, frame: Frame) -> Result<Appended, PointError> {
        intake.check_open()?;
        if intake.note(&frame)? == Appended::Repeat {
            return Ok(Appended::Repeat);
        }
        intake.stage = Stage::Writing;
        let mut pack = match intake.pack.take() {
            Some(pack) => pack,
            None => {
                let id = self.shared.ids.next();
                PackWriter::start(self.shared.objects.as_ref(), &paths::pack(self.vm, id), id).await?
            }
        };
        pack.push(&frame).await?;
        if pack.is_full(self.shared.options.pack_size.0) {
            self.finish(intake, pack).await?;
        } else {
            intake.pack = Some(pack);
        }
        intake.stage = Stage::Receiving;
        Ok(Appended::Stored)
    }

    async fn finish(&self, intake: &mut Intake, pack: PackWriter) -> Result<(), StoreError> {
        let id = pack.id();
        match pack.finish().await {
            Ok(pack) => intake.done.push(pack),
            Err(error) => {
                // It may be there under its name: a failed sync of its directory says neither yes nor no.
                self.leave(vec![id]);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn commit(&self, meta: PointMeta, frames: u32) -> Result<Committed, PointError> {
        let mut intake = self.intake.lock().await;
        intake.check_open()?;
        intake.check_complete(frames)?;
        intake.check_meta(&meta)?;
        self.check_history(&*self.shared.lock(self.vm).await, &meta)?;

        // First the packs, each with its index.
        intake.stage = Stage::Writing;
        if let Some(pack) = intake.pack.take() {
            self.finish(&mut intake, pack).await?;
        }
        // Then, under the VM's lock, the manifest: from here on the point exists.
        let mut history = self.shared.lock(self.vm).await;
        self.check_history(&history, &meta)?;
        settle_doubt(&self.shared, self.vm, &mut history).await?;
        self.check_history(&history, &meta)?;
        let manifest = self.manifest(&history, meta, &intake)?;
        let (file, digest) = manifest.encode().map_err(|error| PointError::Invalid(error.to_string()))?;
        let file_len = file.len() as u64;
        let path = paths::manifest(self.vm, manifest.seq);
        if let Err(error) = self.shared.objects.put_durable(&path, file.into()).await {
            if !matches!(error, StoreError::Exists { .. }) {
                self.take_back(&mut history, manifest.seq, &mut intake).await;
            }
            return Err(error.into());
        }
        // Only now may anybody be told.
        intake.stage = Stage::Closed;
        intake.done.clear();
        let summary = PointSummary::of(&manifest, file_len, PointState::Ok);
        history.advance(&Layer::own(manifest, digest, file_len));
        let (seq, committed_at) = (summary.seq, summary.committed_at);
        let index = self.shared.index.clone();
        drop(tokio::task::spawn_blocking(move || index.put(&summary)).await);
        self.release();
        Ok(Committed { seq, manifest: digest, committed_at })
    }

    fn manifest(&self, history: &History, meta: PointMeta, intake: &Intake) -> Result<Manifest, PointError> {
        let seq = history.top.0.checked_add(1).map(Seq);
        Ok(Manifest {
            vm: self.vm,
            vm_name: self.name.clone(),
            generation: self.generation,
            point: self.point,
            seq: seq.ok_or_else(|| PointError::Invalid("the VM's history is at its end".into()))?,
            previous: history
                .head
                .as_ref()
                .map(|head| PreviousRef { point: head.point, manifest: head.link.manifest }),
            committed_at: self.shared.clock.now(),
            meta,
            packs: intake.done.clone(),
            wire_bytes: intake.wire_bytes,
        })
    }

    fn check_history(&self, history: &History, meta: &PointMeta) -> Result<(), PointError> {
        history.check_generation(self.generation)?;
        let latest = history.head.as_ref().map(|head| head.point);
        if latest == Some(self.point) {
            return Err(PointError::Invalid("this point has been committed before".into()));
        }
        if meta.images.iter().all(|image| image.full) {
            return Ok(());
        }
        let refuse = |why: String| Err(PointError::Parent { latest, why });
        let Some(head) = history.head.as_ref().filter(|head| self.parent == Some(head.point)) else {
            return refuse("the point it builds on is not the newest one here".into());
        };
        if !head.is_whole() {
            return refuse(format!("the newest point, {}, is damaged here", head.seq));
        }
        let new = |image: &&Image| !image.full && !head.link.images.contains_key(&key(image));
        match meta.images.iter().find(new) {
            Some(image) => refuse(format!("the newest point has no image `{}`", image.name)),
            None => Ok(()),
        }
    }

    /// A manifest was not written, or perhaps was: makes sure that it is not.
    async fn take_back(&self, history: &mut History, seq: Seq, intake: &mut Intake) {
        let removed = self.shared.objects.delete(&paths::manifest(self.vm, seq)).await;
        if removed.is_err() {
            // Its packs stay until it is known to be gone.
            let packs = intake.done.drain(..).map(|pack| pack.id).collect();
            history.doubt = Some((seq, packs));
        }
    }

    async fn abort(&self) {
        let mut intake = self.intake.lock().await;
        if intake.stage == Stage::Closed {
            return;
        }
        intake.stage = Stage::Closed;
        let mut packs: Vec<PackId> = intake.done.drain(..).map(|pack| pack.id).collect();
        if let Some(pack) = intake.pack.take() {
            packs.push(pack.id());
            pack.abort().await;
        }
        self.discard(packs).await;
        self.release();
    }

    /// Deletes packs that no manifest names; what can't be deleted now is left for later.
    async fn discard(&self, packs: Vec<PackId>) {
        let mut failed = Vec::new();
        for pack in packs {
            if self.shared.objects.delete(&paths::pack(self.vm, pack)).await.is_err() {
                failed.push(pack);
            }
        }
        self.leave(failed);
    }

    fn leave(&self, packs: Vec<PackId>) {
        self.slot.admission.lock().unwrap_or_else(PoisonError::into_inner).garbage.extend(packs);
    }

    fn release(&self) {
        self.slot.admission.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&self.point);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let intake = self.intake.get_mut();
        if intake.stage != Stage::Closed {
            let packs = intake.done.drain(..).map(|pack| pack.id).collect();
            self.leave(packs);
            self.release();
        }
    }
}

impl History {
    pub(super) fn check_generation(&self, given: Generation) -> Result<(), PointError> {
        let current = self.generation;
        match given.cmp(&current) {
            std::cmp::Ordering::Less => Err(PointError::Fenced { given, current }),
            std::cmp::Ordering::Greater => Err(PointError::Unknown { given, current }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }

    fn advance(&mut self, layer: &Layer) {
        let manifest = &layer.manifest;
        let images: Images = manifest.meta.images.iter().map(|image| (key(image), None)).collect();
        let same = self.head.as_ref().filter(|head| *head.link.images == images);
        let images = same.map_or_else(|| Arc::new(images), |head| head.link.images.clone());
        let Manifest { seq, point, generation, committed_at, .. } = *manifest;
        let link = Link { seq, point, manifest: layer.digest, images };
        (self.top, self.name) = (seq, manifest.vm_name.clone());
        let cut_at = manifest.meta.cut_at;
        self.head = Some(Head { point, seq, cut_at, committed_at, generation, link });
        self.tree.0.insert(seq, Node::of(layer, true));
    }
}

impl Intake {
    fn check_open(&self) -> Result<(), PointError> {
        match self.stage {
            Stage::Receiving => Ok(()),
            Stage::Writing => {
                let unfinished = PointError::Closed("an earlier write did not finish; abort it");
                Err(self.full.as_ref().and_then(StoreError::full).map_or(unfinished, PointError::Store))
            }
            Stage::Closed => Err(PointError::Closed("it was committed or aborted")),
        }
    }

    /// Notes that a frame came. Nothing of it is kept if it is refused.
    fn note(&mut self, frame: &Frame) -> Result<Appended, PointError> {
        let at = frame.head.seq as usize;
        if at >= FRAMES_MAX {
            return Err(PointError::Invalid(format!("a point has at most {FRAMES_MAX} frames")));
        }
        // An agent has only so many frames untaken at once: a number far ahead is not one of them, and must not make room
        // for all that it skips.
        if at >= self.distinct as usize + AHEAD_MAX {
            let seq = frame.head.seq;
            return Err(PointError::Invalid(format!(
                "frame {seq} came when only {} were there",
                self.distinct
            )));
        }
        let [a, b, c, d, ..] = *frame.head.digest.as_bytes();
        let mark = u32::from_le_bytes([a, b, c, d]) | 1;
        self.wire_bytes = self.wire_bytes.saturating_add(frame.encoded_len() as u64);
        if self.seen.len() <= at {
            self.seen.resize(at + 1, 0);
        }
        match self.seen[at] {
            0 => self.seen[at] = mark,
            same if same == mark => return Ok(Appended::Repeat),
            _ => {
                let seq = frame.head.seq;
                return Err(PointError::Invalid(format!("frame {seq} came twice with different pages")));
            }
        }
        self.distinct += 1;
        let end = frame.head.runs.last().and_then(|run| run.end()).unwrap_or_default();
        let reach = self.reach.entry(frame.head.image).or_default();
        *reach = end.max(*reach);
        Ok(Appended::Stored)
    }

    fn check_complete(&self, frames: u32) -> Result<(), PointError> {
        if self.distinct == frames && self.seen.len() == frames as usize {
            return Ok(());
        }
        if self.seen.len() > frames as usize {
            return Err(PointError::Invalid(format!(
                "{frames} frames were announced, but frame {} has come",
                self.seen.len() - 1
            )));
        }
        Err(PointError::Incomplete { missing: frames - self.distinct, frames })
    }

    fn check_meta(&self, meta: &PointMeta) -> Result<(), PointError> {
        meta.check().map_err(|why| PointError::Invalid(why.into()))?;
        self.leads.check(meta).map_err(PointError::Invalid)?;
        for (no, end) in &self.reach {
            let image = meta.images.iter().find(|image| image.no == *no);
            let image = image.ok_or_else(|| PointError::Invalid(format!("no image has number {no}")))?;
            if *end > pages_for(image.bytes) {
                let (page, name) = (end - 1, &image.name);
                let at = u128::from(page) * PAGE as u128;
                return Err(PointError::Invalid(format!("image `{name}` ends before byte {at}")));
            }
        }
        Ok(())
    }

    fn missing(&self, frames: u32) -> impl Iterator<Item = Range<u32>> {
        let here = move |at: u32| self.seen.get(at as usize).is_some_and(|mark| *mark != 0);
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..frames).find(|at| !here(*at))?;
            at = (first..frames).find(|at| here(*at)).unwrap_or(frames);
            Some(first..at)
        })
    }
}

async fn settle_doubt(shared: &Shared, vm: VmId, history: &mut History) -> Result<(), StoreError> {
    let Some((seq, packs)) = history.doubt.clone() else { return Ok(()) };
    shared.objects.delete(&paths::manifest(vm, seq)).await?;
    history.doubt = None;
    shared.slot(vm).admission.lock().unwrap_or_else(PoisonError::into_inner).garbage.extend(packs);
    Ok(())
}

/// Frames in one point at the most: 16 TiB of full frames, and 256 MiB of marks.
const FRAMES_MAX: usize = 1 << 26;
/// How far a frame's number may be ahead of the frames that are there.
const AHEAD_MAX: usize = 2 * FRAMES_HELD_MAX;
const NAME_MAX: usize = 255;
