//! The layers of a point with the indices of their packs, read some at once: what each lies over is known before it is read.
//! Promises: nothing is believed that the layers themselves do not say: whoever takes one checks that it is the one that the
//! layer above lies over. At most `AHEAD` layers' indices are read beyond what is used. Called by `plan`.

use super::planned::PackIndex;
use crate::store::{Folds, Layer, Objects, StoreError, read_index_at, read_layer};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use lifeboat::{id::VmId, units::Seq};

/// Layers that are read side by side; and the packs of one.
const AHEAD: usize = 8;

/// One layer, and what its packs hold.
pub(super) struct Indexed {
    pub layer: Layer,
    /// An error only counts where the layer is needed.
    pub indices: Result<Vec<PackIndex>, StoreError>,
}

/// The layers of `path`, in its order.
pub(super) fn descend<'a>(
    objects: &'a dyn Objects,
    vm: VmId,
    path: &[Seq],
    folds: &Folds,
) -> impl Stream<Item = Result<Indexed, StoreError>> + Send + use<'a> {
    let reads: Vec<_> =
        path.iter().map(|seq| read_indexed(objects, vm, *seq, folds.get(seq).copied())).collect();
    stream::iter(reads).buffered(AHEAD)
}

pub(super) async fn read_indexed(
    objects: &dyn Objects,
    vm: VmId,
    seq: Seq,
    fold: Option<u32>,
) -> Result<Indexed, StoreError> {
    let layer = read_layer(objects, vm, seq, fold).await?;
    let indices = read_indices(objects, &layer).await;
    Ok(Indexed { layer, indices })
}

/// The indices of a layer's packs, in the manifest's order.
pub(super) async fn read_indices(objects: &dyn Objects, layer: &Layer) -> Result<Vec<PackIndex>, StoreError> {
    let packs = layer.manifest.packs.clone().into_iter().map(|pack| {
        let path = layer.pack_path(pack.id);
        async move {
            let index = read_index_at(objects, &path, &pack).await?;
            Ok((pack.id, path, index))
        }
    });
    stream::iter(packs.collect::<Vec<_>>()).buffered(AHEAD).try_collect().await
}
