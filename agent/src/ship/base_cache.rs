//! What the site holds of pages that change often, so that only their changed words need travel.
//! Promises: at most the budget of pages is kept, for all VMs together; what is given out as a base is what the frames
//! handed over so far make of the page (whoever loses a point calls [`BaseCache::forget_after`]); a page of RAM is found
//! by its content only if that content is there, byte for byte. Never blocks for longer than a few pages take to compare.
//! Called by `delta`. Which pages stay is the crate's choice (S3-FIFO: pages that change again and again outlive those
//! that changed once).

use lifeboat::{chunk::digest::page_check, format::words::PageWords, page::PAGE};
use quick_cache::{DefaultHashBuilder, Lifecycle, UnitWeighter, unsync::Cache};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// One page of one image, for as long as that image is the same. Numbers are this process's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageKey {
    pub vm: u32,
    pub image: u32,
    pub page: u64,
}

/// What must travel for a page to become what it is.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: it is the same.
    None,
    Words(PageWords),
    Whole,
}

/// How a page is to be looked at.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Of the point that carries the page.
    pub serial: u64,
    /// Whether room may be made for it.
    pub admit: bool,
    /// Whether it can be found by its content.
    pub find: bool,
}

/// See the module.
pub struct BaseCache {
    held: Mutex<Held>,
    pages: usize,
}

struct Held {
    pages: Cache<PageKey, Base, UnitWeighter, DefaultHashBuilder, Evictions>,
    /// RAM pages by VM and check; may name pages that have changed or gone since, and never more than there are pages.
    contents: HashMap<(u32, u64), PageKey, DefaultHashBuilder>,
}

struct Base {
    raw: Box<[u8]>,
    /// Of the point that carried it.
    serial: u64,
    /// Lists of words over each other, since it was sent whole.
    depth: u8,
    /// Of the content, where it can be found by that.
    check: Option<u64>,
}

struct Evictions;

impl Lifecycle<PageKey, Base> for Evictions {
    type RequestState = Vec<(PageKey, Option<u64>)>;
    fn on_evict(&self, evicted: &mut Self::RequestState, key: PageKey, base: Base) {
        evicted.push((key, base.check));
    }
}

impl BaseCache {
    /// Keeps pages in `budget` bytes; none in 0.
    pub fn new(budget: u64) -> Self {
        let pages = usize::try_from(budget / PER_PAGE).unwrap_or(usize::MAX);
        let cache = Cache::with(pages, pages as u64, UnitWeighter, DefaultHashBuilder::default(), Evictions);
        Self { held: Mutex::new(Held { pages: cache, contents: HashMap::default() }), pages }
    }

    /// Whether it keeps anything at all.
    pub fn is_on(&self) -> bool {
        self.pages > 0
    }

    /// Looks at some pages in turn; `each` is given their number in `keys` and what must travel.
    pub fn exchange(
        &self,
        keys: impl Iterator<Item = PageKey>,
        raw: &[u8],
        look: Look,
        mut each: impl FnMut(usize, Change),
    ) {
        let mut held = self.held();
        for (at, (key, raw)) in keys.zip(raw.chunks_exact(PAGE)).enumerate() {
            each(at, held.exchange(key, raw, look, self.pages));
        }
    }

    /// A RAM page of `vm` that holds exactly `raw`, and its check.
    pub fn find(&self, vm: u32, raw: &[u8]) -> Option<(PageKey, u64)> {
        let check = page_check(raw);
        let held = self.held();
        let key = *held.contents.get(&(vm, check))?;
        (*held.pages.peek(&key)?.raw == *raw).then_some((key, check))
    }

    /// Forgets pages of an image: it changed in a way that was not compared.
    pub fn forget(&self, vm: u32, image: u32, first: u64, count: u64) {
        let mut held = self.held();
        if count > held.pages.len() as u64 {
            let gone = first..first.saturating_add(count);
            held.retain(|key, _| (key.vm, key.image) != (vm, image) || !gone.contains(&key.page));
        } else {
            (first..first.saturating_add(count)).for_each(|page| held.remove(&PageKey { vm, image, page }));
        }
    }

    /// Forgets an image's pages as points before `serial` carried them.
    pub fn forget_before(&self, vm: u32, image: u32, serial: u64) {
        self.held().retain(|key, base| (key.vm, key.image) != (vm, image) || base.serial >= serial);
    }

    /// Forgets what points after `serial` carried of a VM: they were lost.
    pub fn forget_after(&self, vm: u32, serial: u64) {
        self.held().retain(|key, base| key.vm != vm || base.serial <= serial);
    }

    /// Forgets a VM.
    pub fn forget_vm(&self, vm: u32) {
        self.held().retain(|key, _| key.vm != vm);
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // What a panic left is at worst a page too few: each step leaves pages and contents usable.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn exchange(&mut self, key: PageKey, raw: &[u8], look: Look, room: usize) -> Change {
        let Some(mut base) = self.pages.get_mut(&key) else {
            if look.admit || self.pages.len() < room {
                let check = look.find.then(|| page_check(raw));
                let base = Base { raw: raw.into(), serial: look.serial, depth: 0, check };
                let mut evicted = Vec::new();
                self.pages.insert_with_lifecycle(key, base, &mut evicted);
                self.name(key, None, check);
                evicted.into_iter().for_each(|(key, check)| self.name(key, check, None));
            }
            return Change::Whole;
        };
        if *base.raw == *raw {
            return Change::None;
        }
        let words = if base.depth < DEPTH_MAX { PageWords::between(&base.raw, raw, WORDS_MAX) } else { None };
        base.raw.copy_from_slice(raw);
        base.serial = look.serial;
        base.depth = if words.is_some() { base.depth + 1 } else { 0 };
        let check = look.find.then(|| words.as_ref().map_or_else(|| page_check(raw), PageWords::check));
        let before = std::mem::replace(&mut base.check, check);
        drop(base);
        self.name(key, before, check);
        words.map_or(Change::Whole, Change::Words)
    }

    /// The page that had one check has another.
    fn name(&mut self, key: PageKey, before: Option<u64>, now: Option<u64>) {
        if let Some(before) = before
            && self.contents.get(&(key.vm, before)) == Some(&key)
        {
            self.contents.remove(&(key.vm, before));
        }
        if let Some(now) = now {
            self.contents.insert((key.vm, now), key);
        }
    }

    fn remove(&mut self, key: &PageKey) {
        if let Some((key, base)) = self.pages.remove(key) {
            self.name(key, base.check, None);
        }
    }

    fn retain(&mut self, keep: impl Fn(&PageKey, &Base) -> bool) {
        self.pages.retain(&keep);
        let pages = &self.pages;
        self.contents.retain(|_, key| pages.contains_key(key));
    }
}

/// Lists of words over one page at the most: so many frames more a restore reads for it.
pub const DEPTH_MAX: u8 = 16;
/// Changed words up to which they are sent alone: half a page. A page of which more changed packs as well whole.
const WORDS_MAX: usize = PAGE / 8 / 2;
/// A page, its place, and what finds it.
const PER_PAGE: u64 = PAGE as u64 + 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn key(image: u32, page: u64) -> PageKey {
        PageKey { vm: 1, image, page }
    }

    fn page(fill: u8, words: usize) -> Vec<u8> {
        let mut page = vec![fill; PAGE];
        page[..words * 8].fill(0xee);
        page
    }

    fn look(serial: u64) -> Look {
        Look { serial, admit: true, find: true }
    }

    fn put(cache: &BaseCache, key: PageKey, raw: &[u8], look: Look) -> Change {
        let mut change = None;
        cache.exchange([key].into_iter(), raw, look, |_, found| change = Some(found));
        change.unwrap()
    }

    #[test]
    fn a_page_travels_whole_first_then_its_words_and_whole_again_before_the_chain_grows_long() {
        let cache = BaseCache::new(1 << 20);
        assert_eq!(put(&cache, key(0, 7), &page(1, 0), look(1)), Change::Whole);
        assert_eq!(put(&cache, key(0, 7), &page(1, 0), look(2)), Change::None);
        for round in 0..DEPTH_MAX {
            let change = put(&cache, key(0, 7), &page(1, 1 + usize::from(round)), look(3));
            assert!(matches!(&change, Change::Words(words) if words.count() == 1), "{round}: {change:?}");
        }
        assert_eq!(put(&cache, key(0, 7), &page(1, 100), look(4)), Change::Whole);
        assert_eq!(put(&cache, key(0, 7), &page(2, 100), look(5)), Change::Whole, "nearly all of it changed");
    }

    #[test]
    fn what_a_lost_point_carried_is_no_base() {
        let cache = BaseCache::new(1 << 20);
        put(&cache, key(0, 1), &page(1, 0), look(1));
        put(&cache, key(0, 2), &page(1, 0), look(1));
        put(&cache, key(0, 2), &page(1, 1), look(2));
        cache.forget_after(1, 1);
        assert!(matches!(put(&cache, key(0, 1), &page(1, 1), look(3)), Change::Words(_)));
        assert_eq!(put(&cache, key(0, 2), &page(1, 1), look(3)), Change::Whole);
        cache.forget_before(1, 0, 4);
        assert_eq!(put(&cache, key(0, 1), &page(1, 1), look(4)), Change::Whole);
        cache.forget(1, 0, 0, 2);
        assert_eq!(put(&cache, key(0, 1), &page(1, 1), look(4)), Change::Whole);
        cache.forget_vm(1);
        assert!(cache.held().pages.is_empty() && cache.held().contents.is_empty());
    }

    #[test]
    fn a_page_is_found_by_what_it_holds_now_and_by_nothing_older() {
        let cache = BaseCache::new(1 << 20);
        put(&cache, key(0, 1), &page(1, 0), look(1));
        assert_eq!(cache.find(1, &page(1, 0)).map(|(key, _)| key), Some(key(0, 1)));
        assert_eq!(cache.find(2, &page(1, 0)), None, "another VM's");
        put(&cache, key(0, 1), &page(1, 3), look(2));
        assert_eq!(cache.find(1, &page(1, 0)), None);
        assert_eq!(cache.find(1, &page(1, 3)).map(|(_, check)| check), Some(page_check(&page(1, 3))));
        put(&cache, key(1, 1), &page(5, 0), Look { serial: 2, admit: true, find: false });
        assert_eq!(cache.find(1, &page(5, 0)), None, "a page of a disk");
    }

    /// Goal: bounded, and hot pages win. Method: a few pages that change each round, among a flood that comes once.
    #[test]
    fn pages_that_change_again_and_again_outlive_a_flood_within_the_budget() {
        let cache = BaseCache::new(64 * PER_PAGE);
        let (mut words, mut flood) = (0, 1000);
        for round in 0..40usize {
            for hot in 0..8 {
                let change = put(&cache, key(0, hot), &page(1, round % 64), look(round as u64));
                words += usize::from(matches!(change, Change::Words(_)));
            }
            for _ in 0..60 {
                flood += 1;
                put(&cache, key(0, flood), &page(9, flood as usize % 500), look(round as u64));
            }
            let held = cache.held();
            assert!(held.pages.len() <= 64 && held.contents.len() <= 64);
        }
        assert!(words > 200, "only {words} of 312 hot pages travelled as words");
        // What comes only where there is room takes none of theirs.
        let idle = Look { serial: 99, admit: false, find: true };
        let before = cache.held().pages.len();
        (5000..5200).for_each(|page_no| drop(put(&cache, key(2, page_no), &page(3, 1), idle)));
        assert!(cache.held().pages.len() <= before.max(64));
        assert!(matches!(put(&cache, key(0, 3), &page(1, 63), look(100)), Change::Words(_) | Change::None));
    }

    #[test]
    fn without_a_budget_everything_travels_whole() {
        let cache = BaseCache::new(0);
        assert!(!cache.is_on());
        put(&cache, key(0, 1), &page(1, 0), look(1));
        assert_eq!(put(&cache, key(0, 1), &page(1, 0), look(2)), Change::Whole);
    }
}
