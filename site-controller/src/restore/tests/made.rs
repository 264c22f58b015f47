//! Pages made of several frames, over any history: what is read is what the guest held, or it is refused (I-6).

use super::*;
use crate::store::PointError;
use lifeboat::{
    chunk::digest::page_check,
    format::{
        refs::{PageRef, RefList},
        words::{PageWords, WordsBuilder},
    },
};
use std::collections::BTreeMap;

pub(crate) const RAM: u16 = 4;
pub(crate) const DISK: u16 = 9;
pub(crate) const PAGES: u64 = 20;

/// What a frame of one page does to it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Whole(u8),
    Zero,
    /// Words from this one on.
    Words(usize, u8),
    /// A disk's page is what this page of RAM is at the point.
    Ref(u64),
}

#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) full: (bool, bool),
    /// Pages of RAM.
    pub(crate) ram: u64,
    pub(crate) frames: Vec<(u16, u64, Kind)>,
}

pub(crate) fn history() -> impl Strategy<Value = Vec<Point>> {
    let kind = prop_oneof![
        2 => any::<u8>().prop_map(Kind::Whole),
        1 => Just(Kind::Zero),
        5 => (0usize..500, any::<u8>()).prop_map(|(from, fill)| Kind::Words(from, fill)),
        3 => (0..PAGES / 2).prop_map(Kind::Ref),
    ];
    let image = prop_oneof![Just(RAM), Just(DISK)];
    let frames = prop::collection::vec((image, 0..PAGES, kind), 0..25);
    let full = (prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    let point = (full, PAGES / 2..PAGES, frames).prop_map(|(full, ram, frames)| Point { full, ram, frames });
    prop::collection::vec(point, 1..9)
}

pub(crate) type Pages = BTreeMap<(u16, u64), Vec<u8>>;

pub(crate) fn page(pages: &Pages, image: u16, page: u64) -> Vec<u8> {
    pages.get(&(image, page)).cloned().unwrap_or_else(|| vec![0; PAGE])
}

/// The point's frames, sealed, and what its images hold then.
pub(crate) fn cut(before: &Pages, point: &Point) -> (Vec<Frame>, Pages) {
    let mut now = before.clone();
    now.retain(|(image, page), _| {
        (*image != RAM || (!point.full.0 && *page < point.ram)) && (*image != DISK || !point.full.1)
    });
    let mut frames = Vec::new();
    // References lead to RAM as all of the point's frames leave it, whatever their numbers.
    for pass in [RAM, DISK] {
        for (seq, (image, no, kind)) in (0..).zip(&point.frames) {
            if *image != pass {
                continue;
            }
            let no = if *image == RAM { no % point.ram } else { *no };
            let old = page(&now, *image, no);
            let runs = vec![PageRun::new(no, 1)];
            let whole = |content| {
                Frame::seal(seq, &PageGroup { image: *image, runs: runs.clone(), content }, 1).unwrap()
            };
            let (frame, new) = match *kind {
                Kind::Zero => (whole(Content::Zero), vec![0; PAGE]),
                Kind::Words(from, fill) => {
                    let mut new = old.clone();
                    new[from * 8..from * 8 + 96].fill(fill);
                    let mut words = WordsBuilder::default();
                    words.push(no, PageWords::between(&old, &new, 512).unwrap());
                    (Frame::seal_words(seq, &words.finish(*image), 1).unwrap(), new)
                }
                Kind::Ref(to) if *image == DISK => {
                    let new = page(&now, RAM, to);
                    let to = PageRef { check: page_check(&new), image: RAM, page: to };
                    (Frame::seal_refs(seq, &RefList::of(DISK, vec![(no, to)]), 1).unwrap(), new)
                }
                Kind::Whole(_) | Kind::Ref(_) => {
                    let fill = if let Kind::Whole(fill) = kind { *fill } else { 3 };
                    (whole(Content::Bytes(vec![fill; PAGE].into())), vec![fill; PAGE])
                }
            };
            frames.push(frame);
            now.insert((*image, no), new);
        }
    }
    (frames, now)
}

pub(crate) fn images(full: (bool, bool), ram: u64) -> Vec<Image> {
    let image = |no, kind, name: &str, pages: u64, full| Image {
        no,
        kind,
        name: name.into(),
        bytes: pages * PAGE as u64,
        full,
    };
    vec![
        image(RAM, ImageKind::Ram, "pc.ram", ram, full.0),
        image(DISK, ImageKind::Disk, "vda", PAGES, full.1),
    ]
}

pub(crate) async fn send(
    store: &Store,
    no: u64,
    frames: Vec<Frame>,
    images: Vec<Image>,
) -> Result<Seq, PointError> {
    let parent = store.latest(VM).await.map(|head| head.point);
    let point = PointId::from_bytes(u128::from(no + 1).to_be_bytes());
    let open = store.open_point(VM, "model", Generation::FIRST, point, parent).await.unwrap();
    let count = frames.len() as u32;
    for frame in frames {
        open.append(frame).await?;
    }
    let meta = PointMeta {
        cut_at: UnixMs(no),
        images,
        consistency: Consistency::Memory,
        cut: None,
        was_running: true,
        stats: PointStats::default(),
    };
    let committed = open.commit(meta, count).await;
    if committed.is_err() {
        open.abort().await;
    }
    Ok(committed?.seq)
}

async fn reader(objects: &Arc<dyn Objects>, seq: Seq) -> Reader {
    let plan = Plan::load(objects.as_ref(), VM, seq).await.unwrap();
    Reader::new(objects.clone(), Arc::new(plan))
}

/// What the newest `run` points say, planned as one layer that needs nothing of what is below.
async fn frozen(objects: &Arc<dyn Objects>, newest: Seq, run: u64) -> Reader {
    let run: Vec<Seq> = (0..run).map(|back| Seq(newest.0 - back)).collect();
    merge::Merge::load(objects.clone(), VM, &run, &Default::default()).await.unwrap().reader
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Words over words, references from old points to RAM that has changed since, images that begin anew, RAM that
    /// shrinks and grows: each point reads as the model says, whole and by single pages.
    #[test]
    fn pages_made_of_several_frames_read_as_a_naive_model_says(history in history(), some in 0..PAGES, run in 0usize..9) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let objects: Arc<dyn Objects> = Arc::new(crate::store::sim::SimDisk::new(0));
            let (store, _) = open_sized(objects.clone(), 9000).await.unwrap();
            let (mut now, mut expected) = (Pages::new(), Vec::new());
            for (no, point) in (0u64..).zip(&history) {
                let full = (point.full.0 || no == 0, point.full.1 || no == 0);
                let point = Point { full, ..point.clone() };
                let (frames, after) = cut(&now, &point);
                let seq = send(&store, no, frames, images(full, point.ram)).await.unwrap();
                now = after;
                expected.push((seq, point.ram, now.clone()));
            }
            let report = crate::verify::verify(&objects, None, |_| ()).await.unwrap();
            assert!(report.is_clean(), "{:?}", report.findings);
            let (newest, _, pages) = expected.last().cloned().unwrap();
            let run = (1 + run % history.len()) as u64;
            let of_run = &history[history.len() - run as usize..];
            let reader_of_run = frozen(&objects, newest, run).await;
            for (image, kind, name) in [(RAM, ImageKind::Ram, "pc.ram"), (DISK, ImageKind::Disk, "vda")] {
                let runs = reader_of_run.segments(kind, name).unwrap();
                let runs: Vec<Run> = futures_util::TryStreamExt::try_concat(runs).await.unwrap();
                let mut came = std::collections::BTreeSet::new();
                for read in runs {
                    for (no, raw) in (read.first_page..).zip(read.bytes.chunks(PAGE)) {
                        assert!(raw == page(&pages, image, no), "the last {run} points, {name}, page {no}");
                        came.insert(no);
                    }
                }
                let there = of_run.iter().map(|point| point.ram).min().unwrap_or_default();
                for (of, no, _) in of_run.iter().flat_map(|point| &point.frames) {
                    if *of == image && (image == DISK || *no < there) && !came.contains(no) {
                        assert!(page(&pages, image, *no) == [0; PAGE], "{name}, page {no} is left out");
                    }
                }
            }
            for (seq, ram, pages) in expected {
                let reader = reader(&objects, seq).await;
                for (image, kind, name, count) in
                    [(RAM, ImageKind::Ram, "pc.ram", ram), (DISK, ImageKind::Disk, "vda", PAGES)]
                {
                    let found = reader.read_whole(kind, name, 1 << 30).await.unwrap();
                    let right: Vec<u8> = (0..count).flat_map(|no| page(&pages, image, no)).collect();
                    assert!(found == right, "point {seq}, {name}");
                    let wanted = [PageRun::new(some / 2, 1), PageRun::new(some, 3)];
                    let mut left: Vec<u64> = (some..some + 3).chain([some / 2]).filter(|no| *no < count).collect();
                    let runs = reader.pages(kind, name, &wanted[usize::from(some < 2)..]).unwrap();
                    let runs: Vec<Run> = futures_util::TryStreamExt::try_concat(runs).await.unwrap();
                    for run in runs {
                        for (no, raw) in (run.first_page..).zip(run.bytes.chunks(PAGE)) {
                            assert!(raw == page(&pages, image, no), "point {seq}, {name}, page {no} alone");
                            left.retain(|wanted| *wanted != no);
                        }
                    }
                    if some >= 2 {
                        assert!(left.iter().all(|no| page(&pages, image, *no) == [0; PAGE]), "{left:?} are not zero");
                    }
                }
            }
        });
    }
}

/// Goal: I-6. Method: words whose check is of another page than they make, and a reference to a page that holds
/// something else: frames that are sound in themselves, as an agent with a wrong base would make them.
#[tokio::test]
async fn a_page_made_over_a_wrong_base_is_refused_and_an_older_point_still_works() {
    let objects: Arc<dyn Objects> = Arc::new(crate::store::sim::SimDisk::new(0));
    let (store, _) = open_sized(objects.clone(), 1 << 20).await.unwrap();
    let whole = |image, seq| {
        let content = Content::Bytes(vec![1; PAGE].into());
        Frame::seal(seq, &PageGroup { image, runs: vec![PageRun::new(3, 1)], content }, 1).unwrap()
    };
    send(&store, 0, vec![whole(RAM, 0), whole(DISK, 1)], images((true, true), PAGES)).await.unwrap();
    let mut words = WordsBuilder::default();
    words
        .push(3, PageWords::between(&[2; PAGE], &[[9; 8].as_slice(), &[2; PAGE - 8]].concat(), 512).unwrap());
    let wrong = Frame::seal_words(0, &words.finish(RAM), 1).unwrap();
    let to = PageRef { check: page_check(&[2; PAGE]), image: RAM, page: 4 };
    let astray = Frame::seal_refs(1, &RefList::of(DISK, vec![(3, to)]), 1).unwrap();
    send(&store, 1, vec![wrong, astray], images((false, false), PAGES)).await.unwrap();
    let latest = store.latest(VM).await.unwrap().seq;
    let broken = reader(&objects, latest).await;
    for (kind, name) in [(ImageKind::Ram, "pc.ram"), (ImageKind::Disk, "vda")] {
        let error = broken.read_whole(kind, name, 1 << 30).await.unwrap_err();
        assert!(matches!(error, RestoreError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("page 3 does not become"), "{error}");
    }
    let report = crate::verify::verify(&objects, None, |_| ()).await.unwrap();
    let [finding] = &report.findings[..] else { panic!("{:?}", report.findings) };
    assert!(finding.what.starts_with("2 pages that are put together here are wrong"), "{}", finding.what);
    assert_eq!(finding.affects.iter().map(|point| point.seq).collect::<Vec<_>>(), [latest]);
    let older = reader(&objects, Seq(latest.0 - 1)).await;
    assert_eq!(older.read_whole(ImageKind::Ram, "pc.ram", 1 << 30).await.unwrap()[3 * PAGE], 1);
}

#[tokio::test]
async fn references_to_anything_but_ram_of_the_point_are_refused_at_the_commit() {
    let objects: Arc<dyn Objects> = Arc::new(crate::store::sim::SimDisk::new(0));
    let (store, _) = open_sized(objects.clone(), 1 << 20).await.unwrap();
    for (no, (from, image, page)) in
        (0..).zip([(DISK, RAM, PAGES), (DISK, DISK, 0), (DISK, 77, 0), (RAM, RAM, 0)])
    {
        let to = PageRef { check: 0, image, page };
        let frame = Frame::seal_refs(0, &RefList::of(from, vec![(3, to)]), 1).unwrap();
        let sent = send(&store, no, vec![frame], images((true, true), PAGES)).await;
        assert!(matches!(sent, Err(PointError::Invalid(_))), "{from} to page {page} of {image}: {sent:?}");
    }
}
