//! What is restored is what was stored, byte for byte, over any history; damage is refused (I-6).

pub(crate) mod made;

use super::*;
use crate::store::{
    LocalObjects, Objects, Store,
    testing::{Guest, VM, commit, open_sized},
};
use lifeboat::{
    format::{
        frame::Frame,
        manifest::{Consistency, Image, ImageKind, PointMeta, PointStats},
    },
    id::PointId,
    page::{Content, PAGE, PageGroup, PageRun},
    units::{ByteSize, Generation, Seq, UnixMs},
};
use proptest::prelude::*;
use std::{
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex},
};

#[tokio::test]
async fn a_disk_image_is_written_as_a_sparse_file_of_its_exact_size_and_progress_adds_up() {
    let root = tempfile::tempdir().unwrap();
    let objects: Arc<dyn Objects> =
        Arc::new(LocalObjects::open(&root.path().join("store"), ByteSize(0)).await.unwrap());
    let (store, _) = open_sized(objects.clone(), 1 << 20).await.unwrap();
    let mut guest = Guest::new(2);
    // A hole of 1 GiB before the content.
    let vda = &mut guest.images[1];
    vda.0.bytes = (1 << 30) + 512;
    vda.1 = Vec::new();
    let mut cut = guest.cut(None);
    let group = PageGroup {
        image: 2,
        runs: vec![PageRun::new(5, 1), PageRun::new((1 << 30) / PAGE as u64, 1)],
        content: Content::Bytes(vec![7; 2 * PAGE].into()),
    };
    cut.frames.push(Frame::seal(cut.frames.len() as u32, &group, 1).unwrap());
    let committed = commit(&store, &guest, &cut).await.unwrap();

    let plan = Arc::new(Plan::load(objects.as_ref(), VM, committed.seq).await.unwrap());
    let reader = Reader::new(objects, plan);
    let target = root.path().join("vda.raw");
    let seen = Mutex::new(Vec::new());
    reader.write_file(ImageKind::Disk, "vda", &target, |at| seen.lock().unwrap().push(at)).await.unwrap();
    let file = std::fs::metadata(&target).unwrap();
    assert_eq!(file.len(), (1 << 30) + 512);
    assert!(file.blocks() * 512 < 1 << 20, "{} blocks", file.blocks());
    let whole = std::fs::read(&target).unwrap();
    assert_eq!(whole[5 * PAGE..6 * PAGE], [7; PAGE]);
    assert_eq!(whole[1 << 30..], [7; 512]);
    assert_eq!(whole.iter().filter(|byte| **byte != 0).count(), PAGE + 512);
    let last = *seen.lock().unwrap().last().unwrap();
    assert_eq!(last.done_bytes, last.total_bytes);
    assert!(!root.path().join("vda.raw.partial").exists());
    let missing = reader.read_whole(ImageKind::Disk, "vdb", 1 << 20).await;
    assert!(matches!(missing, Err(RestoreError::NoImage(_))));
    let large = reader.read_whole(ImageKind::Disk, "vda", 1 << 20).await;
    assert!(matches!(large, Err(RestoreError::TooLarge { .. })));
}

/// One write of a model history: pages `first..first + count` become `fill`.
#[derive(Clone, Debug)]
struct Write {
    first: u64,
    count: u64,
    fill: u8,
}

#[derive(Clone, Debug)]
pub(crate) struct Layer {
    full: bool,
    pages: u64,
    writes: Vec<Write>,
}

pub(crate) fn layers() -> impl Strategy<Value = Vec<Layer>> {
    let write = (0u64..90, 1u64..30, 0u8..4).prop_map(|(first, count, fill)| Write { first, count, fill });
    let layer = (prop::bool::weighted(0.15), 60u64..100, prop::collection::vec(write, 0..12))
        .prop_map(|(full, pages, writes)| Layer { full, pages, writes });
    prop::collection::vec(layer, 1..7)
}

pub(crate) async fn commit_layer(store: &Store, no: u64, layer: &Layer) -> Seq {
    let parent = store.latest(VM).await.map(|head| head.point);
    let full = layer.full || parent.is_none();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&(no + 1).to_be_bytes());
    let point = PointId::from_bytes(id);
    let open = store.open_point(VM, "model", Generation::FIRST, point, parent).await.unwrap();
    let bytes = layer.pages * PAGE as u64;
    // Numbers change from point to point; names do not.
    let image = Image { no: no as u16, kind: ImageKind::Disk, name: "vda".into(), bytes, full };
    let mut frames = 0;
    for write in &layer.writes {
        let count = write.count.min(layer.pages.saturating_sub(write.first));
        if count == 0 {
            continue;
        }
        let content = match write.fill {
            0 => Content::Zero,
            fill => Content::Bytes(vec![fill + no as u8 * 4; count as usize * PAGE].into()),
        };
        let runs = vec![PageRun::new(write.first, count as u32)];
        let group = PageGroup { image: no as u16, runs, content };
        open.append(Frame::seal(frames, &group, 1).unwrap()).await.unwrap();
        frames += 1;
    }
    let meta = PointMeta {
        cut_at: UnixMs(no),
        images: vec![image],
        consistency: Consistency::Crash,
        cut: None,
        was_running: true,
        stats: PointStats::default(),
    };
    open.commit(meta, frames).await.unwrap().seq
}

/// What the pages of the model hold after each layer.
pub(crate) fn naive(layers: &[Layer]) -> Vec<Vec<u8>> {
    let (mut pages, mut after): (Vec<u8>, _) = (Vec::new(), Vec::new());
    for (no, layer) in layers.iter().enumerate() {
        if layer.full {
            pages.clear();
        }
        pages.resize(layer.pages as usize, 0);
        for write in &layer.writes {
            for page in write.first..(write.first + write.count).min(layer.pages) {
                pages[page as usize] = if write.fill == 0 { 0 } else { write.fill + no as u8 * 4 };
            }
        }
        after.push(pages.clone());
    }
    after
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Layers, shrinking and growing images, zeroes, overwrites in one point: each point reads as the model says.
    #[test]
    fn every_point_of_any_history_reads_as_a_naive_model_says(layers in layers()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let objects: Arc<dyn Objects> = Arc::new(crate::store::sim::SimDisk::new(0));
            let (store, _) = open_sized(objects.clone(), 9000).await.unwrap();
            let mut seqs = Vec::new();
            for (no, layer) in layers.iter().enumerate() {
                seqs.push(commit_layer(&store, no as u64, layer).await);
            }
            for (seq, pages) in seqs.into_iter().zip(naive(&layers)) {
                let plan = Arc::new(Plan::load(objects.as_ref(), VM, seq).await.unwrap());
                let reader = Reader::new(objects.clone(), plan);
                let found = reader.read_whole(ImageKind::Disk, "vda", 1 << 30).await.unwrap();
                let expected: Vec<u8> = pages.iter().flat_map(|fill| vec![*fill; PAGE]).collect();
                assert!(found == expected, "point {seq}");
            }
        });
    }
}
