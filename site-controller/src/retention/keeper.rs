//! Carries out what [`super::plan`] decides, VM by VM, beside everything else that the site does.
//! Promises: one fold at a time, with a few segments of pages in memory, at most half of the time while points come in;
//! told to stop, it leaves within one segment and nothing half done counts; a layer that turns out to be damaged is left
//! alone; a VM whose failover journal can't be read is left alone. Called by the daemon; by `api` for one VM by hand.

use super::plan::{Todo, todo};
use crate::{
    config::Keep,
    failover::{
        journal::{Journal as Failovers, JournalError},
        undo,
    },
    group::{Book, points::GroupPoints},
    restore::{
        RestoreError,
        merge::{Merge, MergedImage, Sealing},
    },
    store::{
        FoldError, FoldWriter, Folded, Journal, Store, StoreError,
        retain::{Stamp, Why},
    },
};
use futures_util::TryStreamExt;
use lifeboat::{id::VmId, units::Seq};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::watch;

#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Failovers(#[from] JournalError),
    #[error(transparent)]
    Fold(#[from] FoldError),
    #[error("folding: {0}")]
    Read(#[from] RestoreError),
    #[error("stopped")]
    Stopped,
}

/// What one pass over a VM did.
#[derive(Clone, Debug, Default)]
pub struct Passed {
    pub pruned: Vec<Seq>,
    pub pruned_bytes: u64,
    pub folds: Vec<Folded>,
    pub removed: usize,
}

/// What is kept of a VM, and why; and what the next pass would take away.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    pub journal: Journal,
    pub wanted: BTreeMap<Seq, Why>,
    /// Points that a failover names.
    pub held: BTreeSet<Seq>,
    pub going: Vec<Seq>,
}

#[derive(Debug)]
pub struct Keeper {
    store: Store,
    keep: Keep,
    failovers: Failovers,
    /// Groups that VMs may be in, and their points.
    groups: Option<(Arc<Book>, Arc<GroupPoints>)>,
    /// Of each second of work, milliseconds of rest: while points come in, and otherwise.
    rest_ms: [u32; 2],
    vms: Mutex<BTreeMap<VmId, VmState>>,
    /// One pass at a time, by hand or not.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct VmState {
    pruned_at: Option<Instant>,
    /// Points whose folding failed, because something below them can't be read.
    bad: BTreeSet<Seq>,
    /// What was last warned of.
    warned: Option<String>,
}

impl Keeper {
    pub fn new(store: Store, keep: Keep, failovers: Failovers) -> Self {
        let (vms, turn) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { store, keep, failovers, groups: None, rest_ms: [1000, 250], vms, turn }
    }

    /// The same for a site with groups: what one instant holds of all members stays or goes together.
    pub fn of_groups(self, book: Arc<Book>, points: Arc<GroupPoints>) -> Self {
        Self { groups: Some((book, points)), ..self }
    }

    /// The same without rests, for tests and benches.
    pub fn restless(self) -> Self {
        Self { rest_ms: [0, 0], ..self }
    }

    /// Looks after all VMs until told to stop.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            for vm in self.store.vms() {
                match self.pass(vm, false, &stop).await {
                    Ok(passed) => self.report(vm, &passed),
                    Err(KeepError::Stopped) => return,
                    Err(error) => self.warn(vm, &error),
                }
            }
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// One pass over a VM: prunes what may go, folds until there is nothing to fold, removes what nobody reads any more.
    /// By hand it does not wait until pruning is worth a record.
    pub async fn pass(
        &self,
        vm: VmId,
        by_hand: bool,
        stop: &watch::Receiver<bool>,
    ) -> Result<Passed, KeepError> {
        let _turn = self.turn.lock().await;
        let mut passed = Passed::default();
        loop {
            if *stop.borrow() {
                return Err(KeepError::Stopped);
            }
            let (outlook, todo) = self.look(vm).await?;
            let pruned = self.prune(vm, &todo, by_hand, &mut passed).await?;
            passed.removed += self.store.sweep(vm, SWEPT_MAX).await?;
            let folded = match todo.fold {
                Some((seq, onto)) => self.fold(vm, seq, onto, stop).await?,
                None => None,
            };
            passed.folds.extend(folded);
            if todo.fold.is_none() && !(pruned && (todo.more || by_hand)) {
                return Ok(passed);
            }
            // So that one VM's backlog does not keep the others waiting.
            if passed.folds.len() >= FOLDS_MAX && !by_hand {
                return Ok(passed);
            }
            drop(outlook);
        }
    }

    /// What is kept of a VM now, and what would go.
    pub async fn outlook(&self, vm: VmId) -> Result<Outlook, KeepError> {
        let (mut outlook, todo) = self.look(vm).await?;
        outlook.going = todo.prune;
        Ok(outlook)
    }

    async fn look(&self, vm: VmId) -> Result<(Outlook, Todo), KeepError> {
        // First the failovers: one that is begun later pins its point.
        let failover = self.failovers.load(vm)?;
        let mut held: BTreeSet<Seq> = failover.iter().map(|record| record.seq).collect();
        let mut journal = self.store.journal(vm).await;
        let bad = self.state(vm, |state| state.bad.clone());
        journal
            .points
            .iter_mut()
            .filter(|point| bad.contains(&point.seq))
            .for_each(|point| point.whole = false);
        let group = self.groups.as_ref().and_then(|(book, points)| {
            let group = book.group_of(vm)?;
            let seqs = points.seqs_of(group.id, vm);
            Some((group.spec.keep(), seqs, Some(group.spec.undo_window())))
        });
        let (keep, together, window) = group.unwrap_or_default();
        let until = failover.and_then(|record| undo::open_until(&record, window.unwrap_or(undo::WINDOW)));
        // A slot keeps a point that all members have: they bear the same time, so that each picks the same.
        let whole = |seq: Seq| together.is_empty() || together.contains(&seq);
        let stamps = journal.points.iter().map(|point| Stamp {
            seq: point.seq,
            cut_at: point.cut_at,
            whole: point.whole && whole(point.seq),
        });
        held.extend(together.last());
        let keep = keep.as_ref().unwrap_or_else(|| self.keep.of(vm, &journal.name));
        let wanted = keep.wanted(&stamps.collect::<Vec<_>>());
        let mut todo = todo(&journal, &wanted, &held);
        // An operator may want any of them for the replica yet.
        if until.is_some_and(|until| self.store.clock().now() < until) {
            todo.prune.clear();
        }
        Ok((Outlook { journal, wanted, held, going: Vec::new() }, todo))
    }

    async fn prune(
        &self,
        vm: VmId,
        todo: &Todo,
        by_hand: bool,
        passed: &mut Passed,
    ) -> Result<bool, KeepError> {
        let waited = |state: &mut VmState| state.pruned_at.is_none_or(|at| at.elapsed() >= PRUNE_WAIT);
        if todo.prune.is_empty() || !(by_hand || todo.prune.len() >= PRUNE_WORTH || self.state(vm, waited)) {
            return Ok(false);
        }
        let pruned = self.store.prune(vm, &todo.prune).await?;
        self.state(vm, |state| state.pruned_at = Some(Instant::now()));
        if todo.more {
            tracing::info!(%vm, points = pruned.seqs.len(), "more points are to go than one pass takes away");
        }
        let any = !pruned.seqs.is_empty();
        passed.pruned_bytes += pruned.bytes;
        passed.pruned.extend(pruned.seqs);
        Ok(any)
    }

    async fn fold(
        &self,
        vm: VmId,
        seq: Seq,
        onto: Option<Seq>,
        stop: &watch::Receiver<bool>,
    ) -> Result<Option<Folded>, KeepError> {
        let mut writer = match self.store.begin_fold(vm, seq, onto).await {
            Ok(writer) => writer,
            Err(error) => return self.not_folded(vm, seq, error.into()),
        };
        match self.write(&mut writer, stop).await {
            Ok(full) => match writer.commit(full).await {
                Ok(folded) => Ok(Some(folded)),
                Err(error) => self.not_folded(vm, seq, error.into()),
            },
            Err(error) => {
                writer.abort().await;
                self.not_folded(vm, seq, error)
            }
        }
    }

    /// A fold that can't be is left out from now on, so that others have their turn.
    fn not_folded(&self, vm: VmId, seq: Seq, error: KeepError) -> Result<Option<Folded>, KeepError> {
        match &error {
            KeepError::Read(RestoreError::Broken { .. } | RestoreError::Damaged { .. })
            | KeepError::Fold(FoldError::NotNow { .. }) => {
                tracing::warn!(%vm, %seq, %error, "a point can't be folded and stays as it is");
                self.state(vm, |state| state.bad.insert(seq));
                Ok(None)
            }
            KeepError::Read(_)
            | KeepError::Fold(FoldError::Store(_))
            | KeepError::Store(_)
            | KeepError::Failovers(_)
            | KeepError::Stopped => Err(error),
        }
    }

    async fn write(
        &self,
        writer: &mut FoldWriter,
        stop: &watch::Receiver<bool>,
    ) -> Result<Vec<u16>, KeepError> {
        let objects = self.store.objects().clone();
        let merge = Merge::load(objects, writer.vm(), writer.run(), writer.folds()).await?;
        let mut sealing = Sealing::default();
        for image in &merge.images {
            for frame in image.zero_frames(&mut sealing)? {
                writer.push(&frame).await?;
            }
            let mut segments = std::pin::pin!(merge.reader.segments(image.image.kind, &image.image.name)?);
            let mut begun = Instant::now();
            while let Some(runs) = segments.try_next().await? {
                if *stop.borrow() {
                    return Err(KeepError::Stopped);
                }
                let frames;
                (frames, sealing) = seal(image.clone(), runs, sealing).await?;
                for frame in frames {
                    writer.push(&frame).await?;
                }
                self.rest(begun.elapsed(), stop).await;
                begun = Instant::now();
            }
        }
        Ok(merge.full())
    }

    /// Leaves processor and disk to others for a while.
    async fn rest(&self, worked: Duration, stop: &watch::Receiver<bool>) {
        let rest = self.rest_ms[usize::from(!self.store.is_receiving())];
        let rest = worked.min(Duration::from_secs(1)) * rest / 1000;
        if rest > Duration::ZERO {
            let mut stop = stop.clone();
            // Either is fine: the caller looks whether it is to stop.
            let _ = tokio::time::timeout(rest, stop.wait_for(|stop| *stop)).await;
        }
    }

    fn report(&self, vm: VmId, passed: &Passed) {
        self.state(vm, |state| state.warned = None);
        if !passed.pruned.is_empty() {
            let (points, bytes) = (passed.pruned.len(), passed.pruned_bytes);
            tracing::info!(%vm, points, bytes, "points were taken away, as no rule keeps them");
        }
        for fold in &passed.folds {
            let (seq, layers) = (fold.seq, fold.layers);
            tracing::debug!(%vm, %seq, layers, was = fold.was_bytes, bytes = fold.bytes, "folded");
        }
    }

    /// Once for each thing that goes wrong, not at each pass.
    fn warn(&self, vm: VmId, error: &KeepError) {
        let text = lifeboat::error::chain(error);
        let told =
            self.state(vm, |state| state.warned.replace(text.clone()).is_some_and(|before| before == text));
        if !told {
            tracing::warn!(%vm, error = text, "the journal could not be looked after; it is tried again");
        }
    }

    fn state<T>(&self, vm: VmId, with: impl FnOnce(&mut VmState) -> T) -> T {
        with(self.vms.lock().unwrap_or_else(PoisonError::into_inner).entry(vm).or_default())
    }
}

async fn seal(
    image: MergedImage,
    runs: Vec<crate::restore::Run>,
    mut sealing: Sealing,
) -> Result<(Vec<lifeboat::format::frame::Frame>, Sealing), KeepError> {
    let sealed = tokio::task::spawn_blocking(move || Ok((image.frames(runs, &mut sealing)?, sealing))).await;
    sealed.map_err(|error| StoreError::disk("fold", "packing frames", error))?
}

/// Between two rounds over all VMs.
const PAUSE: Duration = Duration::from_secs(1);
/// Points that are pruned together, unless they have waited for `PRUNE_WAIT`: each time costs a synced record.
const PRUNE_WORTH: usize = 32;
const PRUNE_WAIT: Duration = Duration::from_secs(60);
/// Folds of one VM in one pass.
const FOLDS_MAX: usize = 64;
/// Objects removed between two folds.
const SWEPT_MAX: usize = 1024;
