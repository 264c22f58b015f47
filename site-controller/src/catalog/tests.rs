//! The catalogue finds what an operator names, and the index can be lost, garbled or deleted at any time (I-9).

use super::*;
use crate::store::{
    Ask, MemoryIndex, Objects, SummaryIndex,
    sim::SimDisk,
    testing::{Guest, VM, commit, open_with},
};
use lifeboat::{
    format::manifest::Consistency,
    id::PointId,
    units::{Generation, Seq},
};
use std::{fs, path::Path, sync::Arc};

/// Midday of 2023-11-15, UTC.
const NOW: UnixMs = UnixMs(1_700_049_600_000);

fn point(seq: u64, id: [u8; 2], cut_at: u64) -> PointSummary {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&id);
    PointSummary {
        vm: VM,
        name: "web-1".into(),
        point: PointId::from_bytes(bytes),
        seq: Seq(seq),
        cut_at: UnixMs(cut_at),
        committed_at: UnixMs(cut_at + 500),
        generation: Generation::FIRST,
        has_memory: true,
        seed: false,
        at_rest: false,
        stays_off: false,
        consistency: Consistency::Memory,
        cut: None,
        memory_changed_bytes: 1,
        disk_changed_bytes: 2,
        wire_bytes: 3,
        pause_us: 4,
        stored_bytes: 5,
        state: PointState::Ok,
    }
}

/// What is meant where the index holds these points.
async fn found(points: &[PointSummary], given: &str) -> Result<u64, CatalogError> {
    let index = Arc::new(MemoryIndex::default());
    let (store, _) = open_with(Arc::new(SimDisk::new(1)), 1 << 20, index.clone()).await?;
    index.reconcile(points);
    select(&store, VM, &Selector::parse(given, NOW)?).await.map(|point| point.seq.0)
}

#[tokio::test]
async fn an_operator_names_a_point_by_latest_by_id_or_by_time() {
    let minute = 60_000;
    let points = [
        point(1, [0xab, 0xcd], NOW.0 - 20 * minute),
        point(2, [0xab, 0x12], NOW.0 - 10 * minute),
        point(3, [0xff, 0x12], NOW.0 - 2 * minute),
    ];
    for (given, seq) in [
        ("latest", 3),
        ("abcd", 1),
        ("AB12", 2),
        ("ff12", 3),
        ("5m ago", 2),
        ("0s ago", 3),
        ("10m ago", 2),
        ("11:45:00", 1),
        ("11:50:00", 2),
        ("11:59:59", 3),
        ("2023-11-15T11:50:00Z", 2),
        ("2023-11-15T12:49:59+01:00", 1),
    ] {
        assert_eq!(found(&points, given).await.unwrap(), seq, "{given}");
    }
    let many = found(&points, "ab").await.unwrap_err();
    assert!(matches!(&many, CatalogError::ManyPoints { choices, .. } if choices.matches("ab").count() == 2));
    assert!(matches!(found(&points, "cc").await, Err(CatalogError::NoPoint { .. })));
    // Half past twelve is still to come today: yesterday's is meant.
    assert!(matches!(found(&points, "12:30:00").await, Err(CatalogError::TooEarly { .. })));
    assert!(matches!(found(&[], "latest").await, Err(CatalogError::NoPoints { .. })));
    for given in ["", "yesterday", "5 parsecs ago", "25:00:00", "../etc", "\u{0}", "ago"] {
        let error = found(&points, given).await.unwrap_err();
        assert!(matches!(error, CatalogError::Unreadable { .. }), "{given}: {error}");
    }
}

#[tokio::test]
async fn a_damaged_point_is_never_taken_nor_silently_replaced_by_an_older_one() {
    let mut points = [point(1, [1, 1], NOW.0 - 9000), point(2, [2, 2], NOW.0 - 5000)];
    points[1].state = PointState::Damaged("pack missing".into());
    let error = found(&points, "latest").await.unwrap_err().to_string();
    assert!(error.contains("pack missing") && error.contains(&points[0].point.to_string()), "{error}");
    assert_eq!(found(&points, "6s ago").await.unwrap(), 1);
}

fn index(folder: &Path) -> Arc<SledIndex> {
    Arc::new(SledIndex::new(folder))
}

fn all_files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(all_files(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

/// Goal: I-9. Method: lose, garble and flip the index in many ways; the answers never change.
#[tokio::test]
async fn an_index_that_is_lost_or_damaged_is_rebuilt_from_the_manifests() {
    let (root, sim) = (tempfile::tempdir().unwrap(), SimDisk::new(1));
    let folder = root.path().join("index");
    let objects: Arc<dyn Objects> = Arc::new(sim.clone());
    let expected = {
        let (store, _) = open_with(objects.clone(), 1 << 20, index(&folder)).await.unwrap();
        let mut guest = Guest::new(1);
        for _ in 0..3 {
            let cut = guest.cut(store.latest(VM).await.map(|head| head.point));
            commit(&store, &guest, &cut).await.unwrap();
        }
        store.points(None).await.unwrap()
    };
    assert_eq!(expected.len(), 3);
    let reopened = |corrected: Option<u64>| {
        let (objects, folder, expected) = (objects.clone(), folder.clone(), expected.clone());
        async move {
            let (store, report) = open_with(objects, 1 << 20, index(&folder)).await.unwrap();
            assert!(
                corrected.is_none_or(|corrected| report.index_entries_corrected == corrected),
                "{report:?}"
            );
            let catalog = Catalog::new(store);
            assert_eq!(catalog.points(VM).await.unwrap(), expected);
            let vm = catalog.find_vm("web-1").await.unwrap();
            assert_eq!((vm.points, vm.latest.as_ref()), (3, expected.last()));
            assert_eq!(catalog.find(VM, "latest").await.unwrap(), expected[2]);
            let second = expected[1].cut_at.to_string();
            assert_eq!(catalog.find(VM, &second).await.unwrap().cut_at, expected[1].cut_at);
            assert!(matches!(catalog.find_vm("other").await, Err(CatalogError::NoVm { .. })));
        }
    };
    reopened(Some(0)).await;
    fs::remove_dir_all(&folder).unwrap();
    reopened(Some(3)).await;
    for garbage in [&b""[..], b"garbage", &[0xff; 70_000]] {
        for file in all_files(&folder) {
            fs::write(file, garbage).unwrap();
        }
        reopened(None).await;
    }
    fs::remove_dir_all(&folder).unwrap();
    fs::write(&folder, "a file where the folder should be").unwrap();
    reopened(None).await;
    // Every so often a byte of the database itself.
    for at in (0..4000).step_by(97) {
        for file in all_files(&folder) {
            let mut bytes = fs::read(&file).unwrap();
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 0x55;
                fs::write(&file, bytes).unwrap();
            }
        }
        reopened(None).await;
    }
}

#[test]
fn an_index_holds_what_it_was_given_and_forgets_what_is_no_longer_true() {
    let root = tempfile::tempdir().unwrap();
    let index = index(&root.path().join("index"));
    assert_eq!(index.find(VM, Ask::Newest), None, "nothing is claimed before it was compared with the truth");
    assert_eq!(index.points(None), None, "nothing is claimed before it was compared with the truth");
    let (one, two, three) = (point(1, [1, 1], 1), point(2, [2, 2], 2), point(3, [3, 3], 3));
    assert_eq!(index.reconcile(&[one.clone(), two.clone()]), 2);
    index.put(&three);
    assert_eq!(index.points(Some(VM)).unwrap(), [one.clone(), two.clone(), three.clone()]);
    assert_eq!(index.points(Some(VmId::from_bytes([0; 16]))).unwrap(), []);
    drop(index);
    let index = self::index(&root.path().join("index"));
    let mut changed = two.clone();
    changed.state = PointState::Damaged("gone".into());
    assert_eq!(index.reconcile(&[changed.clone(), three.clone()]), 2);
    assert_eq!(index.points(None).unwrap(), [changed.clone(), three.clone()]);
    // The clock went back: what was cut last is not the newest.
    let four = point(4, [4, 4], 2);
    index.put(&four);
    let find = |ask| index.find(VM, ask).unwrap();
    assert_eq!(find(Ask::Newest), Some(four.clone()));
    assert_eq!(find(Ask::AtOrBefore(UnixMs(9))), Some(three.clone()));
    assert_eq!(find(Ask::AtOrBefore(UnixMs(2))), Some(four));
    assert_eq!(find(Ask::AtOrBefore(UnixMs(1))), None);
    assert_eq!(find(Ask::WholeBefore(three.seq)), None, "the one before it is damaged");
    index.forget(VM, &[Seq(3), Seq(4)]);
    assert_eq!(index.find(VM, Ask::AtOrBefore(UnixMs(9))).unwrap(), Some(changed));
}

/// Whoever has lost a site means a state in which the VM ran.
#[tokio::test]
async fn a_seed_is_gone_back_to_only_if_it_is_named() {
    let mut points = vec![point(1, [1, 1], NOW.0 - 3000), point(2, [2, 2], NOW.0 - 2000)];
    points[1].seed = true;
    let refused = found(&points, "latest").await.unwrap_err().to_string();
    assert!(refused.contains("is a seed") && refused.contains(&points[0].point.to_string()), "{refused}");
    assert_eq!(found(&points, "0s ago").await.unwrap(), 1);
    assert_eq!(found(&points, "0202").await.unwrap(), 2);
    points.remove(0);
    assert!(found(&points, "latest").await.unwrap_err().to_string().contains("no other"));
    assert!(matches!(found(&points, "0s ago").await, Err(CatalogError::TooEarly { .. })));
    points.push(point(3, [3, 3], NOW.0 - 1000));
    assert_eq!(found(&points, "latest").await.unwrap(), 3);
}
