//! Taking points away, and what of a history there is to decide about.
//! Promises: never the newest point, one that another lies over, or one that somebody reads; the record of what was pruned
//! is durable before anything is removed, so that a start after any ending either has the point whole or knows that it is
//! gone; the VM's lock is held only while that record is written. Called by retention, status.

use crate::store::{
    error::StoreError,
    paths,
    site::{Store, apart},
};
use lifeboat::{
    fault,
    format::pruned::PrunedRecord,
    id::{PointId, VmId},
    units::{Seq, UnixMs},
};
use std::collections::BTreeMap;

/// A VM's points as they lie over each other now.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    /// The VM's name, as its newest point has it.
    pub name: String,
    /// By seq.
    pub points: Vec<JournalPoint>,
    /// Why nothing of it is folded or pruned, if so.
    pub frozen: Option<String>,
    /// Objects that wait for their readers before they are removed.
    pub trash: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalPoint {
    pub seq: Seq,
    pub point: PointId,
    pub cut_at: UnixMs,
    /// The point that its layer lies over.
    pub base: Option<Seq>,
    /// Layers that make it up.
    pub layers: u32,
    /// Bytes of its packs and records.
    pub bytes: u64,
    pub whole: bool,
    /// Somebody reads it.
    pub pinned: bool,
}

/// What pruning took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub seqs: Vec<Seq>,
    pub bytes: u64,
}

impl Store {
    pub async fn journal(&self, vm: VmId) -> Journal {
        let slot = self.shared.slot(vm);
        let history = slot.history.clone().lock_owned().await;
        let pins = slot.pins();
        let mut layers = BTreeMap::<Seq, u32>::new();
        let mut points = Vec::with_capacity(history.tree.0.len());
        for (seq, node) in &history.tree.0 {
            let below = node.base.and_then(|base| layers.get(&base).copied()).unwrap_or_default();
            layers.insert(*seq, below + 1);
            points.push(JournalPoint {
                seq: *seq,
                point: node.point,
                cut_at: node.cut_at,
                base: node.base,
                layers: below + 1,
                bytes: node.pack_bytes + node.record_bytes,
                whole: node.whole,
                pinned: pins.holds(*seq),
            });
        }
        Journal {
            name: history.name.clone(),
            points,
            frozen: history.frozen.clone(),
            trash: pins.trash_len(),
        }
    }

    /// Takes away those of `seqs` that may go, newest first, so that what lies over another goes before it.
    pub async fn prune(&self, vm: VmId, seqs: &[Seq]) -> Result<Pruned, StoreError> {
        let (shared, mut seqs) = (self.shared.clone(), seqs.to_vec());
        seqs.sort_unstable_by(|a, b| b.cmp(a));
        apart(vm, async move {
            let slot = shared.slot(vm);
            let mut history = slot.history.clone().lock_owned().await;
            if history.frozen.is_some() {
                return Ok(Pruned::default());
            }
            let now = shared.clock.now();
            let former = history.pruned.clone();
            let mut record =
                former.clone().unwrap_or(PrunedRecord { vm, no: 0, gaps: Vec::new(), made_at: now });
            let (mut children, mut pruned) = (history.tree.children(), Pruned::default());
            let newest = history.top;
            for seq in seqs {
                let Some(node) = history.tree.0.get(&seq) else { continue };
                let built_on = children.get(&seq).is_some_and(|children| *children > 0);
                if seq == newest || built_on || slot.pins().holds(seq) {
                    continue;
                }
                if let Some(children) = node.base.and_then(|base| children.get_mut(&base)) {
                    *children -= 1;
                }
                record.add(seq, node.named(), node.before);
                pruned.bytes += node.pack_bytes + node.record_bytes;
                pruned.seqs.push(seq);
            }
            if pruned.seqs.is_empty() {
                return Ok(pruned);
            }
            (record.no, record.made_at) = (record.no + 1, now);
            let path = paths::pruned(vm, record.no);
            let file = record.encode().map_err(|error| StoreError::damaged(&path, error))?;
            if let Err(error) = shared.objects.put_durable(&path, file.into()).await {
                if matches!(error, StoreError::Exists { .. }) || shared.objects.delete(&path).await.is_err() {
                    // It may be there: then the next start takes these points away.
                    history.frozen = Some(format!("it is not known whether {path} was written"));
                }
                return Err(error);
            }
            fault::point("prune.recorded");
            history.pruned = Some(record);
            let gone: Vec<_> =
                pruned.seqs.iter().filter_map(|seq| Some((*seq, history.tree.0.remove(seq)?))).collect();
            // Manifests first: a start in the middle must not find a point whose packs are gone.
            let mut trash: Vec<String> = gone.iter().map(|(seq, _)| paths::manifest(vm, *seq)).collect();
            trash.extend(gone.iter().flat_map(|(seq, node)| node.layer_paths(vm, *seq)));
            trash.extend(former.map(|former| paths::pruned(vm, former.no)));
            slot.pins().throw_away(trash);
            let (index, seqs) = (shared.index.clone(), pruned.seqs.clone());
            drop(tokio::task::spawn_blocking(move || index.forget(vm, &seqs)).await);
            Ok(pruned)
        })
        .await
    }
}
