//! The site's store: a point of one large disk taken in and restored, beside plain files.

use crate::{
    corpus::Corpus,
    measure::{Watch, drop_cache, read_all},
    pipeline::LEVEL,
    rows::Rows,
};
use anyhow::{Context, Result};
use bytes::BytesMut;
use lifeboat::{
    clock::{Clock, SystemClock},
    format::{
        frame::Frame,
        manifest::{Consistency, Image, ImageKind, PointMeta, PointStats},
    },
    id::{PointId, VmId},
    units::{ByteSize, Seq},
};
use lifeboat_site_controller::{
    restore::{Plan, Reader},
    store::{LocalObjects, MemoryIndex, Objects, RandomIds, Store, StoreOptions},
};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

pub async fn measure(corpus: &Corpus, scratch: &Path, rows: &mut Rows) -> Result<()> {
    let frames: Vec<Frame> = corpus
        .groups(0)
        .zip(0..)
        .map(|(group, seq)| Frame::seal(seq, &group, LEVEL))
        .collect::<Result<_, _>>()?;
    let root = scratch.join("store");
    let objects: Arc<dyn Objects> = Arc::new(LocalObjects::open(&root, ByteSize(0)).await?);
    ingest(corpus, &frames, objects.clone(), scratch, rows).await?;
    restore(corpus, objects, &root, scratch, rows).await
}

async fn ingest(
    corpus: &Corpus,
    frames: &[Frame],
    objects: Arc<dyn Objects>,
    scratch: &Path,
    rows: &mut Rows,
) -> Result<()> {
    let (store, _) = Store::open(
        objects,
        Arc::new(SystemClock),
        Arc::new(RandomIds),
        Arc::new(MemoryIndex::default()),
        StoreOptions::default(),
    )
    .await?;
    let (pages, packed) =
        (corpus.bytes(), frames.iter().map(|frame| frame.encoded_len() as u64).sum::<u64>());
    let watch = Watch::start();
    let generation = store.generation(VM).await;
    let open = Arc::new(store.open_point(VM, "bench", generation, POINT, None).await?);
    // As they come from the agent: on several streams at once.
    let mut streams = tokio::task::JoinSet::new();
    for stream in 0..STREAMS {
        let (open, share) = (open.clone(), frames.iter().skip(stream).step_by(STREAMS).cloned());
        let share: Vec<Frame> = share.collect();
        streams.spawn(async move {
            for frame in share {
                open.append(frame).await?;
            }
            Ok::<(), anyhow::Error>(())
        });
    }
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    open.commit(meta(pages), u32::try_from(frames.len())?).await?;
    let took = watch.stop();

    let plain = write_and_sync(frames, &scratch.join("plain"))?;
    let opened = open_only(frames)?;
    rows.add(
        "site_ingest",
        took.gb_per_s(pages),
        "GB/s",
        plain.gb_per_s(pages),
        format!(
            "of pages ({:.2} GB/s packed), {:.2} GB/cpu-s; limit: writing the packed bytes + fsync; unpacking + blake3 \
             alone: {:.2} GB/cpu-s",
            took.gb_per_s(packed),
            took.gb_per_cpu_s(pages),
            opened.gb_per_cpu_s(pages),
        ),
    );
    Ok(())
}

fn write_and_sync(frames: &[Frame], path: &Path) -> Result<crate::measure::Took> {
    let mut encoded = BytesMut::new();
    for frame in frames {
        frame.head.encode(&mut encoded);
        encoded.extend_from_slice(&frame.body);
    }
    let watch = Watch::start();
    let mut file = File::create(path)?;
    encoded.chunks(8 << 20).try_for_each(|part| file.write_all(part))?;
    file.sync_all()?;
    let took = watch.stop();
    fs::remove_file(path)?;
    Ok(took)
}

fn open_only(frames: &[Frame]) -> Result<crate::measure::Took> {
    let (watch, mut out) = (Watch::start(), Vec::new());
    frames.iter().try_for_each(|frame| frame.open(&mut out))?;
    Ok(watch.stop())
}

async fn restore(
    corpus: &Corpus,
    objects: Arc<dyn Objects>,
    root: &Path,
    scratch: &Path,
    rows: &mut Rows,
) -> Result<()> {
    let packs = files_below(root)?;
    packs.iter().try_for_each(|pack| drop_cache(pack))?;
    let watch = Watch::start();
    let plan = Plan::load(objects.as_ref(), VM, Seq(1)).await?;
    let target = scratch.join("vda.raw");
    Reader::new(objects, Arc::new(plan)).write_file(ImageKind::Disk, DISK, &target, |_| ()).await?;
    let took = watch.stop();

    packs.iter().try_for_each(|pack| drop_cache(pack))?;
    let watch = Watch::start();
    read_all(&packs)?;
    let reading = watch.stop();
    let restored = fs::read(&target)?;
    let watch = Watch::start();
    let mut copy = File::create(scratch.join("copy"))?;
    copy.write_all(&restored)?;
    copy.sync_all()?;
    let writing = watch.stop();
    let pages = corpus.bytes();
    rows.add(
        "restore_disk",
        took.gb_per_s(pages),
        "GB/s",
        reading.gb_per_s(pages),
        format!(
            "of pages, to a synced raw file; limit: reading the store's bytes, uncached; writing the file + fsync alone: \
             {:.2} GB/s",
            writing.gb_per_s(pages)
        ),
    );
    fs::remove_file(scratch.join("copy"))?;
    Ok(fs::remove_file(target)?)
}

/// Every file below `root`.
pub fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).with_context(|| format!("listing {}", root.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files_below(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

fn meta(bytes: u64) -> PointMeta {
    let disk = Image { no: 0, kind: ImageKind::Disk, name: DISK.into(), bytes, full: true };
    PointMeta {
        cut_at: SystemClock.now(),
        images: vec![disk],
        consistency: Consistency::Crash,
        cut: None,
        was_running: true,
        stats: PointStats::default(),
    }
}

const VM: VmId = VmId::from_bytes([0xbe; 16]);
const POINT: PointId = PointId::from_bytes([0xc4; 16]);
const DISK: &str = "vda";
/// As many as an agent has.
const STREAMS: usize = 4;
