//! Resync: an image of which the source knows nothing, sent as what differs from the site's.
//! A source says `full` of an image where it can't tell what changed since the site's newest point: after an agent, a QEMU
//! or a host was restarted. The point is then made over that newest point all the same: each region (1 MiB) as captured is
//! compared with the site's by fingerprints, those of the region first, those of its pages where they differ.
//! Promises: judged are the very bytes that were captured for this point, so it holds for the point's instant whatever
//! captured them and however often a page was captured anew; what can't be compared is sent. Memory: [`HELD_MAX`] of
//! pages, and 24 bytes for each region that the site holds, [`REGIONS_MAX`] of them. Pure: no socket, no clock.
//! Called by the actor in `vm`.

mod regions;
#[cfg(test)]
mod tests;

use bytes::{Bytes, BytesMut};
use lifeboat::{
    chunk::fingerprint::{Fingerprint, FingerprintKey, REGION_PAGES},
    format::{
        frame::RUNS_MAX,
        manifest::{Image, ImageKind, PointMeta},
    },
    id::{PointId, VmId},
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, pages_for},
    wire::{
        compare::{Answer, FINGERPRINTS_MAX, Fingerprints, Level, Question, Reply},
        message::AgentMessage,
    },
};
use regions::{Closed, Differs, PAGES, Regions, Site};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// One point being compared.
pub struct Resync {
    vm: VmId,
    basis: PointId,
    images: BTreeMap<u16, Compared>,
    /// Questions without an answer, by number; those in `untold` are still to be asked on this link.
    asked: BTreeMap<u32, (u16, Question)>,
    untold: BTreeSet<u32>,
    next_no: u32,
    ready: VecDeque<PageGroup>,
    tally: Tally,
    /// Groups of pages taken so far.
    clock: u64,
}

/// One image of the point.
enum Compared {
    /// Learning what the site holds.
    Asking(Asking),
    By(Box<Regions>),
    /// There is nothing to compare with: everything captured is handed on, and what is not captured is zero.
    Full,
}

struct Asking {
    image: Image,
    key: Option<FingerprintKey>,
    site_bytes: u64,
    regions: Vec<(u64, Fingerprint)>,
    /// Bytes of its copy that the site has read, and of how many; none while others' turn is.
    read: (u64, u64),
}

/// What was compared, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Captured, of memory and of disks.
    pub captured: [u64; 2],
    /// Handed on, of memory and of disks.
    pub handed_on: [u64; 2],
}

impl Resync {
    /// For a point over `basis` with these images; `None` if there is none that must be compared.
    pub fn begin(vm: VmId, basis: PointId, images: &[Image]) -> Option<Self> {
        let wanted = |image: &&Image| {
            image.full && image.kind != ImageKind::Blob && (1..=BYTES_MAX).contains(&image.bytes)
        };
        let mut made = Self {
            vm,
            basis,
            images: BTreeMap::new(),
            asked: BTreeMap::new(),
            untold: BTreeSet::new(),
            next_no: 0,
            ready: VecDeque::new(),
            tally: Tally::default(),
            clock: 0,
        };
        for image in images.iter().filter(wanted) {
            let image = image.clone();
            let no = image.no;
            let asking = Asking { image, key: None, site_bytes: 0, regions: Vec::new(), read: (0, 0) };
            made.images.insert(no, Compared::Asking(asking));
            made.ask(no, Level::Regions, 0, FINGERPRINTS_MAX);
        }
        (!made.images.is_empty()).then_some(made)
    }

    /// What is to be asked now. To be called again after an answer, and on a new link.
    pub fn questions(&mut self) -> Vec<AgentMessage> {
        let in_flight = self.asked.len() - self.untold.len();
        let now: Vec<u32> =
            self.untold.iter().take(IN_FLIGHT_MAX.saturating_sub(in_flight)).copied().collect();
        let ask = |no: u32| {
            self.untold.remove(&no);
            let (_, question) = self.asked.get(&no)?;
            Some(AgentMessage::Compare { vm: self.vm, question: question.clone() })
        };
        now.into_iter().filter_map(ask).collect()
    }

    /// The link is gone, and with it every answer that was on its way.
    pub fn link_down(&mut self) {
        self.untold.extend(self.asked.keys());
    }

    pub fn on_answer(&mut self, Answer { no, reply }: Answer) {
        if let Reply::Reading { done_bytes, total_bytes } = reply {
            let image = self.asked.get(&no).and_then(|(image, _)| self.images.get_mut(image));
            if let Some(Compared::Asking(asking)) = image {
                asking.read = (done_bytes, total_bytes);
            }
            return;
        }
        // Answers of an earlier link may come twice or too late.
        let Some((image, question)) = self.asked.remove(&no) else { return };
        self.untold.remove(&no);
        let reply = match reply {
            Reply::Fingerprints(told) => Ok(told),
            Reply::Refused { why } => Err(why),
            Reply::Reading { .. } => return,
        };
        match question.level {
            Level::Regions => self.on_regions(image, &question, reply),
            Level::Pages => self.on_pages(image, &question, reply),
        }
    }

    /// Whether it is known what the site holds of every image: only now may pages be handed in.
    pub fn is_prepared(&self) -> bool {
        !self.images.values().any(|image| matches!(image, Compared::Asking(_)))
    }

    /// Takes captured pages.
    pub fn put(&mut self, group: PageGroup) {
        let kind = match self.images.get(&group.image) {
            Some(Compared::By(regions)) => regions.image.kind,
            Some(Compared::Asking(_) | Compared::Full) | None => {
                self.ready.push_back(group);
                return;
            }
        };
        self.tally.captured[slot(kind)] += group.pages();
        match &group.content {
            Content::Zero => self.put_zeros(group.image, &group.runs),
            Content::Bytes(bytes) => self.put_pages(group.image, &group.runs, bytes),
        }
    }

    /// What is to be sent.
    pub fn pop(&mut self) -> Option<PageGroup> {
        self.ready.pop_front()
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether answers must come before more is taken.
    pub fn is_full(&self) -> bool {
        let held: usize = self.by().map(|(_, regions)| regions.held_bytes()).sum();
        held >= HELD_MAX && !self.asked.is_empty()
    }

    /// Judges what is captured so far, or asks about it: before the guest is paused, and at the end.
    pub fn close(&mut self) {
        self.close_down_to(0);
    }

    /// Everything was captured.
    pub fn finish(&mut self) {
        self.close();
        for no in self.images.keys().copied().collect::<Vec<_>>() {
            let left_over = self.regions(no).map(Regions::left_over).unwrap_or_default();
            self.hand_on(no, left_over);
        }
    }

    /// Whether nothing is waiting for an answer.
    pub fn is_quiet(&self) -> bool {
        self.asked.is_empty() && !self.by().any(|(_, regions)| regions.is_asking())
    }

    /// Images that were compared are told as what changed since the basis.
    pub fn amend(&self, meta: &mut PointMeta) {
        for (no, regions) in self.by() {
            if let Some(image) = meta.images.iter_mut().find(|image| image.no == no)
                && *image == regions.image
            {
                image.full = false;
            }
        }
    }

    /// Whether the point is still made of the images that are being compared.
    pub fn fits(&self, meta: &PointMeta) -> bool {
        self.by().all(|(_, regions)| meta.images.contains(&regions.image))
    }

    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Images that are compared, and those that go in full.
    pub fn counts(&self) -> (usize, usize) {
        let compared = self.by().count();
        (compared, self.images.len() - compared)
    }

    /// How far it is, in percent: half of the way is that the site reads its copies, half that pages are captured.
    pub fn percent(&self) -> u64 {
        let (mut done, mut total) = (0, 0);
        for image in self.images.values() {
            let (bytes, part) = match image {
                Compared::Asking(Asking { image, read: (read, of), .. }) => {
                    (image.bytes, share(image.bytes, *read, *of))
                }
                Compared::By(regions) => {
                    let (at, of) = regions.reached();
                    (
                        regions.image.bytes,
                        u128::from(regions.image.bytes) + share(regions.image.bytes, at, of),
                    )
                }
                Compared::Full => (0, 0),
            };
            done += part;
            total += 2 * u128::from(bytes);
        }
        u64::try_from((done * 100).checked_div(total).unwrap_or(0)).map_or(99, |percent| percent.min(99))
    }

    fn ask(&mut self, image: u16, level: Level, first: u64, count: u32) {
        let about = match self.images.get(&image) {
            Some(Compared::Asking(asking)) => &asking.image,
            Some(Compared::By(regions)) => &regions.image,
            Some(Compared::Full) | None => return,
        };
        let (no, point, kind, name) = (self.next_no, self.basis, about.kind, about.name.clone());
        self.next_no = self.next_no.wrapping_add(1);
        self.asked.insert(no, (image, Question { no, point, kind, image: name, level, first, count }));
        self.untold.insert(no);
    }

    fn on_regions(&mut self, no: u16, question: &Question, reply: Result<Fingerprints, String>) {
        let held: usize = self.images.values().map(Compared::region_count).sum();
        let Some(Compared::Asking(asking)) = self.images.get_mut(&no) else { return };
        match asking.take(question, reply, REGIONS_MAX.saturating_sub(held)) {
            Ok(Learnt::More { from }) => self.ask(no, Level::Regions, from, FINGERPRINTS_MAX),
            Ok(Learnt::All(site)) => {
                let regions = Regions::new(asking.image.clone(), site);
                self.images.insert(no, Compared::By(Box::new(regions)));
            }
            Err(why) => {
                tracing::info!(image = asking.image.name, why, "the image goes in full");
                self.images.insert(no, Compared::Full);
            }
        }
    }

    fn on_pages(&mut self, no: u16, question: &Question, reply: Result<Fingerprints, String>) {
        let Some(regions) = self.regions(no) else { return };
        // Another key: the site was restarted and has read its copy anew.
        let told =
            reply.ok().filter(|told| told.key == regions.key() && told.image_bytes == regions.site_bytes());
        let table = told.and_then(|told| told.read(question).ok()).map(|found| {
            let mut table = [Fingerprint::ZERO; REGION_PAGES];
            for (page, one) in found {
                table[(page - question.first) as usize] = one;
            }
            table
        });
        let differs = regions.told(question.first / PAGES, table.as_ref());
        self.hand_on(no, differs);
    }

    fn put_pages(&mut self, no: u16, runs: &[PageRun], bytes: &Bytes) {
        let mut on = Vec::new();
        let mut complete = Vec::new();
        self.clock += 1;
        let now = self.clock;
        let Some(regions) = self.regions(no) else { return };
        let pages = runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count));
        for (page, from) in pages.zip((0..).step_by(PAGE)) {
            let content = bytes.slice(from..from + PAGE);
            if regions.is_judged(page / PAGES) {
                on.push(Differs::Page(page, content));
            } else if regions.put(page, &content, now) {
                complete.push(page / PAGES);
            }
        }
        self.hand_on(no, on);
        complete.into_iter().for_each(|region| self.close_region(no, region));
        self.close_down_to(OPEN_MAX);
    }

    /// Closes the regions that were left alone for longest, until no more than `most` are open.
    fn close_down_to(&mut self, most: usize) {
        while self.by().map(|(_, regions)| regions.open_regions()).sum::<usize>() > most {
            let oldest = self.by().filter_map(|(no, regions)| Some((regions.oldest()?, no))).min();
            let Some(((_, region), no)) = oldest else { return };
            self.close_region(no, region);
        }
    }

    fn put_zeros(&mut self, no: u16, runs: &[PageRun]) {
        let mut on = Vec::new();
        let Some(regions) = self.regions(no) else { return };
        for run in runs {
            let (mut page, end) = (run.first, run.first + u64::from(run.count));
            while page < end {
                let until = (page / PAGES + 1).saturating_mul(PAGES).min(end);
                if regions.is_judged(page / PAGES) {
                    on.push(Differs::Zeros(PageRun::new(page, (until - page) as u32)));
                } else {
                    (page..until).for_each(|page| regions.put_zero(page));
                }
                page = until;
            }
        }
        self.hand_on(no, on);
    }

    fn close_region(&mut self, no: u16, region: u64) {
        match self.regions(no).map(|regions| regions.close(region)) {
            Some(Closed::Judged(differs)) => self.hand_on(no, differs),
            Some(Closed::Ask(region)) => self.ask(no, Level::Pages, region * PAGES, PAGES as u32),
            None => {}
        }
    }

    /// Makes groups of what differs, in the order in which it was told: of one page the last one counts.
    fn hand_on(&mut self, image: u16, differs: Vec<Differs>) {
        let Some(Compared::By(regions)) = self.images.get(&image) else { return };
        let kind = slot(regions.image.kind);
        let (mut pages, mut bytes, mut zeros) = (Vec::new(), BytesMut::new(), Vec::new());
        // Zeros go first: where a page is told both ways, it is not zero.
        for differ in &differs {
            if let Differs::Zeros(run) = differ {
                push_run(&mut zeros, *run);
            }
        }
        self.tally.handed_on[kind] += zeros.iter().map(|run: &PageRun| u64::from(run.count)).sum::<u64>();
        for runs in zeros.chunks(RUNS_MAX) {
            self.ready.push_back(PageGroup { image, runs: runs.to_vec(), content: Content::Zero });
        }
        let mut flush = |pages: &mut Vec<PageRun>, bytes: &mut BytesMut| {
            if !pages.is_empty() {
                let content = Content::Bytes(bytes.split().freeze());
                self.ready.push_back(PageGroup { image, runs: std::mem::take(pages), content });
            }
        };
        for differ in differs {
            if let Differs::Page(page, content) = differ {
                PageRun::push_page(&mut pages, page);
                bytes.extend_from_slice(&content);
                self.tally.handed_on[kind] += 1;
                if bytes.len() >= GROUP_PAGES * PAGE {
                    flush(&mut pages, &mut bytes);
                }
            }
        }
        flush(&mut pages, &mut bytes);
    }

    fn regions(&mut self, no: u16) -> Option<&mut Regions> {
        match self.images.get_mut(&no) {
            Some(Compared::By(regions)) => Some(regions),
            Some(Compared::Asking(_) | Compared::Full) | None => None,
        }
    }

    fn by(&self) -> impl Iterator<Item = (u16, &Regions)> {
        self.images.iter().filter_map(|(no, image)| match image {
            Compared::By(regions) => Some((*no, &**regions)),
            Compared::Asking(_) | Compared::Full => None,
        })
    }
}

impl Compared {
    fn region_count(&self) -> usize {
        match self {
            Self::Asking(asking) => asking.regions.len(),
            Self::By(regions) => regions.site_regions(),
            Self::Full => 0,
        }
    }
}

impl Asking {
    /// Takes the fingerprints of regions; says why if there is nothing to compare with.
    fn take(
        &mut self,
        question: &Question,
        reply: Result<Fingerprints, String>,
        room: usize,
    ) -> Result<Learnt, String> {
        let told = reply?;
        let (key, bytes, end) = (told.key, told.image_bytes, told.end);
        if self.key.is_some_and(|known| known != key || self.site_bytes != bytes) {
            return Err("the site has read its copy anew meanwhile".into());
        }
        let whole_pages = |bytes: u64| bytes.is_multiple_of(PAGE as u64);
        if bytes != self.image.bytes && !(whole_pages(bytes) && whole_pages(self.image.bytes)) {
            return Err("its size has changed".into());
        }
        let found = told.read(question).map_err(|misfit| misfit.to_string())?;
        if found.len() > room {
            return Err("it is too large to be compared".into());
        }
        self.regions.extend(found);
        (self.key, self.site_bytes) = (Some(key), bytes);
        let all = pages_for(bytes.min(self.image.bytes)).div_ceil(PAGES);
        if end < all {
            return Ok(Learnt::More { from: end });
        }
        Ok(Learnt::All(Site { key, bytes, regions: std::mem::take(&mut self.regions) }))
    }
}

enum Learnt {
    More { from: u64 },
    All(Site),
}

/// What `done` of `all` is of `bytes`.
fn share(bytes: u64, done: u64, all: u64) -> u128 {
    (u128::from(bytes) * u128::from(done.min(all))).checked_div(u128::from(all)).unwrap_or(0)
}

/// Appends a run, to the last one if it goes on there.
fn push_run(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.end() == Some(run.first) && last.count.checked_add(run.count).is_some() => {
            last.count += run.count;
        }
        _ if run.count > 0 => runs.push(run),
        _ => {}
    }
}

fn slot(kind: ImageKind) -> usize {
    match kind {
        ImageKind::Ram => 0,
        ImageKind::Disk | ImageKind::Blob => 1,
    }
}

/// Bytes of captured pages that may wait to be judged, and by how much a single group may exceed it.
const HELD_MAX: usize = 32 << 20;
/// Regions of one image that are collected at once: captured pages come in order, from several places at most.
const OPEN_MAX: usize = 16;
/// Questions on their way.
const IN_FLIGHT_MAX: usize = 32;
/// Regions that are not zero at the site, of all images of a VM: 4 TiB.
const REGIONS_MAX: usize = 4 << 20;
/// A larger image is not compared.
const BYTES_MAX: u64 = 64 << 40;
