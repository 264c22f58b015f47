//! One image while it is compared: what the site holds of it, and the regions whose pages are not judged yet. Pure.
//! Promises: once a region is judged, the site's region plus what was handed on *is* the region as last captured; so every
//! later page of it only has to be handed on. What was not captured of a region counts as zero, as in a full image.
//! Called by `resync`.

use bytes::Bytes;
use lifeboat::{
    chunk::fingerprint::{Fingerprint, FingerprintKey, REGION_PAGES, RegionTable},
    format::manifest::Image,
    page::{PAGE, PageRun, pages_for},
};
use std::collections::BTreeMap;

pub const PAGES: u64 = REGION_PAGES as u64;

/// What the site holds of an image.
pub struct Site {
    pub key: FingerprintKey,
    pub bytes: u64,
    /// Regions that are not zero there, in order.
    pub regions: Vec<(u64, Fingerprint)>,
}

/// See the module.
pub struct Regions {
    pub image: Image,
    site: Site,
    /// One bit a region.
    judged: Vec<u64>,
    open: BTreeMap<u64, Region>,
    /// Regions that differ, until it is known in which pages.
    asked: BTreeMap<u64, Region>,
    /// One past the last region that was captured of.
    reached: u64,
}

/// The pages of a region that were captured and not judged: those that are missing are zero.
#[derive(Default)]
struct Region {
    pages: BTreeMap<u64, Bytes>,
    touched: u64,
}

/// What to hand on.
#[derive(Debug, PartialEq, Eq)]
pub enum Differs {
    Page(u64, Bytes),
    Zeros(PageRun),
}

/// What became of a region that was closed.
pub enum Closed {
    Judged(Vec<Differs>),
    /// The site must say which of its pages differ.
    Ask(u64),
}

impl Regions {
    pub fn new(image: Image, site: Site) -> Self {
        let regions = pages_for(image.bytes).div_ceil(PAGES);
        let judged = vec![0; regions.div_ceil(64) as usize];
        Self { image, site, judged, open: BTreeMap::new(), asked: BTreeMap::new(), reached: 0 }
    }

    pub fn is_judged(&self, region: u64) -> bool {
        self.judged.get((region / 64) as usize).is_some_and(|bits| bits >> (region % 64) & 1 == 1)
    }

    /// A captured page of a region that is not judged, at `now` by any clock. Returns whether its region is now complete.
    pub fn put(&mut self, page: u64, bytes: &[u8], now: u64) -> bool {
        let (number, whole) = (page / PAGES, self.pages_of(page / PAGES));
        let region = match self.asked.get_mut(&number) {
            Some(region) => region,
            None => self.open.entry(number).or_default(),
        };
        // A copy: a slice would keep all of its group in memory.
        region.pages.insert(page, Bytes::copy_from_slice(bytes));
        region.touched = now;
        self.reached = self.reached.max(number + 1);
        region.pages.len() as u64 == u64::from(whole.count) && self.open.contains_key(&number)
    }

    /// A captured page of zeros of a region that is not judged.
    pub fn put_zero(&mut self, page: u64) {
        let number = page / PAGES;
        for regions in [&mut self.open, &mut self.asked] {
            if let Some(region) = regions.get_mut(&number) {
                region.pages.remove(&page);
            }
        }
    }

    pub fn held_bytes(&self) -> usize {
        let regions = self.open.values().chain(self.asked.values());
        regions.map(|region| region.pages.len() * PAGE).sum()
    }

    pub fn open_regions(&self) -> usize {
        self.open.len()
    }

    /// The open region that was left alone for longest: since when, and its number.
    pub fn oldest(&self) -> Option<(u64, u64)> {
        self.open.iter().map(|(number, region)| (region.touched, *number)).min()
    }

    /// Judges an open region, or finds that the site must be asked.
    pub fn close(&mut self, number: u64) -> Closed {
        let Some(region) = self.open.remove(&number) else { return Closed::Judged(Vec::new()) };
        let (ours, theirs) = (self.site.key.region(&self.table(number, &region)), self.theirs(number));
        if ours == theirs {
            self.judge(number);
            Closed::Judged(Vec::new())
        } else if theirs == Fingerprint::ZERO || ours == Fingerprint::ZERO {
            let nothing = [Fingerprint::ZERO; REGION_PAGES];
            self.judge(number);
            let zeros = (ours == Fingerprint::ZERO).then(|| vec![Differs::Zeros(self.pages_of(number))]);
            Closed::Judged(zeros.unwrap_or_else(|| self.differences(number, &region, &nothing)))
        } else {
            self.asked.insert(number, region);
            Closed::Ask(number)
        }
    }

    /// The site's pages of a region that was asked for; `None` if it can't tell: then all of them differ.
    pub fn told(&mut self, number: u64, theirs: Option<&RegionTable>) -> Vec<Differs> {
        let Some(region) = self.asked.remove(&number) else { return Vec::new() };
        self.judge(number);
        match theirs {
            Some(theirs) => self.differences(number, &region, theirs),
            None => {
                let mut all = vec![Differs::Zeros(self.pages_of(number))];
                all.extend(region.pages.into_iter().map(|(page, bytes)| Differs::Page(page, bytes)));
                all
            }
        }
    }

    /// Everything was captured and every open region closed: what the site holds of regions that were never captured, and
    /// so are zero.
    pub fn left_over(&mut self) -> Vec<Differs> {
        let end = pages_for(self.image.bytes).div_ceil(PAGES);
        let theirs: Vec<u64> = self.site.regions.iter().map(|(number, _)| *number).collect();
        let mut zeros = Vec::new();
        for number in theirs {
            if number < end && !self.is_judged(number) && !self.asked.contains_key(&number) {
                self.judge(number);
                zeros.push(Differs::Zeros(self.pages_of(number)));
            }
        }
        zeros
    }

    pub fn is_asking(&self) -> bool {
        !self.asked.is_empty()
    }

    /// How far capturing has come, and how many regions there are.
    pub fn reached(&self) -> (u64, u64) {
        (self.reached, pages_for(self.image.bytes).div_ceil(PAGES))
    }

    pub fn key(&self) -> FingerprintKey {
        self.site.key
    }

    pub fn site_bytes(&self) -> u64 {
        self.site.bytes
    }

    /// Regions that are not zero at the site.
    pub fn site_regions(&self) -> usize {
        self.site.regions.len()
    }

    /// The pages of a region; fewer where the image ends.
    fn pages_of(&self, number: u64) -> PageRun {
        let first = number * PAGES;
        PageRun::new(first, pages_for(self.image.bytes).saturating_sub(first).min(PAGES) as u32)
    }

    fn theirs(&self, number: u64) -> Fingerprint {
        let found = self.site.regions.binary_search_by_key(&number, |(at, _)| *at);
        found.map_or(Fingerprint::ZERO, |at| self.site.regions[at].1)
    }

    fn table(&self, number: u64, region: &Region) -> RegionTable {
        let mut table = [Fingerprint::ZERO; REGION_PAGES];
        for (page, bytes) in &region.pages {
            table[(page - number * PAGES) as usize] = self.site.key.page(bytes);
        }
        table
    }

    fn differences(&self, number: u64, region: &Region, theirs: &RegionTable) -> Vec<Differs> {
        let ours = self.table(number, region);
        let run = self.pages_of(number);
        let mut differs = Vec::new();
        for (page, (ours, theirs)) in
            (run.first..run.first + u64::from(run.count)).zip(ours.iter().zip(theirs))
        {
            match region.pages.get(&page) {
                _ if ours == theirs => {}
                Some(bytes) if *ours != Fingerprint::ZERO => differs.push(Differs::Page(page, bytes.clone())),
                Some(_) | None => differs.push(Differs::Zeros(PageRun::new(page, 1))),
            }
        }
        differs
    }

    fn judge(&mut self, number: u64) {
        if let Some(bits) = self.judged.get_mut((number / 64) as usize) {
            *bits |= 1 << (number % 64);
        }
    }
}
