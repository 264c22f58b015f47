//! A fold on its way into the store: frames that take the place of a point's layer, over an older point or over none.
//! Promises: creating the fold's record is the whole change, at one instant; before it the point is read from its former
//! layer, after it from the fold, and both are whole; the former layer goes to the trash, where readers keep it. The VM's
//! lock is held only while the record is written. Called by retention, which reads what is to be folded.

use crate::store::{
    error::StoreError,
    layer::Folds,
    layer::read_manifest,
    pack::PackWriter,
    paths,
    pin::Pin,
    site::{Shared, Store, apart},
    slot::Slot,
    summary::{PointState, PointSummary},
    tree::Node,
};
use lifeboat::{
    fault,
    format::{
        fold::{BaseRef, FoldRecord},
        frame::Frame,
        pack::PackRef,
    },
    id::VmId,
    units::Seq,
};
use std::sync::Arc;

#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The history has changed since it was looked at, or may not be changed.
    #[error("point {seq} can't be folded: {why}")]
    NotNow { seq: Seq, why: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a fold did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folded {
    pub seq: Seq,
    /// Layers of which the fold is made.
    pub layers: usize,
    /// Bytes of the packs before and after.
    pub was_bytes: u64,
    pub bytes: u64,
}

/// Abort it if it is not committed; dropping it leaves the tidying to the next start.
pub struct FoldWriter {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    vm: VmId,
    /// The point, and those below it whose layers are laid together, newest first.
    run: Vec<Seq>,
    base: Option<BaseRef>,
    former: Option<u32>,
    /// Keeps what is read from being removed.
    pin: Pin,
    pack: Option<PackWriter>,
    done: Vec<PackRef>,
}

impl Store {
    /// Starts a fold of `seq` over `onto`, a point on its path; over nothing, to make it complete in itself.
    pub async fn begin_fold(&self, vm: VmId, seq: Seq, onto: Option<Seq>) -> Result<FoldWriter, FoldError> {
        let refuse = |why: &str| FoldError::NotNow { seq, why: why.into() };
        let (shared, slot) = (self.shared.clone(), self.shared.slot(vm));
        shared.objects.check_room(&paths::of_vm(vm)).await?;
        let history = slot.history.clone().lock_owned().await;
        if let Some(why) = &history.frozen {
            return Err(refuse(why));
        }
        let node = history.tree.0.get(&seq).ok_or_else(|| refuse("it is gone"))?;
        let mut run = history.tree.path(seq);
        let folds = history.tree.folds(&run);
        let base = match onto {
            Some(onto) => {
                let at = run.iter().position(|seq| *seq == onto).filter(|at| *at > 0);
                run.truncate(at.ok_or_else(|| refuse("it does not lie over that point"))?);
                let node = history.tree.0.get(&onto).ok_or_else(|| refuse("the point below is gone"))?;
                Some(BaseRef { seq: onto, point: node.point, manifest: node.manifest })
            }
            None => None,
        };
        if !run.iter().all(|seq| history.tree.0.get(seq).is_some_and(|node| node.whole)) {
            return Err(refuse("a layer of it is damaged"));
        }
        let (former, pin) = (node.fold, Pin::new(&slot, Some(seq), run.clone(), folds));
        Ok(FoldWriter {
            shared,
            slot: slot.clone(),
            vm,
            run,
            base,
            former,
            pin,
            pack: None,
            done: Vec::new(),
        })
    }
}

impl FoldWriter {
    pub fn vm(&self) -> VmId {
        self.vm
    }

    /// The point, and those below it whose layers are laid together, newest first.
    pub fn run(&self) -> &[Seq] {
        &self.run
    }

    pub fn folds(&self) -> &Folds {
        self.pin.folds()
    }

    pub async fn push(&mut self, frame: &Frame) -> Result<(), StoreError> {
        if self.pack.is_none() {
            let id = self.shared.ids.next();
            let path = paths::fold_pack(self.vm, id);
            self.pack = Some(PackWriter::start(self.shared.objects.as_ref(), &path, id).await?);
        }
        let Some(pack) = &mut self.pack else { return Ok(()) };
        pack.push(frame).await?;
        if pack.is_full(self.shared.options.pack_size.0) { self.finish_pack().await } else { Ok(()) }
    }

    async fn finish_pack(&mut self) -> Result<(), StoreError> {
        let Some(pack) = self.pack.take() else { return Ok(()) };
        let path = paths::fold_pack(self.vm, pack.id());
        match pack.finish().await {
            Ok(pack) => self.done.push(pack),
            Err(error) => {
                // It may be there under its name: a failed sync of its directory says neither yes nor no.
                self.slot.pins().throw_away([path]);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Makes the fold hold. `full` are the numbers of the images that are complete in it, ascending. Runs to its end
    /// even if the caller goes away. On an error the point is as it was.
    pub async fn commit(mut self, full: Vec<u16>) -> Result<Folded, FoldError> {
        apart(self.vm, async move {
            let done = match self.finish_pack().await {
                Ok(()) => self.record(full).await,
                Err(error) => Err(error.into()),
            };
            if done.is_err() {
                self.abort().await;
            }
            done
        })
        .await
    }

    pub async fn abort(mut self) {
        if let Some(pack) = self.pack.take() {
            pack.abort().await;
        }
        let paths = self.done.drain(..).map(|pack| paths::fold_pack(self.vm, pack.id));
        self.slot.pins().throw_away(paths.collect::<Vec<_>>());
    }

    async fn record(&mut self, full: Vec<u16>) -> Result<Folded, FoldError> {
        let (vm, seq) = (self.vm, self.run[0]);
        let not_now = |why: String| FoldError::NotNow { seq, why };
        let objects = self.shared.objects.clone();
        let (manifest, digest, len) = read_manifest(objects.as_ref(), vm, seq).await?;
        let no = self.former.unwrap_or_default() + 1;
        fault::point("fold.packs");
        let mut history = self.slot.history.clone().lock_owned().await;
        if let Some(why) = &history.frozen {
            return Err(not_now(why.clone()));
        }
        let former = history.tree.0.get(&seq).filter(|node| node.fold == self.former).cloned();
        let former = former.ok_or_else(|| not_now("it was taken away or folded meanwhile".into()))?;
        let stands = self.base.is_none_or(|base| {
            history.tree.0.get(&base.seq).is_some_and(|node| node.manifest == base.manifest)
        });
        if !stands {
            return Err(not_now("the point below was taken away meanwhile".into()));
        }
        let record = FoldRecord {
            vm,
            seq,
            point: manifest.point,
            manifest: digest,
            no,
            base: self.base,
            full,
            packs: self.done.clone(),
            made_at: self.shared.clock.now(),
        };
        let file = record.encode().map_err(|error| not_now(error.to_string()))?;
        let (path, file_bytes) = (paths::fold(vm, seq, no), file.len() as u64);
        if let Err(error) = objects.put_durable(&path, file.into()).await {
            if matches!(error, StoreError::Exists { .. }) || objects.delete(&path).await.is_err() {
                // It may be there, and name these packs: both layers stay until the next start has looked.
                self.done.clear();
                history.frozen = Some(format!("it is not known whether {path} was written"));
            }
            return Err(error.into());
        }
        fault::point("fold.recorded");
        let bytes = self.done.iter().map(|pack| pack.len).sum();
        let packs = self.done.drain(..).map(|pack| pack.id).collect();
        let node = Node {
            base: self.base.map(|base| base.seq),
            fold: Some(no),
            packs,
            pack_bytes: bytes,
            record_bytes: len + file_bytes,
            ..former.clone()
        };
        let mut summary = PointSummary::of(&manifest, len, PointState::Ok);
        summary.stored_bytes = bytes + node.record_bytes;
        history.tree.0.insert(seq, node);
        self.slot.pins().throw_away(former.layer_paths(vm, seq));
        let index = self.shared.index.clone();
        // Under the lock, so that the index hears of changes in their order.
        drop(tokio::task::spawn_blocking(move || index.put(&summary)).await);
        Ok(Folded { seq, layers: self.run.len(), was_bytes: former.pack_bytes, bytes })
    }
}
