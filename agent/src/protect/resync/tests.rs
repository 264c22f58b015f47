//! Resync against a naive model: whatever is captured, in whatever order and however often, and however answers are
//! delayed, lost or refused, the site's image and what was handed on make the image as last captured.

use super::*;
use lifeboat::wire::compare::Span;
use proptest::prelude::*;

const VM: VmId = VmId::from_bytes([1; 16]);
const BASIS: PointId = PointId::from_bytes([2; 16]);
const NO: u16 = 3;

fn page(value: u8) -> Vec<u8> {
    vec![value; PAGE]
}

fn image(pages: u64) -> Image {
    Image { no: NO, kind: ImageKind::Disk, name: "vda".into(), bytes: pages * PAGE as u64, full: true }
}

fn group(pages: &[(u64, u8)]) -> Vec<PageGroup> {
    let (mut runs, mut bytes, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
    for (at, value) in pages {
        if *value == 0 {
            PageRun::push_page(&mut zeros, *at);
        } else {
            PageRun::push_page(&mut runs, *at);
            bytes.extend(page(*value));
        }
    }
    let mut groups = Vec::new();
    if !runs.is_empty() {
        groups.push(PageGroup { image: NO, runs, content: Content::Bytes(bytes.into()) });
    }
    if !zeros.is_empty() {
        groups.push(PageGroup { image: NO, runs: zeros, content: Content::Zero });
    }
    groups
}

/// The site: pages by value, and how it answers.
struct Model {
    pages: Vec<u8>,
    key: FingerprintKey,
    /// Image as it becomes with what was handed on, and how many pages that were.
    becomes: Vec<u8>,
    handed_on: usize,
}

impl Model {
    fn new(pages: Vec<u8>, own: usize) -> Self {
        let mut becomes = pages.clone();
        becomes.resize(own, 0);
        Self { pages, key: FingerprintKey::from_bytes([5; 32]), becomes, handed_on: 0 }
    }

    fn page(&self, at: u64) -> Fingerprint {
        self.pages.get(at as usize).map_or(Fingerprint::ZERO, |value| self.key.page(&page(*value)))
    }

    fn answer(&self, question: &Question) -> Reply {
        let asked = question.first..question.first + u64::from(question.count);
        let bytes = (self.pages.len() * PAGE) as u64;
        Reply::Fingerprints(match question.level {
            Level::Pages => {
                Fingerprints::collect(self.key, bytes, asked.map(|at| self.page(at)), question.first)
            }
            Level::Regions => {
                // Two at a time, so that more must be asked for.
                let regions = pages_for(bytes).div_ceil(PAGES).min(asked.start + 2).max(asked.start + 1);
                let region = |at: u64| {
                    let mut table = [Fingerprint::ZERO; REGION_PAGES];
                    table.iter_mut().zip(at * PAGES..).for_each(|(one, at)| *one = self.page(at));
                    self.key.region(&table)
                };
                Fingerprints::collect(self.key, bytes, (asked.start..regions).map(region), asked.start)
            }
        })
    }

    fn take(&mut self, resync: &mut Resync) {
        while let Some(group) = resync.pop() {
            assert!(
                group.runs.windows(2).all(|pair| pair[0].end().unwrap() <= pair[1].first),
                "{:?}",
                group.runs
            );
            let mut bytes = match &group.content {
                Content::Bytes(bytes) => bytes.chunks(PAGE),
                Content::Zero => [].chunks(PAGE),
            };
            for at in group.runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count)) {
                self.becomes[at as usize] = bytes.next().map_or(0, |bytes| bytes[0]);
                self.handed_on += 1;
            }
            assert!(bytes.next().is_none());
        }
    }

    /// Answers all questions in the order in which they were asked.
    fn talk(&mut self, resync: &mut Resync) {
        loop {
            let questions = resync.questions();
            if questions.is_empty() {
                break;
            }
            for message in questions {
                let AgentMessage::Compare { question, .. } = message else { panic!("{message:?}") };
                resync.on_answer(Answer { no: question.no, reply: self.answer(&question) });
            }
        }
        self.take(resync);
    }
}

/// What happens to a question.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answered,
    Late,
    LinkCut,
    Refused,
    OtherKey,
    Nonsense,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Answered),
        3 => Just(Fate::Late),
        1 => Just(Fate::LinkCut),
        1 => Just(Fate::Refused),
        1 => Just(Fate::OtherKey),
        1 => Just(Fate::Nonsense),
    ]
}

fn judged(model: &Model, question: &Question, fate: Fate) -> Reply {
    match (fate, model.answer(question)) {
        (Fate::Refused, _) => Reply::Refused { why: "no".into() },
        (Fate::OtherKey, Reply::Fingerprints(told)) => {
            Reply::Fingerprints(Fingerprints { key: FingerprintKey::from_bytes([6; 32]), ..told })
        }
        (Fate::Nonsense, Reply::Fingerprints(told)) => {
            Reply::Fingerprints(Fingerprints { spans: vec![Span { zeros: u64::MAX, then: vec![] }], ..told })
        }
        (_, reply) => reply,
    }
}

/// Pages of an image: mostly in stretches of one value, as images are.
fn pages(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((0u8..4, 1usize..300), 1..6).prop_map(move |stretches| {
        let mut all: Vec<u8> =
            stretches.into_iter().flat_map(|(value, n)| std::iter::repeat_n(value, n)).collect();
        all.truncate(most);
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Goal: the image is exact whatever happens. Method: captures in any order, again and again, with closings in
    /// between; answers that come late, after a cut link, not at all, or make no sense.
    #[test]
    fn the_site_s_image_and_what_was_handed_on_make_the_image_as_last_captured(
        theirs in pages(900), length in 1usize..900,
        captures in prop::collection::vec((0usize..900, prop::collection::vec((0usize..40, 0u8..4), 1..40)), 0..40),
        fates in prop::collection::vec(fate(), 1..200), closings in prop::collection::vec(any::<bool>(), 40),
    ) {
        let mut model = Model::new(theirs, length);
        let mut resync = Resync::begin(VM, BASIS, &[image(length as u64)]).unwrap();
        model.talk(&mut resync);
        prop_assert!(resync.is_prepared());
        let mut fates = fates.into_iter().cycle();
        let mut ours = vec![0; length];
        let mut late = Vec::new();
        for ((from, captured), close) in captures.into_iter().zip(closings) {
            // Ascending within a group, as engines tell pages.
            let mut at = from % length;
            let mut told = Vec::new();
            for (skip, value) in captured {
                at += skip;
                if at >= length {
                    break;
                }
                // A page that was zero all along is not told by engines.
                if value != 0 || ours[at] != 0 {
                    told.push((at as u64, value));
                    ours[at] = value;
                }
                at += 1;
            }
            group(&told).into_iter().for_each(|group| resync.put(group));
            if close {
                resync.close();
            }
            for message in resync.questions() {
                let AgentMessage::Compare { question, .. } = message else { panic!("{message:?}") };
                match fates.next().unwrap() {
                    Fate::Late => late.push(question),
                    Fate::LinkCut => resync.link_down(),
                    fate => resync.on_answer(Answer { no: question.no, reply: judged(&model, &question, fate) }),
                }
            }
            model.take(&mut resync);
        }
        for question in late {
            resync.on_answer(Answer { no: question.no, reply: model.answer(&question) });
        }
        resync.finish();
        resync.link_down();
        model.talk(&mut resync);
        prop_assert!(resync.is_quiet() && resync.pop().is_none());
        prop_assert!(model.becomes == ours);
    }

    /// Goal: only differences travel. Method: one capture of everything that is not zero, in order.
    #[test]
    fn captured_in_order_only_pages_that_differ_are_handed_on(theirs in pages(900), changes in prop::collection::vec((0usize..900, 1u8..4), 0..20)) {
        let mut ours = theirs.clone();
        for (at, value) in changes {
            let at = at % ours.len();
            ours[at] = value;
        }
        let mut model = Model::new(theirs.clone(), ours.len());
        let mut resync = Resync::begin(VM, BASIS, &[image(ours.len() as u64)]).unwrap();
        model.talk(&mut resync);
        let captured: Vec<(u64, u8)> = (0..).zip(&ours).filter(|(_, value)| **value != 0).map(|(at, value)| (at, *value)).collect();
        for part in captured.chunks(GROUP_PAGES) {
            group(part).into_iter().for_each(|group| resync.put(group));
        }
        resync.finish();
        model.talk(&mut resync);
        prop_assert!(model.becomes == ours);
        let differ = theirs.iter().zip(&ours).filter(|(one, other)| one != other).count();
        prop_assert_eq!(model.handed_on, differ);
    }
}

#[test]
fn an_image_of_which_the_site_has_nothing_to_say_goes_in_full_and_stays_full() {
    for reply in [
        Reply::Refused { why: "it is damaged".into() },
        Reply::Fingerprints(Fingerprints {
            key: FingerprintKey::from_bytes([1; 32]),
            // Not whole pages, and another size: where it ends is not comparable.
            image_bytes: 4095,
            end: 1,
            spans: vec![Span { zeros: 1, then: vec![] }],
        }),
    ] {
        let mut resync = Resync::begin(VM, BASIS, &[image(4)]).unwrap();
        let no = resync.questions().len() as u32 - 1;
        resync.on_answer(Answer { no, reply });
        assert!(resync.is_prepared() && resync.is_quiet());
        let whole = group(&[(1, 7)]).remove(0);
        resync.put(whole.clone());
        assert_eq!(resync.pop(), Some(whole));
        resync.finish();
        assert_eq!(resync.pop(), None, "what is not captured is zero by being full");
        let mut meta = meta(image(4));
        resync.amend(&mut meta);
        assert!(resync.fits(&meta) && meta.images[0].full);
    }
}

#[test]
fn an_image_that_was_compared_is_told_as_a_delta_and_one_that_changed_under_it_is_noticed() {
    let mut model = Model::new(vec![1; 4], 4);
    let mut resync = Resync::begin(VM, BASIS, &[image(4)]).unwrap();
    model.talk(&mut resync);
    let mut same = meta(image(4));
    resync.amend(&mut same);
    assert!(!same.images[0].full);
    assert!(!resync.fits(&meta(image(5))));
    assert!(!resync.fits(&meta(Image { full: false, ..image(4) })));
}

#[test]
fn what_is_known_or_small_state_needs_no_comparison() {
    let known = Image { full: false, ..image(4) };
    let blob = Image { kind: ImageKind::Blob, ..image(4) };
    assert!(Resync::begin(VM, BASIS, &[known, blob, image(0)]).is_none());
}

#[test]
fn pages_that_wait_for_answers_are_bounded_and_questions_too() {
    let pages = 64 * PAGES;
    let mut model = Model::new(vec![1; pages as usize], pages as usize);
    let mut resync = Resync::begin(VM, BASIS, &[image(pages)]).unwrap();
    model.talk(&mut resync);
    let mut asked = 0;
    for first in (0..pages).step_by(GROUP_PAGES) {
        let differs: Vec<_> = (first..first + GROUP_PAGES as u64).map(|at| (at, 2)).collect();
        if !resync.is_full() {
            resync.put(group(&differs).remove(0));
            asked += resync.questions().len();
        }
    }
    let held: usize = resync.by().map(|(_, regions)| regions.held_bytes()).sum();
    assert!(resync.is_full() && held <= HELD_MAX + GROUP_PAGES * PAGE, "{held}");
    assert!(asked <= IN_FLIGHT_MAX);
}

fn meta(image: Image) -> PointMeta {
    PointMeta {
        cut_at: lifeboat::units::UnixMs(1),
        images: vec![image],
        consistency: lifeboat::format::manifest::Consistency::Crash,
        cut: None,
        was_running: true,
        stats: Default::default(),
    }
}
