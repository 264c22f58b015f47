//! Following one snapshot to its end: reads what QEMU writes, compares it with what the site holds, stages what differs,
//! and puts QEMU's capabilities back. A thread of its own, so that QEMU is rid of them as soon as it is done, however
//! long the point takes. Promises: whatever goes wrong with reading, QEMU is left to finish (never told to cancel), and
//! then put back; every page of every block must have come exactly once.

use super::{
    super::{
        MemoryError, Target,
        group::{Gather, digest},
        stop_and_read::Lent,
    },
    sink::{Sink, Tail},
};
use crate::watchdog::{
    Noted,
    capabilities::{at_rest, migration_status},
};
use lifeboat::{
    fault,
    page::{PAGE, is_zero},
    qemu::stream::{Event, StreamReader},
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Changed pages that are put in order before they are staged: QEMU sends what the guest is about to write first.
const ORDERED: usize = 1024;
/// How long between two looks whether QEMU is done.
const AGAIN: Duration = Duration::from_millis(5);
/// How long QEMU's monitor may give errors before it is left to the next agent to put back.
const GIVE_UP: Duration = Duration::from_secs(120);

pub struct Following {
    thread: JoinHandle<Result<Followed, MemoryError>>,
    discarded: Arc<AtomicBool>,
}

pub struct Followed {
    pub lent: Lent,
    pub changed_pages: u64,
}

impl Following {
    /// `patience`: before this has passed nothing is put back.
    pub fn start(target: Target, sink: Sink, noted: Noted, lent: Lent, patience: Duration) -> Self {
        let discarded = Arc::new(AtomicBool::new(false));
        let told = discarded.clone();
        let thread = std::thread::spawn(move || follow(&target, &sink, &noted, lent, &told, patience));
        Self { thread, discarded }
    }

    /// The point is lost: no more is compared or staged.
    pub fn discard(&self) {
        self.discarded.store(true, Ordering::Relaxed);
    }

    /// Waits for its end.
    pub fn join(self) -> Result<Followed, MemoryError> {
        self.thread.join().map_err(|_| MemoryError::Order("the thread that follows a snapshot panicked"))?
    }
}

fn follow(
    target: &Target,
    sink: &Sink,
    noted: &Noted,
    mut lent: Lent,
    discarded: &AtomicBool,
    patience: Duration,
) -> Result<Followed, MemoryError> {
    let changed_pages = read(target, sink, &mut lent, discarded);
    fault::point("snapshot.read");
    std::thread::sleep(patience);
    let ended = end(target, sink, noted);
    fault::point("snapshot.put-back");
    let changed_pages = changed_pages?;
    let status = ended?;
    if status == "completed" {
        Ok(Followed { lent, changed_pages })
    } else {
        Err(MemoryError::Snapshot { status })
    }
}

fn read(target: &Target, sink: &Sink, lent: &mut Lent, discarded: &AtomicBool) -> Result<u64, MemoryError> {
    let ended = || {
        if discarded.load(Ordering::Relaxed) {
            return Err(io::Error::other("the point was given up"));
        }
        migration_status(&*target.monitor).map(|status| at_rest(&status)).map_err(io::Error::other)
    };
    let mut reader = StreamReader::begin(Tail::new(sink, ended))?;
    let mut pages = Pages::new(lent);
    loop {
        match reader.next_event()? {
            Event::Page { block, page, bytes } => pages.page(block, page, bytes)?,
            Event::Filled { block, page, byte } => pages.page(block, page, &[byte; PAGE])?,
            Event::SectionEnd => {
                let blocks = reader.blocks();
                if !blocks.is_empty() && blocks != pages.lent.blocks {
                    return Err(MemoryError::Changed { what: "the snapshot has other memory blocks".into() });
                }
                fault::point("snapshot.reading");
                if discarded.load(Ordering::Relaxed) {
                    return Err(MemoryError::Order("the point was given up"));
                }
            }
            Event::Devices => return pages.finish(),
        }
    }
}

/// Waits until QEMU is done and puts the capabilities back; how the migration ended.
fn end(target: &Target, sink: &Sink, noted: &Noted) -> Result<String, MemoryError> {
    let mut fails_since = None;
    loop {
        sink.waste().map_err(MemoryError::io("giving a snapshot's memory back"))?;
        if !target.process.is_alive() {
            noted.forget().map_err(MemoryError::Capabilities)?;
            return Err(MemoryError::Changed { what: "its QEMU process ended".into() });
        }
        match migration_status(&*target.monitor) {
            Ok(status) if at_rest(&status) => match noted.put_back(&*target.monitor) {
                Ok(true) => return Ok(status),
                Ok(false) => {}
                Err(error) => give_up(&mut fails_since, MemoryError::Capabilities(error))?,
            },
            Ok(_) => fails_since = None,
            Err(error) => give_up(&mut fails_since, error.into())?,
        }
        std::thread::sleep(AGAIN);
    }
}

fn give_up(since: &mut Option<Instant>, error: MemoryError) -> Result<(), MemoryError> {
    std::thread::sleep(AGAIN * 20);
    if since.get_or_insert_with(Instant::now).elapsed() < GIVE_UP { Ok(()) } else { Err(error) }
}

/// Pages of a snapshot as they come.
struct Pages<'a> {
    lent: &'a mut Lent,
    /// Per block, which pages have come.
    come: Vec<Vec<u64>>,
    missing: u64,
    changed: u64,
    /// Changed pages of block `open` that are not staged yet: number, and place in `bytes`; zero pages have none.
    open: usize,
    order: Vec<(u64, Option<usize>)>,
    bytes: Vec<u8>,
}

impl<'a> Pages<'a> {
    fn new(lent: &'a mut Lent) -> Self {
        let come = lent.blocks.iter().map(|block| vec![0; block.pages().div_ceil(64) as usize]).collect();
        let missing = lent.blocks.iter().map(|block| block.pages()).sum();
        Self { lent, come, missing, changed: 0, open: 0, order: Vec::new(), bytes: Vec::new() }
    }

    fn page(&mut self, block: usize, page: u64, bytes: &[u8; PAGE]) -> Result<(), MemoryError> {
        let wrong = |what: &str| MemoryError::Layout { what: format!("page {page} of block {block} {what}") };
        let known = self.lent.next.get_mut(block).and_then(|table| table.get_mut(page as usize));
        let (Some(known), Some(word)) =
            (known, self.come.get_mut(block).and_then(|come| come.get_mut((page / 64) as usize)))
        else {
            return Err(wrong("is none of the guest's"));
        };
        if *word & 1 << (page % 64) != 0 {
            return Err(wrong("came twice"));
        }
        *word |= 1 << (page % 64);
        self.missing -= 1;
        let now = digest(bytes, self.lent.seed);
        if now == *known {
            return Ok(());
        }
        *known = now;
        self.changed += 1;
        if block != self.open || self.order.len() >= ORDERED {
            self.stage()?;
            self.open = block;
        }
        let zero = is_zero(bytes);
        self.order.push((page, (!zero).then_some(self.bytes.len())));
        if !zero {
            self.bytes.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Stages what is open, in page order.
    fn stage(&mut self) -> Result<(), MemoryError> {
        self.order.sort_unstable_by_key(|(page, _)| *page);
        let mut failed = None;
        let staging = &mut self.lent.staging;
        let mut emit = |group| failed = failed.take().or(staging.push(group).err());
        let mut gather = Gather::new(self.open as u16, &mut emit);
        for (page, at) in self.order.drain(..) {
            gather.put(page, at.map(|at| &self.bytes[at..at + PAGE]));
        }
        gather.finish();
        self.bytes.clear();
        failed.map_or(Ok(()), Err)
    }

    fn finish(mut self) -> Result<u64, MemoryError> {
        self.stage()?;
        if self.missing > 0 {
            let what = format!("QEMU left {} pages out of a snapshot", self.missing);
            return Err(MemoryError::Layout { what });
        }
        Ok(self.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::memory::{Staging, group::ZERO};
    use lifeboat::{page::Content, qemu::stream::RamBlock};

    const COUNT: u64 = 3000;

    fn lent(dir: &std::path::Path) -> Lent {
        let block = |name: &str| RamBlock { name: name.into(), bytes: COUNT * PAGE as u64 };
        let next = vec![vec![ZERO; COUNT as usize]; 2];
        let staging = Staging::new(1 << 20, dir.into());
        Lent { blocks: vec![block("pc.ram"), block("vga")], next, seed: 5, staging }
    }

    /// What page `page` of block `block` holds; every fourth is zero.
    fn content(block: usize, page: u64) -> [u8; PAGE] {
        [if page % 4 == 3 { 0 } else { 1 + block as u8 + (page % 100) as u8 }; PAGE]
    }

    #[test]
    fn pages_in_any_order_are_staged_in_groups_that_ascend_and_only_those_that_differ() {
        let dir = tempfile::tempdir().unwrap();
        let mut lent = lent(dir.path());
        let mut pages = Pages::new(&mut lent);
        for block in 0..2 {
            // Every seventh comes early, as those do that the guest is about to write.
            let (early, rest): (Vec<u64>, Vec<u64>) = (0..COUNT).partition(|page| page % 7 == 0);
            let mut early = early.into_iter().rev();
            for page in rest {
                pages.page(block, page, &content(block, page)).unwrap();
                if page % 5 == 0
                    && let Some(page) = early.next()
                {
                    pages.page(block, page, &content(block, page)).unwrap();
                }
            }
            for page in early {
                pages.page(block, page, &content(block, page)).unwrap();
            }
        }
        assert_eq!(pages.finish().unwrap(), 2 * COUNT * 3 / 4);
        let mut staged = 0;
        while let Some(group) = lent.staging.pop().unwrap() {
            let ascends = group.runs.windows(2).all(|pair| pair[0].end().unwrap() <= pair[1].first);
            let Content::Bytes(bytes) = &group.content else { panic!("nothing became zero") };
            let numbers = group.runs.iter().flat_map(|run| run.first..run.end().unwrap());
            let right = numbers
                .zip(bytes.chunks(PAGE))
                .all(|(page, bytes)| bytes == content(usize::from(group.image), page));
            assert!(ascends && right);
            staged += group.pages();
        }
        assert_eq!(staged, 2 * COUNT * 3 / 4);
    }

    #[test]
    fn a_snapshot_with_a_page_missing_twice_or_out_of_place_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut lent = lent(dir.path());
        let mut pages = Pages::new(&mut lent);
        let zero = [0; PAGE];
        pages.page(0, 7, &zero).unwrap();
        assert!(pages.page(0, 7, &zero).is_err() && pages.page(0, COUNT, &zero).is_err());
        assert!(pages.page(2, 0, &zero).is_err());
        assert!(matches!(pages.finish(), Err(MemoryError::Layout { .. })));
    }
}
