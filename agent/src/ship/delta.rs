//! Less of each point: from changed pages to what must travel of them.
//! A page that the site holds unchanged is left out; one of which few words changed travels as those; a disk's page that
//! stands in the guest's RAM travels as a reference to it; everything else travels whole. Promises: over what the points
//! before made of the images, in the order in which loads come out, they make the very pages that went in; what is kept
//! for that is right for the point that the next one builds on ([`Deltas::begin`]), or forgotten; at most [`HOLD_MAX`]
//! bytes of disk pages wait here for the memory of their point. Engine independent. Called by the protection actor.
//!
//! A disk is handed over before memory, so that its view is closed early, but only once memory went by is it known what
//! RAM holds at the point: pages of disks wait until then.

use crate::ship::base_cache::{BaseCache, Change, Look, PageKey};
use bytes::{Bytes, BytesMut};
use lifeboat::{
    format::{
        frame::MADE_PAGES_MAX,
        manifest::{Image, ImageKind},
        refs::{PageRef, RefList},
        words::{WordList, WordsBuilder},
    },
    id::PointId,
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, pages_for},
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

/// What one frame is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    Pages(PageGroup),
    Words(WordList),
    Refs(RefList),
}

/// See the module. One per VM; hands over one point at a time.
pub struct Deltas {
    cache: Arc<BaseCache>,
    vm: u32,
    /// Points begun since the newest that is known to be durable, which comes first: with their serials, in order.
    lineage: VecDeque<(PointId, u64)>,
    serial: u64,
    /// What is known of images across points.
    known: HashMap<(ImageKind, String), KnownImage>,
    next_image: u32,
    /// Of the open point, by number.
    images: HashMap<u16, OpenImage>,
    /// Images of which pages went by before it was known what they are.
    strangers: HashSet<u16>,
    allowed: bool,
    /// The instant is past: what RAM holds when everything went by is what it holds at the point.
    cut: bool,
    whole: Vec<(u64, Bytes)>,
    words: WordsBuilder,
    refs: Vec<(u64, PageRef)>,
    /// Image and pages in `whole`, `words` and `refs`: each page once, so that their order does not matter.
    gathering: Option<u16>,
    gathered: Vec<u64>,
    /// Of those, the highest.
    highest: Option<u64>,
    held: VecDeque<PageGroup>,
    held_bytes: usize,
    out: VecDeque<Load>,
}

#[derive(Clone, Copy)]
struct KnownImage {
    id: u32,
    pages: u64,
    /// The point in which it last began anew.
    anew: u64,
}

#[derive(Clone, Copy)]
struct OpenImage {
    id: u32,
    kind: ImageKind,
    full: bool,
}

impl Deltas {
    pub fn new(cache: Arc<BaseCache>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            cache,
            vm: NEXT.fetch_add(1, Ordering::Relaxed),
            lineage: VecDeque::new(),
            serial: 0,
            known: HashMap::new(),
            next_image: 0,
            images: HashMap::new(),
            strangers: HashSet::new(),
            allowed: false,
            cut: false,
            whole: Vec::new(),
            words: WordsBuilder::default(),
            refs: Vec::new(),
            gathering: None,
            gathered: Vec::new(),
            highest: None,
            held: VecDeque::new(),
            held_bytes: 0,
            out: VecDeque::new(),
        }
    }

    /// A point begins over `basis`, which may itself not be durable yet. What later points carried was lost. `allowed`:
    /// whether the site reads anything but whole pages.
    pub fn begin(&mut self, point: PointId, basis: Option<PointId>, allowed: bool) {
        self.allowed = allowed && self.cache.is_on();
        self.cut = false;
        self.images.clear();
        self.strangers.clear();
        self.drop_pending();
        let known = basis.and_then(|basis| self.lineage.iter().position(|(point, _)| *point == basis));
        match known.filter(|_| self.allowed) {
            Some(at) => {
                if at + 1 < self.lineage.len() {
                    self.cache.forget_after(self.vm, self.lineage[at].1);
                    self.lineage.truncate(at + 1);
                }
            }
            None => {
                self.cache.forget_vm(self.vm);
                self.lineage.clear();
                self.known.clear();
            }
        }
        self.serial += 1;
        self.lineage.push_back((point, self.serial));
        // An agent that is never told of a durable point has none to go back to but its newest.
        if self.lineage.len() > LINEAGE_MAX {
            self.lineage.pop_front();
        }
    }

    /// `point` is durable: nothing before it is ever a basis again.
    pub fn durable(&mut self, point: PointId) {
        if let Some(at) = self.lineage.iter().position(|(of, _)| *of == point) {
            self.lineage.drain(..at);
        }
    }

    /// Whether the open point may hold anything but whole pages.
    pub fn in_use(&self) -> bool {
        self.allowed
    }

    /// What the open point's images are, as far as that is known before the instant.
    pub fn images(&mut self, images: &[Image]) {
        for image in images {
            self.image(image);
        }
    }

    /// What the open point's images are; at the instant.
    pub fn all_images(&mut self, images: &[Image]) {
        self.images(images);
        self.cut = true;
        let gone: Vec<(ImageKind, String)> = self
            .known
            .keys()
            .filter(|(kind, name)| !images.iter().any(|image| image.kind == *kind && image.name == *name))
            .cloned()
            .collect();
        for key in gone {
            if let Some(image) = self.known.remove(&key) {
                self.cache.forget(self.vm, image.id, 0, u64::MAX);
            }
        }
        for no in std::mem::take(&mut self.strangers) {
            if let Some(image) = self.images.get(&no) {
                self.cache.forget(self.vm, image.id, 0, u64::MAX);
            }
        }
    }

    fn image(&mut self, image: &Image) {
        if image.kind == ImageKind::Blob || !self.allowed {
            return;
        }
        let pages = pages_for(image.bytes);
        let next = self.next_image;
        let known = self.known.entry((image.kind, image.name.clone()));
        let known = known.or_insert(KnownImage { id: next, pages, anew: 0 });
        if known.id == next {
            self.next_image = next.wrapping_add(1);
        }
        if image.full && known.anew < self.serial {
            known.anew = self.serial;
            self.cache.forget_before(self.vm, known.id, self.serial);
        }
        if pages < known.pages {
            self.cache.forget(self.vm, known.id, pages, known.pages - pages);
        }
        known.pages = pages;
        let open = OpenImage { id: known.id, kind: image.kind, full: image.full };
        self.images.insert(image.no, open);
    }

    /// Takes changed pages. Then take what [`Self::ready`] gives.
    pub fn put(&mut self, group: PageGroup) {
        match self.images.get(&group.image).copied() {
            Some(image) if image.kind == ImageKind::Disk && self.has_memory() => {
                self.held_bytes += weight(&group);
                self.held.push_back(group);
                while self.held_bytes > HOLD_MAX {
                    // Not everything can wait; what memory will hold at the point is not known yet.
                    self.release(false);
                }
            }
            Some(image) => self.look_at(image, group, false),
            None => {
                if self.allowed {
                    self.strangers.insert(group.image);
                }
                self.gather_for(group.image);
                self.flush();
                self.out.push_back(Load::Pages(group));
            }
        }
    }

    /// What is ready to travel.
    pub fn ready(&mut self) -> Option<Load> {
        self.out.pop_front()
    }

    /// What is left to travel when no more pages come before the instant, or at all. `None` when nothing is left.
    pub fn finish_next(&mut self) -> Option<Load> {
        loop {
            if let Some(load) = self.out.pop_front() {
                return Some(load);
            }
            if self.held.is_empty() {
                self.flush();
                return self.out.pop_front();
            }
            self.release(self.cut);
        }
    }

    fn has_memory(&self) -> bool {
        self.images.values().any(|image| image.kind == ImageKind::Ram)
    }

    fn drop_pending(&mut self) {
        self.whole.clear();
        self.refs.clear();
        self.words = WordsBuilder::default();
        (self.gathering, self.held_bytes) = (None, 0);
        self.nothing_gathered();
        self.held.clear();
        self.out.clear();
    }

    /// Lets the longest waiting pages of a disk go.
    fn release(&mut self, memory_is_known: bool) {
        let Some(group) = self.held.pop_front() else { return };
        self.held_bytes = self.held_bytes.saturating_sub(weight(&group));
        if let Some(image) = self.images.get(&group.image).copied() {
            self.look_at(image, group, memory_is_known);
        }
    }

    fn look_at(&mut self, image: OpenImage, group: PageGroup, refer: bool) {
        self.gather_for(group.image);
        let Content::Bytes(raw) = group.content.clone() else {
            // Long runs of nothing: there may be words of these pages underway.
            self.flush();
            for run in &group.runs {
                self.cache.forget(self.vm, image.id, run.first, u64::from(run.count));
            }
            self.out.push_back(Load::Pages(group));
            return;
        };
        let pages: Vec<u64> = pages_of(&group.runs).collect();
        if self.any_gathered(&pages) {
            self.flush();
        }
        let (pages, raw) = if refer { self.refer(image, pages, raw) } else { (pages, raw) };
        let (vm, id) = (self.vm, image.id);
        let keys = pages.iter().map(|page| PageKey { vm, image: id, page: *page });
        let look = Look { serial: self.serial, admit: !image.full, find: image.kind == ImageKind::Ram };
        let mut changes = Vec::with_capacity(pages.len());
        self.cache.exchange(keys, &raw, look, |at, change| changes.push((at, change)));
        let untouched = self.whole.is_empty() && pages.len() as u64 == group.pages();
        if untouched && changes.iter().all(|(_, change)| *change == Change::Whole) {
            self.flush();
            self.out.push_back(Load::Pages(group));
            return;
        }
        for (at, change) in changes {
            let page = pages[at];
            match change {
                Change::None => continue,
                Change::Words(words) => {
                    if !self.words.fits(words.len()) {
                        self.flush_words();
                    }
                    self.words.push(page, words);
                }
                Change::Whole => {
                    self.whole.push((page, raw.slice(at * PAGE..(at + 1) * PAGE)));
                    if self.whole.len() == GROUP_PAGES {
                        self.flush_whole();
                    }
                }
            }
            self.note_gathered(page);
        }
        if self.words.len() >= WORDS_FULL {
            self.flush_words();
        }
    }

    /// Sends those pages as references that stand in RAM; returns the others.
    fn refer(&mut self, image: OpenImage, pages: Vec<u64>, raw: Bytes) -> (Vec<u64>, Bytes) {
        let ram: HashMap<u32, u16> = self
            .images
            .iter()
            .filter(|(_, image)| image.kind == ImageKind::Ram)
            .map(|(no, image)| (image.id, *no))
            .collect();
        let (mut left, mut left_raw) = (Vec::new(), BytesMut::new());
        for (page, raw) in pages.iter().zip(raw.chunks_exact(PAGE)) {
            let found = self.cache.find(self.vm, raw);
            match found.and_then(|(key, check)| Some((ram.get(&key.image)?, key.page, check))) {
                Some((source, at, check)) => {
                    self.cache.forget(self.vm, image.id, *page, 1);
                    if self.refs.len() == MADE_PAGES_MAX {
                        self.flush_refs();
                    }
                    self.refs.push((*page, PageRef { check, image: *source, page: at }));
                    self.note_gathered(*page);
                }
                None => {
                    left.push(*page);
                    left_raw.extend_from_slice(raw);
                }
            }
        }
        (left, left_raw.freeze())
    }

    /// What is being gathered is of one image at a time.
    fn gather_for(&mut self, image: u16) {
        if self.gathering != Some(image) {
            self.flush();
            self.gathering = Some(image);
        }
    }

    fn flush(&mut self) {
        self.flush_refs();
        self.flush_words();
        self.flush_whole();
        self.nothing_gathered();
    }

    fn note_gathered(&mut self, page: u64) {
        self.gathered.push(page);
        self.highest = self.highest.max(Some(page));
    }

    fn nothing_gathered(&mut self) {
        self.gathered.clear();
        self.highest = None;
    }

    /// Whether any of `pages` is gathered. Most come in ascending order, and nothing has to be looked up.
    fn any_gathered(&mut self, pages: &[u64]) -> bool {
        if pages.iter().all(|page| self.highest < Some(*page)) {
            return false;
        }
        self.gathered.sort_unstable();
        pages.iter().any(|page| self.gathered.binary_search(page).is_ok())
    }

    fn flush_refs(&mut self) {
        if let (Some(image), false) = (self.gathering, self.refs.is_empty()) {
            self.out.push_back(Load::Refs(RefList::of(image, std::mem::take(&mut self.refs))));
        }
    }

    fn flush_words(&mut self) {
        if let (Some(image), false) = (self.gathering, self.words.is_empty()) {
            self.out.push_back(Load::Words(self.words.finish(image)));
        }
    }

    fn flush_whole(&mut self) {
        let mut pages = std::mem::take(&mut self.whole);
        let Some(image) = self.gathering.filter(|_| !pages.is_empty()) else { return };
        pages.sort_unstable_by_key(|(page, _)| *page);
        let (mut runs, mut raw) = (Vec::new(), BytesMut::with_capacity(pages.len() * PAGE));
        for (page, bytes) in &pages {
            PageRun::push_page(&mut runs, *page);
            raw.extend_from_slice(bytes);
        }
        let content = Content::Bytes(raw.freeze());
        self.out.push_back(Load::Pages(PageGroup { image, runs, content }));
    }
}

fn pages_of(runs: &[PageRun]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count))
}

/// Bytes that a waiting group takes.
fn weight(group: &PageGroup) -> usize {
    let bytes = match &group.content {
        Content::Bytes(raw) => raw.len(),
        Content::Zero => 0,
    };
    bytes + (group.runs.len() + 4) * size_of::<PageRun>()
}

/// Bytes of a disk's pages that wait for the memory of their point.
const HOLD_MAX: usize = 32 << 20;
/// Bytes of words that are worth a frame of their own.
const WORDS_FULL: usize = 128 << 10;
/// Points that may be under way at once, and then some.
const LINEAGE_MAX: usize = 64;

#[cfg(test)]
mod tests;
