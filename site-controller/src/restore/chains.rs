//! `lifeboat verify`, of pages that are put together: made again, for every point, and compared with their checks.
//! Promises: each frame of words and of references is applied to what the frames below it make, once, and what comes out
//! is compared; nothing is changed; memory grows with the pages whose base is not yet reached, and one batch. Walks from
//! the newest point to the oldest, along each one's layers. What can't be read breaks the chains through it without a
//! word: `verify` reports that itself. Words over a reference, which no agent makes, are compared when they are restored
//! only.
//! Called by `verify`.

use super::{
    made::{BATCH_PAGES, BATCH_STEPS, Batch, Step, reach_from},
    plan::images_of,
    planned::PlannedFrame,
};
use crate::store::{Folds, Layer, Objects, StoreError, read_index_at, read_layer};
use lifeboat::{
    format::{
        frame::{self, Codec, FrameHead},
        manifest::{ImageKind, Manifest},
        refs::RefView,
    },
    id::{PackId, VmId},
    page::pages_for,
    units::Seq,
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

/// Pages of a point's images that don't become what they were when it was cut.
#[derive(Debug, Default)]
pub struct WrongPages {
    /// Numbers of the images.
    pub images: BTreeSet<u16>,
    pub pages: u64,
    /// The pack's path, and what is to be said of it.
    pub first: Option<(String, String)>,
}

/// Makes every page of `vm` again that is put together; `seqs` are its points.
pub async fn check(
    objects: &Arc<dyn Objects>,
    vm: VmId,
    seqs: impl DoubleEndedIterator<Item = Seq>,
    folds: &Folds,
) -> Result<BTreeMap<Seq, WrongPages>, StoreError> {
    let mut walk = Walk::new(objects);
    for seq in seqs.rev() {
        walk.open = walk.waiting.remove(&seq).unwrap_or_default();
        // Where it can't be read, what lies below is not known: nothing that rests on it can be made.
        if let Some(layer) = found(read_layer(objects.as_ref(), vm, seq, folds.get(&seq).copied()).await)?
            && walk.layer(&layer).await?
        {
            walk.hand_down(&layer);
        }
        walk.make(false).await?;
    }
    walk.make(true).await?;
    Ok(walk.wrong)
}

struct Walk<'a> {
    objects: &'a Arc<dyn Objects>,
    names: HashMap<(ImageKind, String), u32>,
    /// Of the layer being walked through.
    open: Open,
    /// What goes on at an older layer.
    waiting: BTreeMap<Seq, Open>,
    /// Those whose base was reached.
    closed: Vec<Vec<Link>>,
    links: usize,
    wrong: BTreeMap<Seq, WrongPages>,
}

/// Pages with a frame that leans on what is below, by image and page: for each newer layer that rests on this one, the
/// newest frame first.
type Open = BTreeMap<(u32, u64), Vec<Vec<Link>>>;

#[derive(Clone)]
struct Link {
    frame: Arc<Frame>,
    raw_page: u32,
}

struct Frame {
    /// Counted from the newest to the oldest.
    order: (Reverse<Seq>, bool, Reverse<u32>),
    pack: PackId,
    path: Arc<str>,
    body_offset: u64,
    head: FrameHead,
}

impl<'a> Walk<'a> {
    fn new(objects: &'a Arc<dyn Objects>) -> Self {
        Self {
            objects,
            names: HashMap::new(),
            open: Open::new(),
            waiting: BTreeMap::new(),
            closed: Vec::new(),
            links: 0,
            wrong: BTreeMap::new(),
        }
    }

    /// Follows chains through one layer; `false` if it can't be read.
    async fn layer(&mut self, layer: &Layer) -> Result<bool, StoreError> {
        let manifest = &layer.manifest;
        self.shrink(manifest);
        let ram: BTreeSet<u16> = images_of(manifest, ImageKind::Ram).map(|image| image.no).collect();
        let mut frames = Vec::new();
        for pack in &manifest.packs {
            let path: Arc<str> = layer.pack_path(pack.id).into();
            let Some(entries) = found(read_index_at(self.objects.as_ref(), &path, pack).await)? else {
                return Ok(false);
            };
            frames.extend(entries.into_iter().map(|entry| Frame {
                order: (Reverse(manifest.seq), ram.contains(&entry.head.image), Reverse(entry.head.seq)),
                pack: pack.id,
                path: path.clone(),
                body_offset: entry.body_offset(),
                head: entry.head,
            }));
        }
        // As a restore does: newest first, RAM last, because references of the same point lead there.
        frames.sort_unstable_by_key(|frame| frame.order);
        for frame in frames {
            let image = manifest.meta.images.iter().find(|image| image.no == frame.head.image);
            let Some(image) = image else { continue };
            let key = self.key(image.kind, &image.name);
            let frame = Arc::new(frame);
            if frame.head.codec == Codec::Refs {
                self.refs(manifest, key, &frame).await?;
            } else {
                self.pages(key, &frame);
            }
        }
        for image in manifest.meta.images.iter().filter(|image| image.full) {
            let key = self.key(image.kind, &image.name);
            self.close(key, 0);
        }
        Ok(true)
    }

    /// What is still open goes on at the layer below; without one it rests on zeros.
    fn hand_down(&mut self, layer: &Layer) {
        let open = std::mem::take(&mut self.open);
        match &layer.base {
            Some(base) => {
                let below = self.waiting.entry(base.seq).or_default();
                open.into_iter().for_each(|(page, chains)| below.entry(page).or_default().extend(chains));
            }
            None => open.into_values().flatten().for_each(|links| self.closed_one(links)),
        }
    }

    fn closed_one(&mut self, links: Vec<Link>) {
        self.links += links.len();
        self.closed.push(links);
    }

    fn key(&mut self, kind: ImageKind, name: &str) -> u32 {
        let next = self.names.len() as u32;
        *self.names.entry((kind, name.to_owned())).or_insert(next)
    }

    /// What lies beyond an image's size in this point is zero to newer ones.
    fn shrink(&mut self, manifest: &Manifest) {
        for image in &manifest.meta.images {
            let key = self.key(image.kind, &image.name);
            self.close(key, pages_for(image.bytes));
        }
    }

    /// Chains of an image from page `first` on have reached what they rest on.
    fn close(&mut self, image: u32, first: u64) {
        let pages: Vec<u64> =
            self.open.range((image, first)..=(image, u64::MAX)).map(|((_, page), _)| *page).collect();
        for page in pages {
            self.close_one(image, page, None);
        }
    }

    fn close_one(&mut self, image: u32, page: u64, base: Option<Link>) {
        for mut links in self.open.remove(&(image, page)).unwrap_or_default() {
            links.extend(base.clone());
            self.closed_one(links);
        }
    }

    /// One more frame that leans on what is below.
    fn lean(&mut self, image: u32, page: u64, link: Link) {
        let chains = self.open.entry((image, page)).or_default();
        if chains.is_empty() {
            chains.push(Vec::new());
        }
        chains.iter_mut().for_each(|links| links.push(link.clone()));
    }

    fn pages(&mut self, image: u32, frame: &Arc<Frame>) {
        let mut raw_page = 0u32;
        for run in &frame.head.runs {
            let end = run.end().unwrap_or(run.first);
            let link = |page: u64| Link {
                frame: frame.clone(),
                raw_page: raw_page.wrapping_add((page - run.first) as u32),
            };
            if frame.head.codec == Codec::Words {
                for page in run.first..end {
                    self.lean(image, page, link(page));
                }
            } else {
                let hit: Vec<u64> =
                    self.open.range((image, run.first)..(image, end)).map(|((_, page), _)| *page).collect();
                let base = |page| (frame.head.codec != Codec::Zero).then(|| link(page));
                for page in hit {
                    self.close_one(image, page, base(page));
                }
            }
            raw_page = raw_page.wrapping_add(run.count);
        }
    }

    /// A reference checks what RAM makes of its page at this point: a link in that page's chain.
    async fn refs(&mut self, manifest: &Manifest, image: u32, frame: &Arc<Frame>) -> Result<(), StoreError> {
        for page in frame.head.runs.iter().flat_map(|run| run.first..run.end().unwrap_or(run.first)) {
            self.open.remove(&(image, page));
        }
        let start = frame.body_offset;
        let range = start..start + u64::from(frame.head.body_len);
        let Some(body) = found(self.objects.get_range(&frame.path, range).await)? else { return Ok(()) };
        let mut raw = Vec::new();
        let opened = frame::open(&frame.head, &body, &mut raw);
        let Ok(view) = opened.and_then(|()| RefView::of(frame.head.pages() as usize, &raw)) else {
            return Ok(());
        };
        for (raw_page, to) in (0u32..).zip(view.iter()) {
            let source = manifest.meta.images.iter().find(|image| image.no == to.image);
            match source.filter(|source| source.kind == ImageKind::Ram && to.page < pages_for(source.bytes)) {
                Some(source) => {
                    let key = self.key(source.kind, &source.name);
                    let link = Link { frame: frame.clone(), raw_page };
                    self.lean(key, to.page, link);
                }
                None => self.note(frame, || {
                    format!("refers to page {} of image {}, which is not there", to.page, to.image)
                }),
            }
        }
        Ok(())
    }

    fn note(&mut self, frame: &Frame, what: impl FnOnce() -> String) {
        let wrong = self.wrong.entry(frame.order.0.0).or_default();
        wrong.images.insert(frame.head.image);
        wrong.pages += 1;
        wrong.first.get_or_insert_with(|| {
            (frame.path.to_string(), format!("the frame at byte {} {}", frame.body_offset, what()))
        });
    }

    /// Makes the pages of closed chains, when there are enough of them, or `all`.
    async fn make(&mut self, all: bool) -> Result<(), StoreError> {
        while !self.closed.is_empty()
            && (all || self.closed.len() >= BATCH_PAGES || self.links >= BATCH_STEPS)
        {
            let (mut pages, mut links) = (0, 0);
            while pages < self.closed.len().min(BATCH_PAGES) && links < BATCH_STEPS {
                links += self.closed[pages].len();
                pages += 1;
            }
            self.links -= links;
            let chains: Vec<_> = self.closed.drain(..pages).collect();
            self.make_some(&chains).await?;
        }
        Ok(())
    }

    async fn make_some(&mut self, chains: &[Vec<Link>]) -> Result<(), StoreError> {
        let mut frames: Vec<Arc<Frame>> = chains.iter().flatten().map(|link| link.frame.clone()).collect();
        frames.sort_unstable_by_key(|frame| frame.order);
        frames.dedup_by_key(|frame| frame.order);
        let number: HashMap<_, u32> = (0..).zip(&frames).map(|(no, frame)| (frame.order, no)).collect();
        let mut packs: Vec<(PackId, Arc<str>)> =
            frames.iter().map(|frame| (frame.pack, frame.path.clone())).collect();
        packs.sort_unstable();
        packs.dedup();
        let planned: Vec<PlannedFrame> = frames
            .iter()
            .map(|frame| PlannedFrame {
                pack: packs.partition_point(|(pack, _)| *pack < frame.pack) as u32,
                body_offset: frame.body_offset,
                head: frame.head.clone(),
            })
            .collect();
        // A chain's number stands for its page: one page may have several chains.
        let mut steps: Vec<Step> = (0..)
            .zip(chains)
            .flat_map(|(page, links)| links.iter().map(move |link| (page, link)))
            .map(|(page, link)| Step { page, frame: number[&link.frame.order], raw_page: link.raw_page })
            .collect();
        let mut batch = Batch::of(&steps);
        let frames: Arc<[Arc<Frame>]> = frames.into();
        let frames_noted = frames.clone();
        steps.sort_unstable_by_key(|step| (Reverse(step.frame), step.raw_page));
        let (mut next, mut lost) = (0, BTreeSet::new());
        while let Some(reach) = reach_from(&planned, &steps, next) {
            next = reach.steps.end;
            let path = packs[reach.pack as usize].1.clone();
            let bytes = found(self.objects.get_range(&path, reach.bytes.clone()).await)?;
            let (frames, taken) = (frames.clone(), steps[reach.steps].to_vec());
            let taking = tokio::task::spawn_blocking(move || {
                let mut bad = Vec::new();
                for steps in taken.chunk_by(|a, b| a.frame == b.frame) {
                    let frame = &frames[steps[0].frame as usize];
                    let from = (frame.body_offset - reach.bytes.start) as usize;
                    let body = bytes.as_ref().map(|bytes| &bytes[from..from + frame.head.body_len as usize]);
                    let mut raw = Vec::new();
                    let opened = body.is_some_and(|body| frame::open(&frame.head, body, &mut raw).is_ok());
                    let wrong = |page| bad.push((steps[0].frame, page));
                    if !opened || batch.take(&frame.head, &raw, steps, wrong).is_err() {
                        bad.extend(steps.iter().map(|step| (UNREADABLE, step.page)));
                    }
                }
                (batch, bad)
            });
            let (taken, bad) = taking.await.map_err(|error| StoreError::disk(&path, "verifying", error))?;
            batch = taken;
            for (frame, page) in bad {
                // One wrong page makes all that lie over it wrong: the first is told.
                if lost.insert(page) && frame != UNREADABLE {
                    let what = "does not make what the page was when the point was cut";
                    self.note(&frames_noted[frame as usize], || what.into());
                }
            }
        }
        Ok(())
    }
}

/// A frame that `verify` reports itself.
const UNREADABLE: u32 = u32::MAX;

/// What was read; `None` where it is damaged or missing, an error where reading itself failed.
fn found<T>(read: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}
