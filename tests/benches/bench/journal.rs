//! The journal: what a point costs to take in, to find and to restore when 1,800 came before it, beside the tenth.
//! Method: points of a disk of which a hot part changes, taken in one after another while the keeper folds, as at a site.

use crate::{
    measure::{drop_cache, percentile},
    rows::Rows,
    store::files_below,
};
use anyhow::{Context, Result};
use lifeboat::{
    clock::SystemClock,
    format::{
        frame::Frame,
        manifest::{Consistency, Image, ImageKind, PointMeta, PointStats},
    },
    id::{PointId, VmId},
    page::{Content, PAGE, PageGroup, PageRun},
    units::{ByteSize, Seq, UnixMs},
};
use lifeboat_site_controller::{
    catalog::{Catalog, SledIndex},
    config::Keep,
    failover::journal::Journal as Failovers,
    restore::{Plan, Reader},
    retention::keeper::Keeper,
    store::{Journal, JournalPoint, LocalObjects, Objects, RandomIds, Store, StoreOptions, retain::Policy},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Instant};
use tokio::sync::watch;

pub async fn measure(scratch: &Path, rows: &mut Rows) -> Result<()> {
    let root = scratch.join("journal");
    let objects: Arc<dyn Objects> = Arc::new(LocalObjects::open(&root, ByteSize(0)).await?);
    let index = Arc::new(SledIndex::new(&scratch.join("journal-index")));
    let (clock, ids) = (Arc::new(SystemClock), Arc::new(RandomIds));
    let (store, _) = Store::open(objects, clock, ids, index, StoreOptions::default()).await?;
    let failovers = Failovers::open(scratch.join("journal-failovers"))?;
    let keeper = Keeper::new(store.clone(), Keep::all(Policy::default()), failovers).restless();
    let (_order, stop) = watch::channel(false);
    let mut rng = StdRng::seed_from_u64(1);
    let (mut commits, mut folded_ms, mut early) = (Vec::new(), 0.0, None);
    for no in 1..=LAST {
        let frames = changes(&mut rng, no == 1)?;
        let begun = Instant::now();
        take_in(&store, no, frames).await?;
        commits.push(ms(begun));
        let begun = Instant::now();
        keeper.pass(VM, false, &stop).await?;
        folded_ms += ms(begun);
        if no == EARLY {
            early = Some((percentile(&commits[1..], 0.5), look(&store, &root, Seq(no)).await?));
        }
    }
    let (early_commit, (early_find, early_restore, early_layers)) = early.context("no tenth point")?;
    let (find, restore, layers) = look(&store, &root, Seq(LAST)).await?;
    let dearest = dearest(&store.journal(VM).await).context("no late point")?;
    let (_, dear, dear_layers) = look(&store, &root, dearest).await?;
    let commit = percentile(&commits[commits.len() - 100..], 0.5);
    let journal = store.journal(VM).await;
    let deepest = journal.points.iter().map(|point| point.layers).max().unwrap_or_default();
    let bytes: u64 = journal.points.iter().map(|point| point.bytes).sum();
    let each = folded_ms / LAST as f64;
    rows.add(
        "restore_1800th_over_10th",
        restore / early_restore.max(1e-9),
        "",
        1.0,
        format!(
            "{restore:.1} ms from {layers} layers, {early_restore:.1} ms from {early_layers}; plan and read, uncached, \
             median of 5; the one of the last 300 that reads most, {dearest}: {dear:.1} ms from {dear_layers}; no point lies over \
             more than {deepest} layers; {} points hold {:.1} MB; folding took {each:.1} ms a point; limit: as fast as the tenth",
            journal.points.len(),
            bytes as f64 / 1e6
        ),
    );
    let note = format!("{commit:.1} ms and {early_commit:.1} ms, medians; limit: as fast as the tenth");
    rows.add("commit_1800th_over_10th", commit / early_commit.max(1e-9), "", 1.0, note);
    let note = format!(
        "{find:.2} ms and {early_find:.2} ms to find one point by its time; limit: as fast as the tenth"
    );
    rows.add("find_1800th_over_10th", find / early_find.max(1e-9), "", 1.0, note);
    Ok(())
}

/// Milliseconds to find a point and to restore it, and its layers.
async fn look(store: &Store, root: &Path, seq: Seq) -> Result<(f64, f64, u32)> {
    let catalog = Catalog::new(store.clone());
    let (mut finds, mut restores) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let begun = Instant::now();
        let found = catalog.find(VM, &cut_at(seq.0).to_string()).await?;
        anyhow::ensure!(found.seq == seq, "another point was cut then");
        finds.push(ms(begun));
        files_below(root)?.iter().try_for_each(|file| drop_cache(file))?;
        let begun = Instant::now();
        let reader = Reader::new(store.objects().clone(), Arc::new(Plan::of(store, VM, seq).await?));
        let whole = reader.read_whole(ImageKind::Disk, "vda", PAGES * PAGE as u64).await?;
        restores.push(ms(begun));
        anyhow::ensure!(whole.len() as u64 == PAGES * PAGE as u64, "cut short");
    }
    let journal = store.journal(VM).await;
    let point = journal.points.iter().find(|point| point.seq == seq).context("the point is gone")?;
    Ok((percentile(&finds, 0.5), percentile(&restores, 0.5), point.layers))
}

/// Of the last 300 points that whose layers hold most.
fn dearest(journal: &Journal) -> Option<Seq> {
    let points: BTreeMap<Seq, &JournalPoint> =
        journal.points.iter().map(|point| (point.seq, point)).collect();
    let read = |seq: Seq| {
        let path = std::iter::successors(points.get(&seq), |point| points.get(&point.base?));
        path.map(|point| point.bytes).sum::<u64>()
    };
    points.keys().rev().take(300).copied().max_by_key(|seq| read(*seq))
}

async fn take_in(store: &Store, no: u64, frames: Vec<Frame>) -> Result<()> {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&no.to_be_bytes());
    let parent = store.latest(VM).await.map(|head| head.point);
    let generation = store.generation(VM).await;
    let open = store.open_point(VM, "bench", generation, PointId::from_bytes(id), parent).await?;
    let count = u32::try_from(frames.len())?;
    for frame in frames {
        open.append(frame).await?;
    }
    let bytes = PAGES * PAGE as u64;
    let disk = Image { no: 0, kind: ImageKind::Disk, name: "vda".into(), bytes, full: no == 1 };
    let meta = PointMeta {
        cut_at: cut_at(no),
        images: vec![disk],
        consistency: Consistency::Crash,
        cut: None,
        was_running: true,
        stats: PointStats::default(),
    };
    open.commit(meta, count).await?;
    Ok(())
}

/// All pages, or some: most of them of the hot part.
fn changes(rng: &mut StdRng, all: bool) -> Result<Vec<Frame>> {
    let mut pages: Vec<u64> = match all {
        true => (0..PAGES).collect(),
        false => (0..CHANGED)
            .map(|at| if at % 8 == 0 { rng.random_range(0..PAGES) } else { rng.random_range(0..HOT) })
            .collect(),
    };
    pages.sort_unstable();
    pages.dedup();
    let groups = pages.chunks(64).zip(0..).map(|(pages, seq)| {
        let (mut runs, mut raw) = (Vec::new(), vec![0; pages.len() * PAGE]);
        pages.iter().for_each(|page| PageRun::push_page(&mut runs, *page));
        // Half of each page packs away.
        raw.chunks_mut(PAGE).for_each(|page| rng.fill(&mut page[..PAGE / 2]));
        Ok(Frame::seal(seq, &PageGroup { image: 0, runs, content: Content::Bytes(raw.into()) }, 1)?)
    });
    groups.collect()
}

fn cut_at(no: u64) -> UnixMs {
    UnixMs(1_700_000_000_000 + no * 1000)
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

const VM: VmId = VmId::from_bytes([0xbf; 16]);
const EARLY: u64 = 10;
const LAST: u64 = 1800;
/// 64 MiB, of which 8 MiB are hot, and 1 MiB changes from point to point.
const PAGES: u64 = 16384;
const HOT: u64 = 2048;
const CHANGED: u64 = 256;
