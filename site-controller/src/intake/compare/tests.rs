//! What an agent is told of the site's copy: exactly what a restore would give, or nothing.

use super::*;
use crate::store::{
    LocalObjects, Objects,
    testing::{Cut, Guest, VM, commit, open_sized},
};
use lifeboat::{
    chunk::fingerprint::{Fingerprint, REGION_PAGES},
    format::frame::Frame,
    page::{Content, PAGE, PageGroup, PageRun},
    units::ByteSize,
    wire::compare::{FINGERPRINTS_MAX, Fingerprints},
};
use tokio::sync::mpsc;

struct Rig {
    root: tempfile::TempDir,
    store: Store,
    comparisons: Arc<Comparisons>,
}

impl Rig {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let objects = LocalObjects::open(&root.path().join("store"), ByteSize(0)).await.unwrap();
        let objects: Arc<dyn Objects> = Arc::new(objects);
        let (store, _) = open_sized(objects, 1 << 20).await.unwrap();
        let comparisons = Comparisons::new(store.clone(), root.path().to_path_buf());
        Self { root, store, comparisons }
    }

    async fn ask(&self, question: Question) -> Reply {
        let (replies, mut answers) = mpsc::channel(8);
        self.comparisons.ask(VM, question.clone(), &replies).await;
        loop {
            match answers.recv().await {
                Some(SiteMessage::Compared { vm, answer }) => {
                    assert_eq!((vm, answer.no), (VM, question.no));
                    if !matches!(answer.reply, Reply::Reading { .. }) {
                        return answer.reply;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn told(&self, question: &Question) -> Fingerprints {
        match self.ask(question.clone()).await {
            Reply::Fingerprints(told) => told,
            other => panic!("{other:?}"),
        }
    }

    async fn refused(&self, question: Question) -> String {
        match self.ask(question).await {
            Reply::Refused { why } => why,
            other => panic!("{other:?}"),
        }
    }
}

fn question(cut: &Cut, image: &str, level: Level, first: u64, count: u32) -> Question {
    let kind = if image == "vda" { ImageKind::Disk } else { ImageKind::Ram };
    Question { no: 9, point: cut.point, kind, image: image.into(), level, first, count }
}

#[tokio::test]
async fn fingerprints_are_those_of_the_image_as_it_would_be_restored() {
    let rig = Rig::new().await;
    let mut guest = Guest::new(5);
    let mut cut = guest.cut(None);
    for _ in 0..4 {
        commit(&rig.store, &guest, &cut).await.unwrap();
        for (image, content) in [("pc.ram", &cut.content[0].2), ("vda", &cut.content[1].2)] {
            let pages = question(&cut, image, Level::Pages, 3, 200);
            let told = rig.told(&pages).await;
            assert_eq!(told.image_bytes, content.len() as u64);
            let key = told.key;
            let expected: Vec<(u64, Fingerprint)> = (0..)
                .zip(content.chunks(PAGE).map(|page| key.page(page)))
                .filter(|(at, one)| *at >= 3 && *one != Fingerprint::ZERO)
                .collect();
            assert_eq!(told.read(&pages), Ok(expected));

            let mut table = [Fingerprint::ZERO; REGION_PAGES];
            table.iter_mut().zip(content.chunks(PAGE)).for_each(|(one, page)| *one = key.page(page));
            let regions = question(&cut, image, Level::Regions, 0, FINGERPRINTS_MAX);
            assert_eq!(rig.told(&regions).await.read(&regions), Ok(vec![(0, key.region(&table))]));
        }
        cut = guest.cut(Some(cut.point));
    }
}

#[tokio::test]
async fn a_sparse_disk_of_a_tebibyte_is_told_in_a_few_messages() {
    let rig = Rig::new().await;
    let mut guest = Guest::new(6);
    let vda = &mut guest.images[1];
    (vda.0.bytes, vda.1) = (1 << 40, Vec::new());
    let mut cut = guest.cut(None);
    let last = (1u64 << 40) / PAGE as u64 - 1;
    let places = [5, 256, 1 << 20, last];
    let runs: Vec<PageRun> = places.iter().map(|page| PageRun::new(*page, 1)).collect();
    let content = Content::Bytes(vec![7; places.len() * PAGE].into());
    let group = PageGroup { image: 2, runs, content };
    cut.frames.push(Frame::seal(cut.frames.len() as u32, &group, 1).unwrap());
    commit(&rig.store, &guest, &cut).await.unwrap();
    let (mut at, mut found, mut asked) = (0, Vec::new(), 0);
    while at < 1 << 20 {
        let question = question(&cut, "vda", Level::Regions, at, FINGERPRINTS_MAX);
        let told = rig.told(&question).await;
        at = told.end;
        found.extend(told.read(&question).unwrap().into_iter().map(|(region, _)| region));
        asked += 1;
    }
    assert_eq!(found, places.map(|page| page / REGION_PAGES as u64));
    assert!(asked <= 4, "{asked} questions");
}

#[tokio::test]
async fn a_damaged_copy_is_never_compared_with() {
    let rig = Rig::new().await;
    let mut guest = Guest::new(7);
    let cut = guest.cut(None);
    commit(&rig.store, &guest, &cut).await.unwrap();
    let mut folders = vec![rig.root.path().join("store")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.parent().unwrap().ends_with("packs") {
                let mut bytes = std::fs::read(&path).unwrap();
                let frames = bytes.len() * 2 / 3;
                bytes[..frames].iter_mut().step_by(1000).for_each(|byte| *byte ^= 1);
                std::fs::write(&path, bytes).unwrap();
            }
        }
    }
    let why = [
        rig.refused(question(&cut, "pc.ram", Level::Regions, 0, 1)).await,
        rig.refused(question(&cut, "vda", Level::Regions, 0, 1)).await,
    ];
    assert!(why.iter().all(|why| why.contains("damaged")), "{why:?}");
}

#[tokio::test]
async fn only_the_newest_point_its_images_and_sound_questions_are_answered() {
    let rig = Rig::new().await;
    let mut guest = Guest::new(8);
    let old = guest.cut(None);
    commit(&rig.store, &guest, &old).await.unwrap();
    let new = guest.cut(Some(old.point));
    rig.told(&question(&old, "vda", Level::Pages, 0, 1)).await;
    commit(&rig.store, &guest, &new).await.unwrap();
    rig.told(&question(&new, "vda", Level::Pages, u64::MAX - 1, 1)).await;
    for refused in [
        question(&old, "vda", Level::Pages, 0, 1),
        question(&new, "vdb", Level::Pages, 0, 1),
        question(&new, "vda", Level::Pages, 0, FINGERPRINTS_MAX + 1),
        question(&new, "vda", Level::Regions, u64::MAX, 1),
    ] {
        rig.refused(refused).await;
    }
    assert_eq!(std::fs::read_dir(rig.root.path()).unwrap().count(), 1, "a file has a name");
}
