//! Goal: what is owed. Method: this very process plays the guest; its own memory is read as QEMU's would be.

use super::*;
use crate::capture::memory::{
    head::{self, Contents},
    layout::{self, Layout, Place},
};
use lifeboat::{
    hypervisor::{
        libvirt::QemuProcess,
        monitor::{Monitor, MonitorError},
    },
    page::Content,
    qemu::stream::RamBlock,
};
use serde_json::{Value, json};
use std::{os::fd::BorrowedFd, sync::Arc};

const PAGES: usize = 5000;

/// Answers `info ramblock`, the one question of a round whose layout is known.
struct Quiet;
impl Monitor for Quiet {
    fn execute_with_fds(&self, _: &str, _: Value, _: &[BorrowedFd<'_>]) -> Result<Value, MonitorError> {
        Ok(json!("blocks"))
    }
}

struct Guest {
    ram: Box<[u8]>,
    target: Target,
}

impl Guest {
    fn new() -> Self {
        let pid = std::process::id() as i32;
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let started = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let process = QemuProcess { pid, started };
        let target = Target { monitor: Arc::new(Quiet), process, may_have_reset: false };
        Self { ram: vec![0; PAGES * PAGE].into_boxed_slice(), target }
    }

    fn engine(&self, dir: &std::path::Path) -> StopAndRead {
        let blocks = vec![
            RamBlock { name: "pc.ram".into(), bytes: (PAGES * PAGE) as u64 },
            RamBlock { name: "/rom@tables".into(), bytes: 2 * PAGE as u64 },
        ];
        let contents = vec![Contents::Samples(Vec::new()), Contents::Whole([[7; PAGE], [0; PAGE]].concat())];
        let places = [Place::Host { address: self.ram.as_ptr() as u64 }, Place::Head];
        let placed = blocks.iter().cloned().zip(places).map(|(block, place)| layout::Placed { block, place });
        let layout = Layout {
            blocks: placed.collect(),
            head: head::Head { config: b"\x07".to_vec(), blocks, contents },
            fingerprint: "blocks".into(),
        };
        let mut engine = StopAndRead::new(Staging::new(64 << 10, dir.into()));
        engine.known = Some(Known::of(self.target.clone(), layout));
        engine
    }
}

/// Plays groups into a copy of the site; returns how many pages came.
fn apply(site: &mut [Vec<u8>], groups: Vec<PageGroup>) -> u64 {
    let mut pages = 0;
    for group in groups {
        pages += group.pages();
        let numbers = group.runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count));
        for (at, page) in numbers.enumerate() {
            let place = page as usize * PAGE..(page as usize + 1) * PAGE;
            let image = &mut site[usize::from(group.image)];
            match &group.content {
                Content::Zero => image[place].fill(0),
                Content::Bytes(bytes) => image[place].copy_from_slice(&bytes[at * PAGE..(at + 1) * PAGE]),
            }
        }
    }
    pages
}

fn all(mut next: impl FnMut() -> Result<Option<PageGroup>, MemoryError>) -> Vec<PageGroup> {
    std::iter::from_fn(|| next().unwrap()).collect()
}

#[test]
fn later_points_carry_what_changed_and_lost_points_are_owed_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new();
    let mut engine = guest.engine(dir.path());
    let target = guest.target.clone();
    let point = |n: u8| PointId::from_bytes([n; 16]);
    let fill =
        |guest: &mut Guest, page: usize, byte: u8| guest.ram[page * PAGE..(page + 1) * PAGE].fill(byte);
    let mut site = vec![vec![0; PAGES * PAGE], vec![0; 2 * PAGE]];

    // First point: what was sent while it ran and what changed since, zero pages left out.
    (0..200).for_each(|page| fill(&mut guest, page * 3, 9));
    let images = engine.begin(&target, None).unwrap();
    assert!(images.iter().all(|image| image.full));
    assert!(matches!(engine.drain(), Err(MemoryError::Order(_))));
    assert_eq!(apply(&mut site, all(|| engine.before())), 201);
    fill(&mut guest, 0, 0);
    fill(&mut guest, 1, 5);
    engine.drain().unwrap();
    assert_eq!(apply(&mut site, all(|| engine.after())), 2);
    assert!(site[0] == *guest.ram && site[1][..PAGE] == [7; PAGE]);
    engine.sent(point(1));
    engine.settle(point(1));

    // A lost point: owed again, together with what changed since.
    (0..100).for_each(|page| fill(&mut guest, page, 77));
    assert!(engine.begin(&target, Some(point(1))).unwrap().iter().all(|image| !image.full));
    assert_eq!(engine.before().unwrap(), None);
    engine.drain().unwrap();
    assert_eq!(engine.changed_bytes(), 100 * PAGE as u64);
    engine.put_back();
    fill(&mut guest, 4999, 1);
    engine.begin(&target, Some(point(1))).unwrap();
    assert_eq!(engine.before().unwrap(), None);
    engine.drain().unwrap();
    assert_eq!(apply(&mut site, all(|| engine.after())), 101);
    assert!(site[0] == *guest.ram);
    engine.sent(point(3));
    engine.settle(point(3));

    // Nothing changed: nothing is sent. Another basis: everything is.
    engine.begin(&target, Some(point(3))).unwrap();
    assert_eq!(engine.before().unwrap(), None);
    engine.drain().unwrap();
    assert_eq!(engine.after().unwrap(), None);
    assert!(engine.begin(&target, Some(point(1))).unwrap().iter().all(|image| image.full));
}
