//! Whatever happens to points, what comes out makes the pages that went in.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const RAM: u16 = 0;
const DISK: u16 = 1;
const PAGES: u64 = 12;

/// The pages of both images, as a site that takes loads makes them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Site(BTreeMap<(u16, u64), Vec<u8>>);

impl Site {
    fn get(&self, image: u16, page: u64) -> Vec<u8> {
        self.0.get(&(image, page)).cloned().unwrap_or_else(|| vec![0; PAGE])
    }

    /// Takes a point's loads; references lead to what they make of RAM together.
    fn take(&mut self, loads: &[Load]) {
        let mut refs = Vec::new();
        for load in loads {
            match load {
                Load::Pages(group) => {
                    for (at, page) in pages_of(&group.runs).enumerate() {
                        let raw = match &group.content {
                            Content::Zero => vec![0; PAGE],
                            Content::Bytes(raw) => raw[at * PAGE..(at + 1) * PAGE].to_vec(),
                        };
                        self.0.insert((group.image, page), raw);
                    }
                }
                Load::Words(list) => {
                    let view = lifeboat::format::words::WordView::of(list.pages(), &list.raw).unwrap();
                    for (at, page) in pages_of(&list.runs).enumerate() {
                        let mut raw = self.get(list.image, page);
                        view.apply(at, &mut raw);
                        assert_eq!(lifeboat::chunk::digest::page_check(&raw), view.check(at), "a wrong base");
                        self.0.insert((list.image, page), raw);
                    }
                }
                Load::Refs(list) => {
                    let view = lifeboat::format::refs::RefView::of(list.pages(), &list.raw).unwrap();
                    refs.extend(
                        pages_of(&list.runs).enumerate().map(|(at, page)| (list.image, page, view.get(at))),
                    );
                }
            }
        }
        for (image, page, to) in refs {
            let raw = self.get(to.image, to.page);
            assert_eq!(lifeboat::chunk::digest::page_check(&raw), to.check, "a reference to something else");
            self.0.insert((image, page), raw);
        }
    }
}

fn images(full: (bool, bool)) -> Vec<Image> {
    let image =
        |no, kind, name: &str, full| Image { no, kind, name: name.into(), bytes: PAGES * PAGE as u64, full };
    vec![image(RAM, ImageKind::Ram, "pc.ram", full.0), image(DISK, ImageKind::Disk, "vda", full.1)]
}

fn id(no: u64) -> PointId {
    PointId::from_bytes(u128::from(no).to_be_bytes())
}

fn group(image: u16, page: u64, raw: &[u8]) -> PageGroup {
    let content = if raw.iter().all(|byte| *byte == 0) {
        Content::Zero
    } else {
        Content::Bytes(Bytes::copy_from_slice(raw))
    };
    PageGroup { image, runs: vec![PageRun::new(page, 1)], content }
}

/// One write of the guest: a few words of a page, all of it, zeros, or a copy of a RAM page on the disk.
#[derive(Clone, Debug)]
enum Write {
    Words { image: u16, page: u64, from: usize, fill: u8 },
    Whole { image: u16, page: u64, fill: u8 },
    Zero { image: u16, page: u64 },
    Cached { page: u64, from: u64 },
}

/// What becomes of a point.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Durable,
    /// Still travelling when the next one begins; durable in the end.
    Overlapped,
    Lost,
    /// The agent thinks it lost, the site holds it.
    Found,
}

fn write() -> impl Strategy<Value = Write> {
    let place = || (0u16..2, 0..PAGES);
    prop_oneof![
        4 => (place(), 0usize..500, 1u8..9)
            .prop_map(|((image, page), from, fill)| Write::Words { image, page, from, fill }),
        1 => (place(), 1u8..9).prop_map(|((image, page), fill)| Write::Whole { image, page, fill }),
        1 => place().prop_map(|(image, page)| Write::Zero { image, page }),
        3 => (0..PAGES, 0..PAGES).prop_map(|(page, from)| Write::Cached { page, from }),
    ]
}

type Point = (Vec<Write>, Fate, (bool, bool), bool);

fn point() -> impl Strategy<Value = Point> {
    let fate = prop_oneof![
        4 => Just(Fate::Durable), 2 => Just(Fate::Overlapped), 1 => Just(Fate::Lost), 1 => Just(Fate::Found)
    ];
    let full = (prop::bool::weighted(0.1), prop::bool::weighted(0.1));
    (prop::collection::vec(write(), 0..30), fate, full, any::<bool>())
}

fn apply(guest: &mut Site, write: &Write) -> (u16, u64) {
    let (place, raw) = match *write {
        Write::Words { image, page, from, fill } => {
            let mut raw = guest.get(image, page);
            raw[from * 8..from * 8 + 64].fill(fill);
            ((image, page), raw)
        }
        Write::Whole { image, page, fill } => ((image, page), vec![fill; PAGE]),
        Write::Zero { image, page } => ((image, page), vec![0; PAGE]),
        Write::Cached { page, from } => ((DISK, page), guest.get(RAM, from)),
    };
    guest.0.insert(place, raw);
    place
}

fn run_history(budget: u64, points: Vec<Point>) -> (usize, usize) {
    let mut deltas = Deltas::new(Arc::new(BaseCache::new(budget)));
    let (mut guest, mut site) = (Site::default(), Site::default());
    let (mut basis, mut owed): (Option<PointId>, HashSet<(u16, u64)>) = (None, HashSet::new());
    let (mut words, mut refs) = (0, 0);
    for (no, (writes, fate, full, twice)) in (1..).zip(points) {
        let early: Vec<(u16, u64)> =
            owed.iter().copied().filter(|(image, _)| *image == RAM && twice).collect();
        let full = (full.0 || basis.is_none(), full.1 || basis.is_none());
        deltas.begin(id(no), basis, true);
        deltas.images(&images(full)[..1]);
        let mut loads = Vec::new();
        // What is owed of RAM goes ahead while the guest runs on, and again if it changes before the instant.
        for (image, page) in early {
            deltas.put(group(image, page, &guest.get(image, page)));
            loads.extend(std::iter::from_fn(|| deltas.ready()));
        }
        loads.extend(std::iter::from_fn(|| deltas.finish_next()));
        owed.extend(writes.iter().map(|write| apply(&mut guest, write)));
        deltas.all_images(&images(full));
        let all = [(RAM, full.0), (DISK, full.1)].into_iter().filter(|(_, full)| *full);
        let all = all.flat_map(|(image, _)| (0..PAGES).map(move |page| (image, page)));
        let mut go: Vec<(u16, u64)> = owed.iter().copied().chain(all).collect();
        go.sort_unstable_by_key(|(image, page)| (*image != DISK, *page));
        go.dedup();
        for (image, page) in go {
            deltas.put(group(image, page, &guest.get(image, page)));
            loads.extend(std::iter::from_fn(|| deltas.ready()));
        }
        loads.extend(std::iter::from_fn(|| deltas.finish_next()));
        words += loads.iter().filter(|load| matches!(load, Load::Words(_))).count();
        refs += loads.iter().filter(|load| matches!(load, Load::Refs(_))).count();
        let mut there = site.clone();
        [(RAM, full.0), (DISK, full.1)].into_iter().filter(|(_, full)| *full).for_each(|(image, _)| {
            there.0.retain(|(of, _), _| *of != image);
        });
        there.take(&loads);
        for (image, page) in (0..PAGES).flat_map(|page| [(RAM, page), (DISK, page)]) {
            assert!(
                there.get(image, page) == guest.get(image, page),
                "point {no}: page {page} of image {image}"
            );
        }
        if fate != Fate::Lost {
            (site, basis) = (there, Some(id(no)));
            owed.clear();
        }
        if fate == Fate::Durable {
            deltas.durable(id(no));
        }
    }
    (words, refs)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Goal: I-3 with deltas. Method: points that are lost, overlap, or turn out to be held, of images that now and then
    /// begin anew, over caches of all sizes; a site that takes the loads has the guest's pages after each point.
    #[test]
    fn loads_make_the_guest_s_pages_whatever_became_of_points_before(
        points in prop::collection::vec(point(), 1..14), budget in prop_oneof![Just(0u64), Just(30_000), Just(1 << 20)],
    ) {
        run_history(budget, points);
    }
}

#[test]
fn few_changed_words_travel_as_words_and_what_ram_holds_as_references() {
    let write = |page| {
        vec![
            Write::Words { image: RAM, page, from: 3, fill: page as u8 + 1 },
            Write::Cached { page: page + 1, from: page },
        ]
    };
    let first = (0..PAGES).map(|page| Write::Whole { image: RAM, page, fill: 7 + page as u8 }).collect();
    let points = vec![
        (first, Fate::Durable, (true, true), false),
        (write(2), Fate::Durable, (false, false), false),
        (write(5), Fate::Overlapped, (false, false), false),
    ];
    let (words, refs) = run_history(1 << 20, points);
    assert_eq!((words, refs), (2, 2));
}

#[test]
fn a_site_that_reads_no_deltas_gets_none_and_what_it_got_is_no_base_for_later() {
    let mut deltas = Deltas::new(Arc::new(BaseCache::new(1 << 20)));
    let mut raw = vec![3; PAGE];
    for (no, allowed) in [(1, true), (2, false), (3, true), (4, true)] {
        raw[no as usize * 8] = no as u8 + 10;
        deltas.begin(id(no), (no > 1).then(|| id(no - 1)), allowed);
        deltas.all_images(&images((no == 1, no == 1)));
        deltas.put(group(RAM, 1, &raw));
        let loads: Vec<Load> = std::iter::from_fn(|| deltas.finish_next()).collect();
        assert_eq!(matches!(loads[..], [Load::Words(_)]), no == 4, "point {no}: {loads:?}");
        deltas.durable(id(no));
    }
}

#[test]
fn pages_of_an_image_that_nobody_knew_yet_are_no_base_afterwards() {
    let mut deltas = Deltas::new(Arc::new(BaseCache::new(1 << 20)));
    let mut raw = vec![3; PAGE];
    let loads = |deltas: &mut Deltas, no: u64, known: bool, raw: &[u8]| {
        deltas.begin(id(no), (no > 1).then(|| id(no - 1)), true);
        if known {
            deltas.images(&images((no == 1, no == 1)));
        }
        deltas.put(group(RAM, 1, raw));
        let loads: Vec<Load> = std::iter::from_fn(|| deltas.finish_next()).collect();
        deltas.all_images(&images((no == 1, no == 1)));
        loads
    };
    loads(&mut deltas, 1, true, &raw);
    raw[9] = 1;
    assert!(matches!(loads(&mut deltas, 2, false, &raw)[..], [Load::Pages(_)]));
    raw[10] = 1;
    assert!(matches!(loads(&mut deltas, 3, true, &raw)[..], [Load::Pages(_)]));
    raw[11] = 1;
    assert!(matches!(loads(&mut deltas, 4, true, &raw)[..], [Load::Words(_)]));
}

#[test]
fn nothing_refers_to_ram_before_the_instant() {
    for cut in [false, true] {
        let mut deltas = Deltas::new(Arc::new(BaseCache::new(1 << 20)));
        deltas.begin(id(1), None, true);
        deltas.images(&images((true, true)));
        if cut {
            deltas.all_images(&images((true, true)));
        }
        deltas.put(group(DISK, 1, &[7; PAGE]));
        deltas.put(group(RAM, 2, &[7; PAGE]));
        let loads: Vec<Load> = std::iter::from_fn(|| deltas.finish_next()).collect();
        assert_eq!(loads.iter().any(|load| matches!(load, Load::Refs(_))), cut, "{loads:?}");
    }
}

#[test]
fn disks_wait_for_memory_within_a_bound() {
    let mut deltas = Deltas::new(Arc::new(BaseCache::new(1 << 20)));
    deltas.begin(id(1), None, true);
    let mut large = images((true, true));
    large[1].bytes = 1 << 40;
    deltas.all_images(&large);
    let raw = Bytes::from(vec![5; GROUP_PAGES * PAGE]);
    let mut came = 0;
    for at in 0..400u64 {
        let runs = vec![PageRun::new(at * GROUP_PAGES as u64, GROUP_PAGES as u32)];
        deltas.put(PageGroup { image: DISK, runs, content: Content::Bytes(raw.clone()) });
        came += std::iter::from_fn(|| deltas.ready()).count();
        assert!(deltas.held_bytes <= HOLD_MAX);
    }
    assert!(came > 200, "{came}");
    came += std::iter::from_fn(|| deltas.finish_next()).count();
    assert_eq!(came, 400);
}
