//! A small guest as the store sees it, for the tests of this crate: images that change, and what each point must restore.

use crate::{
    restore::{Plan, Reader, RestoreError},
    store::{
        Appended, Committed, MemoryIndex, Objects, PointError, RandomIds, ReopenReport, Store, StoreError,
        StoreOptions, SummaryIndex,
    },
};
use lifeboat::{
    clock::ManualClock,
    format::{
        frame::Frame,
        manifest::{Consistency, Image, ImageKind, PointMeta, PointStats},
    },
    id::{PointId, VmId},
    page::{Content, PAGE, PageGroup, PageRun},
    units::{ByteSize, Generation, Seq, UnixMs},
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::sync::Arc;

pub const VM: VmId = VmId::from_bytes([0xab; 16]);

pub async fn open(objects: Arc<dyn Objects>) -> Result<(Store, ReopenReport), StoreError> {
    open_sized(objects, 48 << 10).await
}

/// Opens with small packs, so that points have several.
pub async fn open_sized(objects: Arc<dyn Objects>, pack: u64) -> Result<(Store, ReopenReport), StoreError> {
    open_with(objects, pack, Arc::new(MemoryIndex::default())).await
}

pub async fn open_with(
    objects: Arc<dyn Objects>,
    pack: u64,
    index: Arc<dyn SummaryIndex>,
) -> Result<(Store, ReopenReport), StoreError> {
    let clock = Arc::new(ManualClock::at(UnixMs(1_700_000_000_000)));
    let ids = Arc::new(RandomIds);
    let options = StoreOptions { pack_size: ByteSize(pack) };
    Store::open(objects, clock, ids, index, options).await
}

/// A guest with one RAM block, one disk and one blob.
#[derive(Clone)]
pub struct Guest {
    pub rng: StdRng,
    pub vm: VmId,
    pub images: Vec<(Image, Vec<u8>)>,
    points: u64,
}

/// A point as an agent would send it.
#[derive(Clone)]
pub struct Cut {
    pub point: PointId,
    pub parent: Option<PointId>,
    pub meta: PointMeta,
    pub frames: Vec<Frame>,
    /// What restoring it must give, by image.
    pub content: Vec<(ImageKind, String, Vec<u8>)>,
}

impl Guest {
    pub fn new(seed: u64) -> Self {
        let image = |no: u16, kind, name: &str, bytes: u64| {
            (Image { no, kind, name: name.into(), bytes, full: true }, vec![0; bytes as usize])
        };
        let images = vec![
            image(7, ImageKind::Ram, "pc.ram", 40 * PAGE as u64),
            image(2, ImageKind::Disk, "vda", 33 * PAGE as u64 + 512),
            image(3, ImageKind::Blob, "domain.xml", 700),
        ];
        Self { rng: StdRng::seed_from_u64(seed), vm: VM, images, points: seed << 16 }
    }

    /// Changes some pages and cuts a point of it: in full without a parent, otherwise over it.
    pub fn cut(&mut self, parent: Option<PointId>) -> Cut {
        self.points += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.points.to_be_bytes());
        let (mut frames, mut metas) = (Vec::new(), Vec::new());
        for at in 0..self.images.len() {
            let full = parent.is_none() || self.images[at].0.kind == ImageKind::Blob;
            self.images[at].0.full = full;
            metas.push(self.images[at].0.clone());
            self.send(at, full, &mut frames);
        }
        frames.shuffle(&mut self.rng);
        let stats = PointStats { pause_us: 1500, memory_changed_bytes: 4096, disk_changed_bytes: 8192 };
        let cut_at = UnixMs(1_699_999_999_000 + (self.points & 0xffff) * 1000);
        let meta = PointMeta {
            cut_at,
            images: metas,
            consistency: Consistency::Memory,
            was_running: true,
            stats,
            cut: None,
        };
        let content =
            self.images.iter().map(|(image, bytes)| (image.kind, image.name.clone(), bytes.clone()));
        Cut { point: PointId::from_bytes(id), parent, meta, frames, content: content.collect() }
    }

    fn send(&mut self, at: usize, full: bool, frames: &mut Vec<Frame>) {
        let (image, bytes) = &mut self.images[at];
        let pages = bytes.len().div_ceil(PAGE) as u64;
        let mut changed: Vec<u64> = (0..pages).filter(|_| full || self.rng.random_bool(0.2)).collect();
        // Some pages twice: what comes later counts.
        for round in 0..2 {
            for group in changed.chunks(5) {
                let zero = self.rng.random_bool(0.2);
                let (mut runs, mut raw) = (Vec::new(), Vec::new());
                for page in group.iter().copied() {
                    let mut content = vec![0u8; PAGE];
                    if !zero {
                        let half = self.rng.random_range(0..PAGE);
                        self.rng.fill(&mut content[..half]);
                    }
                    let from = page as usize * PAGE;
                    let len = PAGE.min(bytes.len() - from);
                    bytes[from..from + len].copy_from_slice(&content[..len]);
                    PageRun::push_page(&mut runs, page);
                    raw.extend_from_slice(&content);
                }
                let content = if zero { Content::Zero } else { Content::Bytes(raw.into()) };
                let group = PageGroup { image: image.no, runs, content };
                frames.push(Frame::seal(frames.len() as u32, &group, 1).unwrap());
            }
            if round == 0 {
                changed.retain(|_| self.rng.random_bool(0.3));
            }
        }
    }
}

/// Sends a cut, some frames twice, and commits it.
pub async fn commit(store: &Store, guest: &Guest, cut: &Cut) -> Result<Committed, PointError> {
    let generation = store.generation(guest.vm).await;
    commit_as(store, guest, cut, generation).await
}

pub async fn commit_as(
    store: &Store,
    guest: &Guest,
    cut: &Cut,
    generation: Generation,
) -> Result<Committed, PointError> {
    let open = store.open_point(guest.vm, "web-1", generation, cut.point, cut.parent).await?;
    let done = async {
        for (at, frame) in cut.frames.iter().enumerate() {
            assert_eq!(open.append(frame.clone()).await?, Appended::Stored);
            if at % 5 == 0 {
                assert_eq!(open.append(frame.clone()).await?, Appended::Repeat);
            }
        }
        open.commit(cut.meta.clone(), cut.frames.len() as u32).await
    }
    .await;
    if done.is_err() {
        open.abort().await;
    }
    done
}

/// Restores every image of a point.
pub async fn restore(
    objects: &Arc<dyn Objects>,
    vm: VmId,
    seq: Seq,
) -> Result<Vec<(ImageKind, String, Vec<u8>)>, RestoreError> {
    let plan = Arc::new(Plan::load(objects.as_ref(), vm, seq).await?);
    let reader = Reader::new(objects.clone(), plan.clone());
    let mut found = Vec::new();
    for planned in plan.images() {
        let image = &planned.image;
        let bytes = reader.read_whole(image.kind, &image.name, 1 << 30).await?;
        found.push((image.kind, image.name.clone(), bytes));
    }
    Ok(found)
}
