//! Whatever is folded and pruned, in whatever order, and wherever it is interrupted: each point that is kept restores to
//! the bytes that it had (I-5), and what is gone gives its space back.

mod hostile;

mod made;

use super::{
    keeper::Keeper,
    plan::{LAYERS_MAX, PRUNED_MAX, todo},
};
use crate::{
    config::Keep,
    failover::journal::{Journal as Failovers, Phase, Record},
    restore::{
        Plan, Reader, RestoreError,
        merge::{Merge, Sealing},
        tests::{commit_layer, layers, naive},
    },
    store::{
        FoldError, Objects, PointState, Store, StoreError,
        retain::Policy,
        sim::SimDisk,
        testing::{Cut, Guest, VM, commit, open, open_sized, restore},
    },
    verify::verify,
};
use lifeboat::{
    format::manifest::ImageKind,
    page::PAGE,
    units::{Seq, UnixMs},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tempfile::TempDir;
use tokio::sync::watch;

fn disk(sim: &SimDisk) -> Arc<dyn Objects> {
    Arc::new(sim.clone())
}

/// A keeper with `rules`, and the folder of its failover journals.
fn keeper(store: &Store, rules: &[&str]) -> (Keeper, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let failovers = Failovers::open(dir.path().to_path_buf()).unwrap();
    let keep = Keep::all(Policy::parse(rules).unwrap());
    (Keeper::new(store.clone(), keep, failovers).restless(), dir)
}

fn never() -> watch::Receiver<bool> {
    watch::channel(false).1
}

/// What was committed, by seq.
type Model = BTreeMap<Seq, Cut>;

async fn extend(store: &Store, guest: &mut Guest, model: &mut Model, points: usize) {
    for _ in 0..points {
        let parent = store.latest(VM).await.map(|head| head.point);
        let cut = guest.cut(parent);
        let done = commit(store, guest, &cut).await.unwrap();
        model.insert(done.seq, cut);
    }
}

/// Every point that is listed restores to what was committed; nothing is listed as damaged. Returns what is listed.
async fn assert_whole(store: &Store, model: &Model, at: &str) -> BTreeSet<Seq> {
    let listed = store.points(Some(VM)).await.unwrap();
    for point in &listed {
        assert_eq!(point.state, PointState::Ok, "{at}: point {}", point.seq);
        let found = restore(store.objects(), VM, point.seq).await.unwrap();
        assert!(found == model[&point.seq].content, "{at}: point {} came back with other bytes", point.seq);
    }
    listed.iter().map(|point| point.seq).collect()
}

/// All for 20 s, one of each 10 s for a minute, one a minute for five: points of these guests are a second apart.
const RULES: &[&str] = &["all for 20s", "every 10s for 60s", "every 60s for 300s"];

#[tokio::test]
async fn a_long_history_is_thinned_stays_shallow_and_gives_its_space_back() {
    let sim = SimDisk::new(1);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let (mut guest, mut model) = (Guest::new(1), Model::new());
    let (keeper, _dir) = keeper(&store, RULES);
    let mut used = Vec::new();
    for _ in 0..60 {
        extend(&store, &mut guest, &mut model, 10).await;
        keeper.pass(VM, true, &never()).await.unwrap();
        let journal = store.journal(VM).await;
        assert!(journal.points.iter().all(|point| point.layers <= LAYERS_MAX));
        assert_eq!(journal.trash, 0);
        used.push(sim.used());
    }
    let listed = assert_whole(&store, &model, "thinned").await;
    // 21 and 6 and 5 by the rules; no more than as many again that they stand on.
    assert!(listed.len() <= 2 * (21 + 6 + 5), "{} points", listed.len());
    assert!(listed.contains(&Seq(600)));
    // Five minutes is as far as the rules go: from then on nothing grows.
    let sent: usize = model.values().flat_map(|cut| &cut.frames).map(|frame| frame.encoded_len()).sum();
    assert!(used[59] < used[39] * 5 / 4 && used[59] < sent as u64 / 3, "{used:?} of {sent}");
    assert!(verify(&disk(&sim), None, |_| ()).await.unwrap().is_clean());
    let (store, report) = open(disk(&sim.restart())).await.unwrap();
    assert_eq!((report.findings.len(), report.leftovers_removed, report.orphan_packs_removed), (0, 0, 0));
    assert_eq!(assert_whole(&store, &model, "reopened").await, listed);
    extend(&store, &mut guest, &mut model, 3).await;
    assert_whole(&store, &model, "goes on").await;
}

/// Goal: a store that was never folded is brought within bounds too, while all of it is kept.
#[tokio::test]
async fn a_history_of_which_all_is_kept_is_read_from_a_bounded_number_of_layers() {
    let sim = SimDisk::new(2);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let (mut guest, mut model) = (Guest::new(2), Model::new());
    extend(&store, &mut guest, &mut model, 300).await;
    let (keeper, _dir) = keeper(&store, &["all"]);
    while !keeper.pass(VM, false, &never()).await.unwrap().folds.is_empty() {}
    let journal = store.journal(VM).await;
    let deepest = journal.points.iter().map(|point| point.layers).max().unwrap();
    assert!(deepest <= LAYERS_MAX / 2, "{deepest} layers");
    assert_eq!(assert_whole(&store, &model, "folded").await.len(), 300);
    assert!(verify(&disk(&sim), None, |_| ()).await.unwrap().is_clean());
}

/// Goal: taking in, folding, pruning and restoring go on side by side. Method: all of them at once, on several threads,
/// each restore of a random point that was listed; it may find the point gone, but never in pieces.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ingest_folding_pruning_and_restores_go_on_side_by_side() {
    let sim = SimDisk::new(3);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let model = Arc::new(std::sync::Mutex::new(Model::new()));
    let (order, stop) = watch::channel(false);
    let (keeper, _dir) = keeper(&store, RULES);
    let keeper = Arc::new(keeper);
    let keeping = tokio::spawn({
        let (keeper, stop) = (keeper.clone(), stop.clone());
        async move {
            while !*stop.borrow() {
                keeper.pass(VM, true, &never()).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    });
    let reading: Vec<_> = (0..3)
        .map(|seed| {
            let (store, model, stop) = (store.clone(), model.clone(), stop.clone());
            tokio::spawn(async move {
                let (mut rng, mut read) = (StdRng::seed_from_u64(seed), 0);
                while !*stop.borrow() {
                    let listed = store.points(Some(VM)).await.unwrap();
                    if listed.is_empty() {
                        tokio::task::yield_now().await;
                        continue;
                    }
                    let seq = listed[rng.random_range(0..listed.len())].seq;
                    let plan = match Plan::of(&store, VM, seq).await {
                        Ok(plan) => Arc::new(plan),
                        Err(RestoreError::Store(StoreError::Missing { .. })) => continue,
                        Err(error) => panic!("point {seq}: {error}"),
                    };
                    assert!(plan.is_pinned());
                    let reader = Reader::new(store.objects().clone(), plan.clone());
                    let content = model.lock().unwrap()[&seq].content.clone();
                    for (kind, name, bytes) in &content {
                        let found = reader.read_whole(*kind, name, 1 << 30).await.unwrap();
                        assert!(found == *bytes, "point {seq}, {name}");
                    }
                    read += 1;
                }
                read
            })
        })
        .collect();
    let mut guest = Guest::new(3);
    for at in 0..250 {
        let cut = guest.cut(store.latest(VM).await.map(|head| head.point));
        model.lock().unwrap().insert(Seq(at + 1), cut.clone());
        commit(&store, &guest, &cut).await.unwrap();
    }
    order.send(true).unwrap();
    keeping.await.unwrap();
    for reader in reading {
        assert!(reader.await.unwrap() > 0, "a reader that never got to read");
    }
    keeper.pass(VM, true, &never()).await.unwrap();
    let model = model.lock().unwrap().clone();
    let listed = assert_whole(&store, &model, "at the end").await;
    assert!(listed.len() < 100, "{}", listed.len());
    assert_eq!(store.journal(VM).await.trash, 0);
}

#[tokio::test]
async fn a_point_that_is_read_built_on_or_named_by_a_failover_is_never_taken_away() {
    let sim = SimDisk::new(4);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let (mut guest, mut model) = (Guest::new(4), Model::new());
    extend(&store, &mut guest, &mut model, 12).await;
    let (keeper, dir) = keeper(&store, &["all for 1s"]);
    let failovers = Failovers::open(dir.path().to_path_buf()).unwrap();
    let named = &model[&Seq(5)];
    let record = Record {
        vm: VM,
        point: named.point,
        seq: Seq(5),
        cut_at: named.meta.cut_at,
        phase: Phase::Begun,
        ..crate::failover::journal::tests::record()
    };
    failovers.save(&record).unwrap();
    let read = Plan::of(&store, VM, Seq(7)).await.unwrap();
    for _ in 0..3 {
        keeper.pass(VM, true, &never()).await.unwrap();
    }
    let listed = assert_whole(&store, &model, "held").await;
    for seq in [5, 7, 11, 12].map(Seq) {
        assert!(listed.contains(&seq), "{seq} of {listed:?}");
    }
    // Asked for by name, the store refuses the newest, what is read, and what others lie over.
    let journal = store.journal(VM).await;
    let asked: Vec<Seq> =
        [Seq(12), Seq(7)].into_iter().chain(journal.points.iter().filter_map(|p| p.base)).collect();
    let children = |seq: Seq| journal.points.iter().any(|point| point.base == Some(seq));
    let gone = store.prune(VM, &asked).await.unwrap().seqs;
    assert!(gone.iter().all(|seq| !children(*seq) && ![Seq(12), Seq(7)].contains(seq)), "{gone:?}");
    // What the reader began with is there until it has ended, wherever it lies now.
    let reader = Reader::new(store.objects().clone(), Arc::new(read));
    for (kind, name, bytes) in &model[&Seq(7)].content {
        assert!(reader.read_whole(*kind, name, 1 << 30).await.unwrap() == *bytes, "{name}");
    }
    drop(reader);
    // A journal that can't be read: nobody knows what it names.
    std::fs::write(failovers.path(VM), "{").unwrap();
    assert!(keeper.pass(VM, true, &never()).await.is_err());
    std::fs::remove_file(failovers.path(VM)).unwrap();
    for _ in 0..6 {
        extend(&store, &mut guest, &mut model, 10).await;
        keeper.pass(VM, true, &never()).await.unwrap();
    }
    let listed = assert_whole(&store, &model, "let go").await;
    assert!(!listed.contains(&Seq(5)) && !listed.contains(&Seq(7)), "{listed:?}");
}

#[tokio::test]
async fn a_fold_that_came_too_late_changes_nothing() {
    let sim = SimDisk::new(9);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let (mut guest, mut model) = (Guest::new(9), Model::new());
    extend(&store, &mut guest, &mut model, 6).await;
    let fold = async |seq: u64, onto: Option<u64>| {
        let mut writer = store.begin_fold(VM, Seq(seq), onto.map(Seq)).await.unwrap();
        let merge = Merge::load(store.objects().clone(), VM, writer.run(), writer.folds()).await.unwrap();
        let mut sealing = Sealing::default();
        for image in &merge.images {
            let kind = image.image.kind;
            let runs = merge.reader.segments(kind, &image.image.name).unwrap();
            let runs: Vec<_> = futures_util::TryStreamExt::try_collect(runs).await.unwrap();
            let frames = image.frames(runs.concat(), &mut sealing).unwrap();
            for frame in image.zero_frames(&mut sealing).unwrap().iter().chain(&frames) {
                writer.push(frame).await.unwrap();
            }
        }
        (writer, merge.full())
    };
    let (first, full) = fold(5, Some(3)).await;
    let (second, _) = fold(5, Some(2)).await;
    let (third, all) = fold(4, None).await;
    first.commit(full.clone()).await.unwrap();
    let late = second.commit(full).await.unwrap_err();
    assert!(matches!(late, FoldError::NotNow { .. }), "{late}");
    third.commit(all).await.unwrap();
    assert_whole(&store, &model, "folded twice").await;
    for wrong in [(5, Some(4)), (5, Some(5)), (4, Some(3)), (9, None)] {
        assert!(store.begin_fold(VM, Seq(wrong.0), wrong.1.map(Seq)).await.is_err(), "{wrong:?}");
    }
    while store.sweep(VM, 100).await.unwrap() > 0 {}
    let (store, report) = open(disk(&sim.restart())).await.unwrap();
    assert_eq!((report.orphan_packs_removed, report.leftovers_removed), (0, 0), "{report:?}");
    assert_whole(&store, &model, "reopened").await;
}

/// The decisions alone, on a history like that of a site that runs for days: bounded in depth and number, and no pass
/// takes away more than it may.
#[test]
fn plans_for_days_of_points_keep_paths_short_and_passes_bounded() {
    use crate::store::{Journal, JournalPoint, retain::Stamp};
    let policy = Policy::parse(&["all for 10m", "hourly for 24h", "daily for 30d"]).unwrap();
    let mut journal = Journal::default();
    let mut deepest = 0;
    for seq in 1..=20_000u64 {
        let point = lifeboat::id::PointId::from_bytes([0; 16]);
        let base = journal.points.last().map(|point| point.seq);
        // A point each 5 s; a day in minutes would not show hours, so this runs for more than one.
        journal.points.push(JournalPoint {
            seq: Seq(seq),
            point,
            cut_at: UnixMs(1_700_000_000_000 + seq * 5000),
            base,
            layers: 0,
            bytes: if base.is_none() { 1_000_000 } else { 1000 },
            whole: true,
            pinned: false,
        });
        if seq % 32 != 0 {
            continue;
        }
        for round in 0.. {
            assert!(round < 200, "no end at {seq}");
            depths(&mut journal);
            let stamps =
                journal.points.iter().map(|at| Stamp { seq: at.seq, cut_at: at.cut_at, whole: true });
            let todo = todo(&journal, &policy.wanted(&stamps.collect::<Vec<_>>()), &BTreeSet::new());
            assert!(todo.prune.len() <= PRUNED_MAX);
            journal.points.retain(|point| !todo.prune.contains(&point.seq));
            let Some((seq, onto)) = todo.fold else { break };
            let size = |seq: Seq| journal.points.iter().find(|point| point.seq == seq).unwrap();
            let (mut bytes, mut at) = (0, Some(seq));
            while at != onto {
                let point = size(at.unwrap());
                (bytes, at) = (bytes + point.bytes, point.base);
            }
            let cap = if onto.is_none() { 1_200_000 } else { 300_000 };
            let folded = journal.points.iter_mut().find(|point| point.seq == seq).unwrap();
            (folded.base, folded.bytes) = (onto, bytes.min(cap));
        }
        deepest = deepest.max(journal.points.iter().map(|point| point.layers).max().unwrap());
    }
    assert!(deepest <= LAYERS_MAX, "{deepest} layers");
    assert!(journal.points.len() <= 2 * (121 + 24 + 3), "{} points", journal.points.len());
}

/// Goal: a late point is restored nearly as fast as an early one, and what that costs is a small part of the journal.
/// Method: the decisions alone, on a guest that writes at random over all of its disk, so that a fold of many points is as
/// large as the disk; all points are kept. Without further complete points it would be seven images.
#[test]
fn however_many_points_are_kept_each_is_read_from_a_small_multiple_of_its_image() {
    use crate::store::{Journal, JournalPoint, retain::Why};
    const IMAGE: u64 = 1_000_000;
    let (mut journal, mut dearest, mut complete) = (Journal::default(), 0, 0);
    for seq in 1..=1200u64 {
        let base = journal.points.last().map(|point| point.seq);
        journal.points.push(JournalPoint {
            seq: Seq(seq),
            point: lifeboat::id::PointId::from_bytes([0; 16]),
            cut_at: UnixMs(1_700_000_000_000 + seq * 1000),
            base,
            layers: 0,
            bytes: if base.is_none() { IMAGE } else { IMAGE / 50 },
            whole: true,
            pinned: false,
        });
        for round in 0.. {
            assert!(round < 20, "no end at {seq}");
            depths(&mut journal);
            let wanted = journal.points.iter().map(|at| (at.seq, Why::All)).collect();
            let Some((seq, onto)) = todo(&journal, &wanted, &BTreeSet::new()).fold else { break };
            complete += u64::from(onto.is_none());
            let bases: BTreeMap<Seq, Option<Seq>> =
                journal.points.iter().map(|point| (point.seq, point.base)).collect();
            let below = std::iter::successors(Some(seq), |seq| bases[seq]);
            let spans = below.take_while(|at| Some(*at) != onto).last().unwrap();
            // Of pages taken at random, each once.
            let writes = (seq.0 - onto.map_or(spans.0, |onto| onto.0)) as f64 / 50.0;
            let bytes = if onto.is_none() { IMAGE } else { (IMAGE as f64 * (1.0 - (-writes).exp())) as u64 };
            let folded = journal.points.iter_mut().find(|point| point.seq == seq).unwrap();
            (folded.base, folded.bytes) = (onto, bytes);
        }
        let bytes: BTreeMap<Seq, (u64, Option<Seq>)> =
            journal.points.iter().map(|point| (point.seq, (point.bytes, point.base))).collect();
        let path = std::iter::successors(Some(Seq(seq)), |seq| bytes[seq].1);
        let read: u64 = path.map(|seq| bytes[&seq].0).sum();
        if seq > 600 {
            dearest = dearest.max(read);
        }
    }
    let all: u64 = journal.points.iter().map(|point| point.bytes).sum();
    assert!(dearest < IMAGE * 5 / 2, "{dearest} bytes are read for an image of {IMAGE}");
    assert!(complete * IMAGE < all / 3, "{complete} complete points in a journal of {all} bytes");
}

fn depths(journal: &mut crate::store::Journal) {
    let mut layers = BTreeMap::new();
    for point in &mut journal.points {
        let below = point.base.map_or(0, |base| *layers.get(&base).expect("a base that is gone"));
        point.layers = below + 1;
        layers.insert(point.seq, below + 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Images that shrink and grow, full points in the middle, zeroes; folds of any point over any below it, in any order,
    /// and points taken away between them: what is left reads as the model says.
    #[test]
    fn every_point_reads_as_a_naive_model_says_after_any_folds_and_prunes(
        layers in layers(),
        moves in prop::collection::vec((any::<u16>(), any::<u16>(), any::<bool>()), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let sim = SimDisk::new(0);
            let (store, _) = open_sized(disk(&sim), 9000).await.unwrap();
            for (no, layer) in layers.iter().enumerate() {
                commit_layer(&store, no as u64, layer).await;
            }
            for (which, onto, prune) in moves {
                let journal = store.journal(VM).await;
                let point = &journal.points[usize::from(which) % journal.points.len()];
                if prune {
                    store.prune(VM, &[point.seq]).await.unwrap();
                    continue;
                }
                fold_somewhere(&store, point.seq, usize::from(onto)).await;
                store.sweep(VM, 100).await.unwrap();
            }
            assert_model(&store, &layers).await;
            let (store, report) = open_sized(disk(&sim.restart()), 9000).await.unwrap();
            assert_eq!(report.findings, vec![]);
            assert_model(&store, &layers).await;
            assert!(verify(&disk(&sim.restart()), None, |_| ()).await.unwrap().is_clean());
        });
    }
}

/// Folds a point over the one that lies `onto` layers below it, or over nothing.
async fn fold_somewhere(store: &Store, seq: Seq, onto: usize) {
    let journal = store.journal(VM).await;
    let bases: BTreeMap<Seq, Option<Seq>> =
        journal.points.iter().map(|point| (point.seq, point.base)).collect();
    let mut path = vec![Some(seq)];
    while let Some(Some(at)) = path.last().copied() {
        path.push(bases[&at]);
    }
    let onto = path[1 + onto % (path.len() - 1)];
    let mut writer = store.begin_fold(VM, seq, onto).await.unwrap();
    let merge = Merge::load(store.objects().clone(), VM, writer.run(), writer.folds()).await.unwrap();
    let mut sealing = Sealing::default();
    for image in &merge.images {
        for frame in image.zero_frames(&mut sealing).unwrap() {
            writer.push(&frame).await.unwrap();
        }
        let runs = merge.reader.segments(image.image.kind, &image.image.name).unwrap();
        let runs: Vec<_> = futures_util::TryStreamExt::try_collect(runs).await.unwrap();
        for frame in image.frames(runs.concat(), &mut sealing).unwrap() {
            writer.push(&frame).await.unwrap();
        }
    }
    writer.commit(merge.full()).await.unwrap();
}

async fn assert_model(store: &Store, layers: &[crate::restore::tests::Layer]) {
    let model = naive(layers);
    for point in store.points(Some(VM)).await.unwrap() {
        let plan = Arc::new(Plan::of(store, VM, point.seq).await.unwrap());
        let reader = Reader::new(store.objects().clone(), plan);
        let found = reader.read_whole(ImageKind::Disk, "vda", 1 << 30).await.unwrap();
        let expected: Vec<u8> =
            model[point.seq.0 as usize - 1].iter().flat_map(|fill| vec![*fill; PAGE]).collect();
        assert!(found == expected, "point {}", point.seq);
    }
}
