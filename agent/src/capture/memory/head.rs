//! The head of one ordinary migration, read through a pipe and then cancelled: machine configuration, the list of RAM
//! blocks, and the contents of blocks that the host can't see otherwise.
//!
//! Promises, whatever happens and whenever this process is killed: the migration never completes, so the guest's disks
//! are never handed over and a paused guest stays paused; a running guest runs on. What sees to it is a *brake*: a
//! dirty bitmap on a node of zeros that QEMU would have to send first, and never does before its switch-over, which a
//! downtime limit of 0 keeps out of reach. The brake's name holds the parameters it replaced, so that after
//! our death the next head gives them back. If the pipe breaks, QEMU calls the migration failed and goes on.

mod brake;

use super::{MemoryError, Target};
use brake::Brake;
use lifeboat::{
    fault,
    hypervisor::monitor::Monitor,
    page::PAGE,
    qemu::stream::{Event, RamBlock, StreamReader},
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
    time::{Duration, Instant},
};
use xxhash_rust::xxh3::xxh3_64;

/// How long QEMU may write nothing, or take to cancel.
const PATIENCE: Duration = Duration::from_secs(20);
/// Blocks up to this size are kept whole.
const KEEP_MAX: u64 = 64 << 20;
/// Bytes kept of all blocks together at the most.
const KEEP_TOTAL_MAX: u64 = 512 << 20;
/// Pages of a larger block whose digests are kept, spread evenly.
const SAMPLES: u64 = 4096;
const PIPE_BYTES: i32 = 1 << 20;
const FD_NAME: &str = "lifeboat-head";

/// What the head told.
pub struct Head {
    pub config: Vec<u8>,
    pub blocks: Vec<RamBlock>,
    /// Per block, what it held.
    pub contents: Vec<Contents>,
}

/// What a block held when the head was read.
pub enum Contents {
    Whole(Vec<u8>),
    /// Page numbers and digests of some of the pages that were not zero.
    Samples(Vec<(u64, u64)>),
}

pub fn sample_digest(page: &[u8]) -> u64 {
    xxh3_64(page)
}

/// Reads the head. Takes as long as QEMU takes to send all of its memory once.
pub fn read(target: &Target) -> Result<Head, MemoryError> {
    let monitor = &*target.monitor;
    let status = migration_status(monitor)?;
    if !at_rest(&status) {
        return Err(MemoryError::Busy { status });
    }
    let brake = Brake::set(monitor)?;
    fault::point("cut.braked");
    let head = read_braked(monitor);
    let released = brake.release(monitor);
    let head = head?;
    released?;
    Ok(head)
}

/// Takes away what a killed agent left of its reading. A migration that is under way is left alone: one of ours ends by
/// itself when nobody reads it.
pub(super) fn leave(monitor: &dyn Monitor) -> Result<(), MemoryError> {
    Brake::release_left_over(monitor)?;
    // Refused where it is not there.
    let _ = monitor.execute("closefd", json!({ "fdname": FD_NAME }));
    Ok(())
}

fn read_braked(monitor: &dyn Monitor) -> Result<Head, MemoryError> {
    let io = |step| move |errno: nix::Error| MemoryError::Io { step, source: errno.into() };
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(io("making a pipe"))?;
    // A host may allow no more to this user; the default size works too, only slower.
    let _ = fcntl(&ours, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    monitor.execute_with_fds("getfd", json!({ "fdname": FD_NAME }), &[theirs.as_fd()])?;
    drop(theirs);
    if let Err(error) = monitor.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") })) {
        let _ = monitor.execute("closefd", json!({ "fdname": FD_NAME }));
        return Err(error.into());
    }
    fault::point("cut.head-open");
    let mut pipe = Patient(File::from(ours));
    let head = parse(&mut pipe);
    let ended = cancel(monitor, pipe);
    let head = head?;
    ended?;
    Ok(head)
}

/// Cancels, and reads on meanwhile so that QEMU is never stuck on a full pipe.
fn cancel(monitor: &dyn Monitor, pipe: Patient) -> Result<(), MemoryError> {
    std::thread::scope(|scope| {
        let drain = scope.spawn(move || {
            let mut pipe = pipe;
            // Any end will do: QEMU closed its side, broke, or fell silent. Ours closes on return.
            let _ = io::copy(&mut pipe, &mut io::sink());
        });
        // Refused if the migration has ended by itself (failed): the status decides.
        let asked = monitor.execute("migrate_cancel", json!({}));
        let deadline = Instant::now() + PATIENCE;
        let ended = loop {
            let status = migration_status(monitor)?;
            if at_rest(&status) {
                break Ok(());
            }
            if Instant::now() > deadline {
                break Err(MemoryError::Busy { status });
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let _ = drain.join();
        asked?;
        ended
    })
}

fn migration_status(monitor: &dyn Monitor) -> Result<String, MemoryError> {
    let answer = monitor.execute("query-migrate", json!({}))?;
    Ok(answer.get("status").and_then(Value::as_str).unwrap_or("none").to_owned())
}

fn at_rest(status: &str) -> bool {
    matches!(status, "none" | "completed" | "cancelled" | "failed")
}

fn parse(input: impl Read) -> Result<Head, MemoryError> {
    let mut reader = StreamReader::begin(input)?;
    let mut seen = Seen::default();
    let mut empty_sections = 0;
    loop {
        let event = reader.next_event()?;
        match event {
            Event::Page { block, page, bytes } => {
                let bytes = *bytes;
                seen.page(reader.blocks(), block, page, Some(&bytes));
                empty_sections = 0;
            }
            Event::Filled { block, page, byte } => {
                let bytes = [byte; PAGE];
                seen.page(reader.blocks(), block, page, (byte != 0).then_some(&bytes));
                empty_sections = 0;
            }
            Event::SectionEnd => {
                seen.prepare(reader.blocks());
                empty_sections += 1;
            }
            Event::Devices => {
                return Err(MemoryError::Layout { what: "QEMU ended the migration by itself".into() });
            }
        }
        // QEMU may be told by the guest that pages are free and leave them out; then it has nothing more to send.
        if seen.complete() || (seen.any() && empty_sections > 16) {
            return Ok(Head {
                config: reader.config().to_vec(),
                blocks: reader.blocks().to_vec(),
                contents: seen.contents,
            });
        }
    }
}

/// Which pages have come, and what they held.
#[derive(Default)]
struct Seen {
    bits: Vec<Vec<u64>>,
    missing: u64,
    stride: Vec<u64>,
    contents: Vec<Contents>,
}

impl Seen {
    fn prepare(&mut self, blocks: &[RamBlock]) {
        if !self.bits.is_empty() || blocks.is_empty() {
            return;
        }
        let mut kept = 0;
        for block in blocks {
            self.bits.push(vec![0; block.pages().div_ceil(64) as usize]);
            self.missing += block.pages();
            self.stride.push((block.pages() / SAMPLES).max(1));
            let whole = block.bytes <= KEEP_MAX && kept + block.bytes <= KEEP_TOTAL_MAX;
            kept += if whole { block.bytes } else { 0 };
            let room = || Contents::Whole(vec![0; block.bytes as usize]);
            self.contents.push(if whole { room() } else { Contents::Samples(Vec::new()) });
        }
    }

    fn page(&mut self, blocks: &[RamBlock], block: usize, page: u64, bytes: Option<&[u8; PAGE]>) {
        self.prepare(blocks);
        let (word, bit) = (&mut self.bits[block][(page / 64) as usize], 1u64 << (page % 64));
        self.missing -= u64::from(*word & bit == 0);
        *word |= bit;
        match (&mut self.contents[block], bytes) {
            (Contents::Whole(whole), bytes) => {
                let place = &mut whole[page as usize * PAGE..(page as usize + 1) * PAGE];
                match bytes {
                    Some(bytes) => place.copy_from_slice(bytes),
                    None => place.fill(0),
                }
            }
            (Contents::Samples(samples), Some(bytes)) if page.is_multiple_of(self.stride[block]) => {
                samples.retain(|(other, _)| *other != page);
                samples.push((page, sample_digest(bytes)));
            }
            (Contents::Samples(_), _) => {}
        }
    }

    fn any(&self) -> bool {
        !self.bits.is_empty()
    }

    fn complete(&self) -> bool {
        self.any() && self.missing == 0
    }
}

/// A pipe that gives up when nothing comes for too long.
struct Patient(File);

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, timeout)? {
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "QEMU sent nothing for 20 s")),
            _ => self.0.read(into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat::qemu::stream::StreamWriter;

    #[test]
    fn a_head_is_complete_when_every_page_has_been_seen() {
        let blocks = vec![
            RamBlock { name: "pc.ram".into(), bytes: 128 << 20 },
            RamBlock { name: "/rom@x".into(), bytes: 8192 },
        ];
        let mut writer = StreamWriter::begin(Vec::new(), b"", blocks.clone()).unwrap();
        writer.zero(0, 0, blocks[0].pages()).unwrap();
        writer.pages(0, 8, &[5; PAGE]).unwrap();
        writer.pages(1, 1, &[6; PAGE]).unwrap();
        let head = parse(&writer.finish(b"\x04x\0").unwrap()[..]).unwrap();
        assert_eq!(head.blocks, blocks);
        assert!(
            matches!(&head.contents[0], Contents::Samples(samples) if samples == &[(8, sample_digest(&[5; PAGE]))])
        );
        assert!(
            matches!(&head.contents[1], Contents::Whole(whole) if whole[..PAGE] == [0; PAGE] && whole[PAGE..] == [6; PAGE])
        );
        assert!(parse(&b"QEVM\0\0\0\x03\x00"[..]).is_err());
    }
}
