//! Folding and pruning where pages are made of several frames: changed words, and references to RAM.

use super::*;
use crate::restore::tests::made::{self, DISK, Pages, RAM, cut, history, images, page};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Words over words, references to RAM that has changed since, images that begin anew; folds of any point over any
    /// below it, points on top of folds, and points taken away: what is left reads as the model says.
    #[test]
    fn changed_words_and_references_read_the_same_after_any_folds_and_prunes(
        history in history(),
        moves in prop::collection::vec((any::<u16>(), any::<u16>(), any::<bool>()), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let sim = SimDisk::new(0);
            let (store, _) = open_sized(disk(&sim), 9000).await.unwrap();
            let (mut now, mut expected) = (Pages::new(), BTreeMap::new());
            let mut moves = moves.into_iter();
            for (no, point) in (0u64..).zip(history) {
                let full = (point.full.0 || no == 0, point.full.1 || no == 0);
                let ram = point.ram;
                let (frames, after) = cut(&now, &made::Point { full, ..point });
                let seq = made::send(&store, no, frames, images(full, ram)).await.unwrap();
                now = after;
                expected.insert(seq, (ram, now.clone()));
                // Some in between, so that points are made on top of folds.
                if let Some((which, onto, prune)) = moves.next() {
                    disturb(&store, which, onto, prune).await;
                }
            }
            for (which, onto, prune) in moves {
                disturb(&store, which, onto, prune).await;
            }
            assert_pages(&store, &expected).await;
            let (store, report) = open_sized(disk(&sim.restart()), 9000).await.unwrap();
            assert_eq!(report.findings, vec![]);
            assert_pages(&store, &expected).await;
            assert!(verify(&disk(&sim.restart()), None, |_| ()).await.unwrap().is_clean());
        });
    }
}

async fn disturb(store: &Store, which: u16, onto: u16, prune: bool) {
    let journal = store.journal(VM).await;
    let point = &journal.points[usize::from(which) % journal.points.len()];
    if prune {
        store.prune(VM, &[point.seq]).await.unwrap();
    } else {
        fold_somewhere(store, point.seq, usize::from(onto)).await;
        store.sweep(VM, 100).await.unwrap();
    }
}

async fn assert_pages(store: &Store, expected: &BTreeMap<Seq, (u64, Pages)>) {
    for point in store.points(Some(VM)).await.unwrap() {
        let plan = Arc::new(Plan::of(store, VM, point.seq).await.unwrap());
        let reader = Reader::new(store.objects().clone(), plan);
        let (ram, pages) = &expected[&point.seq];
        for (image, kind, name, count) in
            [(RAM, ImageKind::Ram, "pc.ram", *ram), (DISK, ImageKind::Disk, "vda", made::PAGES)]
        {
            let found = reader.read_whole(kind, name, 1 << 30).await.unwrap();
            let right: Vec<u8> = (0..count).flat_map(|no| page(pages, image, no)).collect();
            assert!(found == right, "point {}, {name}", point.seq);
        }
    }
}
