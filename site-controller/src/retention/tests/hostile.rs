//! The same where something goes wrong: power, syncs, bits, and files that are lost.

use super::*;
use crate::{
    failover::journal::Journal as Failovers,
    store::{paths, retain::Stamp},
};

/// What the rules of these tests keep of points that are a second apart.
const FEW: &[&str] = &["all for 3s", "every 4s for 12s"];

/// One life of a store: points come, and are folded and pruned, as far as the disk lets it get.
async fn live(sim: &SimDisk, guest: &mut Guest, model: &mut Model, dir: &TempDir) {
    let Ok((store, _)) = open(disk(sim)).await else { return };
    let failovers = Failovers::open(dir.path().to_path_buf()).unwrap();
    let keep = Keep::all(Policy::parse(FEW).unwrap());
    let keeper = Keeper::new(store.clone(), keep, failovers).restless();
    for _ in 0..11 {
        let cut = guest.cut(store.latest(VM).await.map(|head| head.point));
        let next = Seq(store.latest(VM).await.map_or(0, |head| head.seq.0) + 1);
        // It may be there, even if we are not told.
        model.insert(next, cut.clone());
        if commit(&store, guest, &cut).await.is_err() {
            return;
        }
        if keeper.pass(VM, true, &never()).await.is_err() {
            return;
        }
    }
}

/// Goal: I-5, I-2. Method: cut the power at every sync of a life in which points are folded and pruned, once more while
/// reopening, and look: whatever the rules keep is there and whole, and no object is that nothing needs.
#[tokio::test]
async fn a_power_cut_at_every_step_of_folding_and_pruning_leaves_every_kept_point_whole() {
    let dir = tempfile::tempdir().unwrap();
    let dry = SimDisk::new(0);
    live(&dry, &mut Guest::new(5), &mut Model::new(), &dir).await;
    let steps = dry.steps();
    assert!(steps > 80, "{steps} syncs");
    for cut in 1..=steps {
        let at = format!("cut {cut}");
        let (sim, mut guest, mut model) = (SimDisk::new(cut), Guest::new(5), Model::new());
        sim.cut_at(cut);
        live(&sim, &mut guest, &mut model, &dir).await;
        assert!(!sim.is_powered(), "{at}");
        let sim = sim.reopen();
        sim.cut_at(1 + cut % 4);
        let _ = open(disk(&sim)).await;
        let sim = sim.reopen();
        let (store, report) = open(disk(&sim)).await.unwrap();
        assert_eq!(report.findings, vec![], "{at}");
        let listed = assert_whole(&store, &model, &at).await;
        assert_kept(&listed, &model, &at);
        let verified = verify(&disk(&sim), None, |_| ()).await.unwrap();
        assert_eq!(verified.findings, vec![], "{at}");
        let (_, report) = open(disk(&sim.restart())).await.unwrap();
        assert_eq!((report.leftovers_removed, report.orphan_packs_removed), (0, 0), "{at}: swept at once");
        // And it goes on.
        let (store, _) = open(disk(&sim.restart())).await.unwrap();
        // What the lost point carried is owed again: the next one is full.
        let full = guest.cut(None);
        let done = commit(&store, &guest, &full).await.unwrap();
        model.insert(done.seq, full);
        extend(&store, &mut guest, &mut model, 2).await;
        let (keeper, _dir) = keeper(&store, FEW);
        keeper.pass(VM, true, &never()).await.unwrap();
        let listed = assert_whole(&store, &model, &at).await;
        assert_kept(&listed, &model, &at);
    }
}

/// Whatever rules of the crash test keep, of the points up to the newest that is listed.
fn assert_kept(listed: &BTreeSet<Seq>, model: &Model, at: &str) {
    let Some(newest) = listed.last() else { return };
    let stamp = |(seq, cut): (&Seq, &Cut)| Stamp { seq: *seq, cut_at: cut.meta.cut_at, whole: true };
    let all: Vec<_> = model.range(..=*newest).map(stamp).collect();
    let wanted = Policy::parse(FEW).unwrap().wanted(&all);
    for seq in wanted.keys() {
        assert!(listed.contains(seq), "{at}: point {seq} is missing of {listed:?}");
    }
}

/// Goal: a sync that fails while the power stays on leaves no point that depends on what is not there.
#[tokio::test]
async fn a_sync_that_fails_in_folding_or_pruning_leaves_every_kept_point_whole() {
    let dir = tempfile::tempdir().unwrap();
    for (step, count) in (1..=96).step_by(3).flat_map(|step| [1, 3].map(|count| (step, count))) {
        let at = format!("step {step}, {count} syncs");
        let (sim, mut guest, mut model) = (SimDisk::new(step), Guest::new(6), Model::new());
        let (store, _) = open(disk(&sim)).await.unwrap();
        let failovers = Failovers::open(dir.path().to_path_buf()).unwrap();
        let keep = Keep::all(Policy::parse(FEW).unwrap());
        let keeper = Keeper::new(store.clone(), keep, failovers).restless();
        sim.fail_at(step, count);
        let mut parent = None;
        for _ in 0..11 {
            let cut = guest.cut(parent);
            parent = None;
            if let Ok(done) = commit(&store, &guest, &cut).await {
                parent = Some(cut.point);
                model.insert(done.seq, cut);
            }
            let _ = keeper.pass(VM, true, &never()).await;
        }
        let listed = assert_whole(&store, &model, &at).await;
        assert_kept(&listed, &model, &at);
        drop((keeper, store));
        sim.fail_at(1, 0);
        let sim = sim.reopen();
        let (store, report) = open(disk(&sim)).await.unwrap();
        assert_eq!(report.damaged_points, 0, "{at}: {report:?}");
        let listed = assert_whole(&store, &model, &at).await;
        assert_kept(&listed, &model, &at);
    }
}

#[tokio::test]
async fn a_lost_manifest_is_told_from_a_pruned_one_and_a_changed_edge_is_found() {
    let sim = SimDisk::new(7);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let (mut guest, mut model) = (Guest::new(7), Model::new());
    extend(&store, &mut guest, &mut model, 40).await;
    let (keeper, _dir) = keeper(&store, &["all for 6s", "every 10s for 60s"]);
    keeper.pass(VM, true, &never()).await.unwrap();
    let journal = store.journal(VM).await;
    // A point that nothing lies over, in the middle of the history.
    let leaf = journal.points.iter().rev().skip(1).find(|point| {
        journal.points.iter().all(|other| other.base != Some(point.seq)) && point.seq < Seq(40)
    });
    let leaf = leaf.unwrap().seq;
    drop((store, keeper));
    let sim = sim.restart();
    sim.tamper(&paths::manifest(VM, leaf), |_| None);
    let (store, report) = open(disk(&sim)).await.unwrap();
    assert_eq!(report.damaged_points, 0, "{report:?}");
    assert!(report.findings.iter().any(|found| found.what.contains("is missing")), "{report:?}");
    let verified = verify(&disk(&sim), None, |_| ()).await.unwrap();
    assert!(verified.findings.iter().any(|found| found.what.contains("is missing")), "{verified:?}");
    model.remove(&leaf);
    assert_whole(&store, &model, "without it").await;
}

/// Goal: I-6. Method: flip single bits all over every object of a history that was folded and pruned; verify must see
/// each, reopening must delete nothing then, and restore must refuse or be right.
#[tokio::test]
async fn a_flipped_bit_anywhere_in_a_folded_history_is_found_and_never_restored() {
    let mut sim = SimDisk::new(8);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let (mut guest, mut model) = (Guest::new(8), Model::new());
    extend(&store, &mut guest, &mut model, 14).await;
    let (keeper, _dir) = keeper(&store, FEW);
    keeper.pass(VM, true, &never()).await.unwrap();
    let listed = assert_whole(&store, &model, "before").await;
    drop((store, keeper));
    let (mut rng, mut flips) = (StdRng::seed_from_u64(8), 0);
    for path in sim.paths() {
        for _ in 0..6 {
            let mut original = Vec::new();
            sim.tamper(&path, |bytes| {
                original.clone_from(&bytes);
                let mut bytes = bytes;
                let at = rng.random_range(0..bytes.len() * 8);
                bytes[at / 8] ^= 1 << (at % 8);
                Some(bytes)
            });
            let before = sim.paths().len();
            let found = verify(&disk(&sim), None, |_| ()).await.unwrap();
            assert!(!found.is_clean(), "{path}");
            for seq in &listed {
                if let Ok(content) = restore(&disk(&sim), VM, *seq).await {
                    assert!(content == model[seq].content, "{path}: point {seq} came back with other bytes");
                }
            }
            sim = sim.restart();
            let (_, report) = open(disk(&sim)).await.unwrap();
            assert_eq!(sim.paths().len(), before, "{path}: {report:?}");
            sim.tamper(&path, |_| Some(original));
            flips += 1;
        }
    }
    assert!(flips > 60);
}
