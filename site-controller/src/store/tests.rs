//! What is acknowledged survives a power cut at any durable step (I-2); older generations are refused (I-4).

use super::{
    sim::SimDisk,
    testing::{Cut, Guest, VM, commit, commit_as, open, restore},
    *,
};
use lifeboat::{
    id::PointId,
    units::{ByteSize, Generation, Seq},
};
use std::{ops::Range, sync::Arc};

fn disk(sim: &SimDisk) -> Arc<dyn Objects> {
    Arc::new(sim.clone())
}

/// Commits a full point and then deltas, each over the one before.
async fn history(store: &Store, guest: &mut Guest, points: usize) -> Vec<(Seq, Cut)> {
    let (mut parent, mut done) = (store.latest(guest.vm).await.map(|head| head.point), Vec::new());
    for _ in 0..points {
        let cut = guest.cut(parent);
        let committed = commit(store, guest, &cut).await.unwrap();
        parent = Some(cut.point);
        done.push((committed.seq, cut));
    }
    done
}

async fn assert_restores(objects: &Arc<dyn Objects>, history: &[(Seq, Cut)]) {
    for (seq, cut) in history {
        let found = restore(objects, VM, *seq).await.unwrap();
        assert!(found == cut.content, "point {seq} came back with other bytes");
    }
}

#[tokio::test]
async fn committed_points_come_back_byte_for_byte_from_a_real_directory_that_was_reopened() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a/b/store");
    let mut guest = Guest::new(1);
    let done = {
        let local = Arc::new(LocalObjects::open(&path, ByteSize(0)).await.unwrap());
        let (store, report) = open(local.clone()).await.unwrap();
        assert_eq!(report, ReopenReport::default());
        let refused = LocalObjects::open(&path, ByteSize(0)).await;
        assert!(matches!(refused, Err(StoreError::InUse { .. })));
        history(&store, &mut guest, 6).await
    };
    let local: Arc<dyn Objects> = Arc::new(LocalObjects::open(&path, ByteSize(0)).await.unwrap());
    let (store, report) = open(local.clone()).await.unwrap();
    assert_eq!((report.points, report.damaged_points, report.findings.len()), (6, 0, 0));
    assert_restores(&local, &done).await;
    let more = history(&store, &mut guest, 2).await;
    assert_eq!(more[1].0, Seq(8));
    assert_restores(&local, &more).await;
}

/// What one life of the store told its callers.
#[derive(Default)]
struct Told {
    points: Vec<(Seq, Cut)>,
    generation: Option<Generation>,
    /// The point under way when it ended.
    last: Option<Cut>,
}

/// Four points and, between the second and the third, a raised generation; as far as the disk lets it get.
async fn live(sim: &SimDisk, guest: &mut Guest) -> Told {
    let mut told = Told::default();
    let Ok((store, _)) = open(disk(sim)).await else { return told };
    for at in 0..4 {
        if at == 2 {
            match store.raise(VM).await {
                Ok(generation) => told.generation = Some(generation),
                Err(_) => return told,
            }
        }
        let cut = guest.cut(told.points.last().map(|(_, cut)| cut.point));
        told.last = Some(cut.clone());
        match commit(&store, guest, &cut).await {
            Ok(committed) => told.points.push((committed.seq, cut)),
            Err(_) => return told,
        }
    }
    told
}

/// Goal: I-2. Method: cut the power at every sync of four commits, once more while reopening, and look.
async fn power_cuts(lies: bool) {
    let dry = SimDisk::new(0);
    live(&dry, &mut Guest::new(5)).await;
    let steps = dry.steps();
    assert!(steps > 20, "{steps} syncs");
    for cut in 1..=steps {
        for seed in 0..3 {
            let at = format!("seed {seed}, cut {cut}");
            let (sim, mut guest) = (SimDisk::new(seed << 32 | cut), Guest::new(5));
            if lies {
                sim.lie();
            }
            sim.cut_at(cut);
            let told = live(&sim, &mut guest).await;
            assert!(!sim.is_powered(), "{at}");
            let sim = sim.reopen();
            sim.cut_at(1 + seed);
            let _ = open(disk(&sim)).await;
            let sim = sim.reopen();
            let objects = disk(&sim);
            let (store, report) = open(objects.clone()).await.unwrap();
            let found = store.points(Some(VM)).await.unwrap();
            assert!(found.len() == told.points.len() || found.len() == told.points.len() + 1, "{at}");
            assert!(found.iter().all(|point| point.state == PointState::Ok), "{at}: {report:?}");
            assert_restores(&objects, &told.points).await;
            if let (Some(extra), Some(last)) = (found.get(told.points.len()), &told.last) {
                assert_eq!(extra.point, last.point, "{at}");
                assert_eq!(restore(&objects, VM, extra.seq).await.unwrap(), last.content, "{at}");
            }
            assert!(store.generation(VM).await >= told.generation.unwrap_or(Generation::FIRST), "{at}");
            if !lies {
                assert_eq!(report.findings, vec![], "{at}");
                assert_nothing_half_there(&sim, &objects, &found).await;
            }
            // And it goes on.
            let more = guest.cut(None);
            let committed = commit(&store, &guest, &more).await.unwrap();
            assert_restores(&objects, &[(committed.seq, more)]).await;
            let verified = crate::verify::verify(&objects, None, |_| ()).await.unwrap();
            assert_eq!(verified.findings.iter().filter(|found| !found.affects.is_empty()).count(), 0, "{at}");
        }
    }
}

async fn assert_nothing_half_there(sim: &SimDisk, objects: &Arc<dyn Objects>, found: &[PointSummary]) {
    let mut expected = Vec::new();
    for point in found {
        let (manifest, _, _) = read_manifest(objects.as_ref(), VM, point.seq).await.unwrap();
        expected.push(paths::manifest(VM, point.seq));
        expected.extend(manifest.packs.iter().map(|pack| paths::pack(VM, pack.id)));
    }
    expected.sort();
    let mut there = sim.paths();
    there.retain(|path| !path.contains("/generations/"));
    assert_eq!(there, expected);
    assert_eq!(sim.sweep_partials().await.unwrap(), 0);
}

#[tokio::test]
async fn an_acknowledged_point_survives_a_power_cut_at_every_durable_step() {
    power_cuts(false).await;
}

#[tokio::test]
async fn on_a_disk_that_lies_torn_manifests_are_set_aside_and_acknowledged_points_stay() {
    power_cuts(true).await;
}

/// Goal: a failed commit leaves no doubt. Method: let each sync fail, and the one or three after it too, while the power
/// stays on; the agent goes on as agents do; then cut the power and look.
#[tokio::test]
async fn a_sync_that_fails_loses_no_acknowledged_point_and_forks_no_history() {
    for (step, count) in (1..=30).flat_map(|step| [1, 2, 4].map(|count| (step, count))) {
        let at = format!("step {step}, {count} syncs");
        let (sim, mut guest, mut told) = (SimDisk::new(step), Guest::new(11), Vec::new());
        let (store, _) = open(disk(&sim)).await.unwrap();
        sim.fail_at(step, count);
        for _ in 0..6 {
            let basis = store.latest(VM).await.map(|head| head.point);
            let known = told.last().map(|(_, cut): &(Seq, Cut)| cut.point);
            assert_eq!(basis, known, "{at}: the head is what was acknowledged last");
            let cut = guest.cut(None);
            if let Ok(committed) = commit(&store, &guest, &cut).await {
                told.push((committed.seq, cut));
            }
        }
        assert!(told.len() >= 3, "{at}");
        drop(store);
        let sim = sim.reopen();
        let (store, report) = open(disk(&sim)).await.unwrap();
        assert_eq!(report.damaged_points, 0, "{at}: {report:?}");
        let found = store.points(Some(VM)).await.unwrap();
        let found = found.iter().take(told.len()).map(|point| (point.seq, point.point));
        assert!(found.eq(told.iter().map(|(seq, cut)| (*seq, cut.point))), "{at}");
        assert_restores(&disk(&sim), &told).await;
    }
}

/// Goal: I-6. Method: flip single bits all over every object; verify must see each, restore must refuse or be right.
#[tokio::test]
async fn a_flipped_bit_anywhere_is_found_by_verify_and_never_restored() {
    let sim = SimDisk::new(9);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let mut guest = Guest::new(9);
    store.raise(VM).await.unwrap();
    let done = history(&store, &mut guest, 3).await;
    let clean = crate::verify::verify(&disk(&sim), Some(VM), |_| ()).await.unwrap();
    assert!(clean.is_clean() && clean.points == 3 && clean.bytes > 100_000, "{clean:?}");
    for path in sim.paths() {
        let mut original = Vec::new();
        sim.tamper(&path, |bytes| {
            original = bytes.clone();
            Some(bytes)
        });
        let stride = (original.len() / 40).max(1);
        for at in (0..original.len()).filter(|at| *at < 70 || at % stride == 0 || original.len() - at < 5) {
            let mut bad = original.clone();
            bad[at] ^= 1 << (at % 8);
            sim.tamper(&path, |_| Some(bad));
            let report = crate::verify::verify(&disk(&sim), Some(VM), |_| ()).await.unwrap();
            assert!(!report.is_clean(), "{path}, byte {at}: not found");
            for (seq, cut) in &done {
                let affected =
                    report.findings.iter().any(|found| found.affects.iter().any(|point| point.seq == *seq));
                match restore(&disk(&sim), VM, *seq).await {
                    Ok(found) => assert!(found == cut.content, "{path}, byte {at}: wrong bytes"),
                    Err(_) => assert!(affected || path == paths::manifest(VM, *seq), "{path}, byte {at}"),
                }
            }
        }
        // Cut in half, then gone. Only a missing newest manifest, or generation, is as if it had never been.
        for gone in [false, true] {
            sim.tamper(&path, |bytes| (!gone).then(|| bytes[..bytes.len() / 2].to_vec()));
            let report = crate::verify::verify(&disk(&sim), Some(VM), |_| ()).await.unwrap();
            let unseen = gone && (path.contains("/generations/") || path == paths::manifest(VM, Seq(3)));
            assert!(unseen || !report.is_clean(), "{path}: not found");
            for (seq, cut) in &done {
                if let Ok(found) = restore(&disk(&sim), VM, *seq).await {
                    assert!(found == cut.content, "{path}: wrong bytes");
                }
            }
        }
        sim.put_durable(&path, original.into()).await.unwrap();
    }
}

#[tokio::test]
async fn damage_in_the_middle_is_shown_and_a_full_point_starts_the_history_anew() {
    let sim = SimDisk::new(3);
    let mut guest = Guest::new(3);
    let done = {
        let (store, _) = open(disk(&sim)).await.unwrap();
        history(&store, &mut guest, 4).await
    };
    sim.tamper(&paths::manifest(VM, Seq(2)), |mut bytes| {
        bytes[100] ^= 1;
        Some(bytes)
    });
    let packs = sim.paths().len();
    let sim = sim.restart();
    let objects = disk(&sim);
    let (store, report) = open(objects.clone()).await.unwrap();
    assert_eq!((report.points, report.damaged_points, report.orphan_packs_removed), (3, 2, 0), "{report:?}");
    assert!(report.orphan_packs_kept > 0 && sim.paths().len() == packs, "nothing is thrown away");
    assert_eq!(report.findings.len(), 2, "{report:?}");
    assert_eq!(report.findings[0].affects.len() + report.findings[1].affects.len(), 2);
    assert_restores(&objects, &done[..1]).await;
    for (seq, _) in &done[1..] {
        assert!(restore(&objects, VM, *seq).await.is_err());
    }
    let head = store.latest(VM).await.unwrap();
    assert!(!head.is_whole());
    let delta = guest.cut(Some(head.point));
    let refused = commit(&store, &guest, &delta).await.unwrap_err();
    assert!(matches!(refused, PointError::Parent { .. }), "{refused}");
    let more = history_from_full(&store, &mut guest).await;
    assert_eq!(more[0].0, Seq(5));
    assert_restores(&objects, &more).await;
}

async fn history_from_full(store: &Store, guest: &mut Guest) -> Vec<(Seq, Cut)> {
    let full = guest.cut(None);
    let committed = commit(store, guest, &full).await.unwrap();
    let mut done = vec![(committed.seq, full)];
    done.extend(history(store, guest, 2).await);
    done
}

#[tokio::test]
async fn a_fenced_writer_is_refused_at_admission_and_at_commit() {
    let sim = SimDisk::new(4);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let mut guest = Guest::new(4);
    history(&store, &mut guest, 1).await;
    let cut = guest.cut(store.latest(VM).await.map(|head| head.point));
    let first = Generation::FIRST;
    let open_point = store.open_point(VM, "web-1", first, cut.point, cut.parent).await.unwrap();
    for frame in &cut.frames {
        open_point.append(frame.clone()).await.unwrap();
    }
    let busy = store.open_point(VM, "web-1", first, cut.point, None).await.unwrap_err();
    assert!(matches!(busy, PointError::Busy { .. }), "{busy}");
    assert_eq!(store.raise(VM).await.unwrap(), Generation(2));
    let fenced = open_point.commit(cut.meta.clone(), cut.frames.len() as u32).await.unwrap_err();
    assert!(matches!(fenced, PointError::Fenced { .. }), "{fenced}");
    open_point.abort().await;
    let fenced = commit_as(&store, &guest, &cut, first).await.unwrap_err();
    assert!(matches!(fenced, PointError::Fenced { .. }), "{fenced}");
    let unknown = commit_as(&store, &guest, &cut, Generation(3)).await.unwrap_err();
    assert!(matches!(unknown, PointError::Unknown { .. }), "{unknown}");
    assert_eq!(store.raise_to(VM, Generation(9)).await.unwrap(), Generation(9));
    assert_eq!(store.raise_to(VM, Generation(5)).await.unwrap(), Generation(9));
    let (store, _) = open(disk(&sim.restart())).await.unwrap();
    assert_eq!(store.generation(VM).await, Generation(9));
    commit_as(&store, &guest, &cut, Generation(9)).await.unwrap();
}

#[tokio::test]
async fn a_point_with_missing_foreign_or_contradicting_frames_is_refused_and_can_be_completed() {
    let sim = SimDisk::new(6);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let mut guest = Guest::new(6);
    let cut = guest.cut(None);
    let frames = cut.frames.len() as u32;
    let open_point = store.open_point(VM, "web-1", Generation::FIRST, cut.point, None).await.unwrap();
    let (held_back, sent) = cut.frames.split_last().unwrap();
    for frame in sent {
        open_point.append(frame.clone()).await.unwrap();
    }
    let short = open_point.commit(cut.meta.clone(), frames).await.unwrap_err();
    assert!(matches!(short, PointError::Incomplete { .. } | PointError::Invalid(_)), "{short}");
    let seq = held_back.head.seq;
    assert_eq!(open_point.missing(frames, 10).await, vec![Range { start: seq, end: seq + 1 }]);
    let mut corrupt = held_back.clone();
    corrupt.head.image ^= 1;
    assert!(matches!(open_point.append(corrupt).await, Err(PointError::Frame(_))));
    open_point.append(held_back.clone()).await.unwrap();
    let mut other = guest.cut(None).frames[0].clone();
    other.head.seq = seq;
    assert!(open_point.append(other).await.is_err());
    let mut meta = cut.meta.clone();
    meta.images.remove(0);
    let foreign = open_point.commit(meta, frames).await.unwrap_err();
    assert!(foreign.to_string().contains("no image has number 7"), "{foreign}");
    let mut meta = cut.meta.clone();
    meta.images[1].bytes = 4096;
    let beyond = open_point.commit(meta, frames).await.unwrap_err();
    assert!(beyond.to_string().contains("`vda` ends before byte"), "{beyond}");
    let done = open_point.commit(cut.meta.clone(), frames).await.unwrap();
    assert!(matches!(open_point.append(held_back.clone()).await, Err(PointError::Closed(_))));
    assert_restores(&disk(&sim), &[(done.seq, cut)]).await;
}

#[tokio::test]
async fn an_abandoned_or_aborted_point_leaves_nothing() {
    let sim = SimDisk::new(7);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let mut guest = Guest::new(7);
    for abort in [true, false] {
        let cut = guest.cut(None);
        let point = store.open_point(VM, "web-1", Generation::FIRST, cut.point, None).await.unwrap();
        for frame in &cut.frames {
            point.append(frame.clone()).await.unwrap();
        }
        assert!(!sim.paths().is_empty(), "packs have rolled over");
        if abort {
            point.abort().await;
        } else {
            drop(point);
            // The next point tidies up.
            store.open_point(VM, "web-1", Generation::FIRST, cut.point, None).await.unwrap();
        }
        assert_eq!((sim.paths(), sim.used()), (vec![], 0));
    }
}

#[tokio::test]
async fn a_full_disk_is_told_as_such_loses_nothing_and_goes_on_when_there_is_room() {
    let sim = SimDisk::new(8);
    let objects = disk(&sim);
    let (store, _) = open(objects.clone()).await.unwrap();
    let mut guest = Guest::new(8);
    let mut done = history(&store, &mut guest, 2).await;
    let used = sim.used();
    let mut refused = 0;
    for room in (0..300_000).step_by(9_000) {
        sim.set_capacity(used + room, 0);
        let cut = guest.cut(None);
        match commit(&store, &guest, &cut).await {
            Err(PointError::Store(error)) => {
                assert!(error.is_full(), "{error}");
                assert_eq!(sim.used(), used, "a refused point leaves nothing, with room {room}");
                refused += 1;
            }
            Err(other) => panic!("{other}"),
            Ok(_) => break,
        }
    }
    assert!(refused > 10);
    sim.set_capacity(u64::MAX, 0);
    done.extend(history(&store, &mut guest, 2).await);
    assert_restores(&objects, &done).await;
}

/// Goal: whichever of several writes is answered first, the answer is that there is no room.
#[tokio::test]
async fn what_comes_after_a_write_that_found_no_room_is_told_so_too() {
    let sim = SimDisk::new(9);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let cut = Guest::new(9).cut(None);
    let point = store.open_point(VM, "web-1", Generation::FIRST, cut.point, None).await.unwrap();
    sim.set_capacity(0, 0);
    // The first are not written yet.
    let mut answers = Vec::new();
    for frame in &cut.frames {
        answers.push(point.append(frame.clone()).await.map(drop));
    }
    answers.push(point.commit(cut.meta.clone(), cut.frames.len() as u32).await.map(drop));
    answers.retain(Result::is_err);
    assert!(answers.len() > 2, "{answers:?}");
    let is_full = |refused: &Result<(), PointError>| matches!(refused, Err(PointError::Store(error)) if error.is_full());
    assert!(answers.iter().all(is_full), "{answers:?}");
}

#[tokio::test]
async fn several_tasks_may_append_at_once() {
    let sim = SimDisk::new(10);
    let (store, _) = open(disk(&sim)).await.unwrap();
    let cut = Guest::new(10).cut(None);
    let point = store.open_point(VM, "web-1", Generation::FIRST, cut.point, None).await.unwrap();
    let point = Arc::new(point);
    let tasks: Vec<_> = cut
        .frames
        .chunks(7)
        .map(|frames| {
            let (point, frames) = (point.clone(), frames.to_vec());
            tokio::spawn(async move {
                for frame in frames {
                    point.append(frame).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let done = point.commit(cut.meta.clone(), cut.frames.len() as u32).await.unwrap();
    assert_restores(&disk(&sim), &[(done.seq, cut)]).await;
    assert_ne!(store.latest(VM).await.map(|head| head.point), Some(PointId::from_bytes([0; 16])));
}
