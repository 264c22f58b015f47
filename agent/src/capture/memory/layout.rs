//! Where each RAM block of the guest lies in QEMU's process.
//! Promises: an address is used only after QEMU named the block there, the process has that range mapped, and its bytes
//! were compared with what the stream's head said. A block keeps its address for the life of its process. Blocks that
//! the guest can't reach (option ROMs, ACPI tables) have none: their contents come from the head.

mod monitor_text;

use super::{
    MemoryError, Target,
    head::{Contents, Head, sample_digest},
    process_memory,
};
use lifeboat::{page::PAGE, qemu::stream::RamBlock};
use monitor_text::{GuestRange, guest_ranges, host_address, ram_blocks};

/// Of the pages that were not zero in the head, one in this many must still be the same for an address to be
/// believed. A running guest changes many of them between the two looks; a wrong address matches none.
const TRUST: usize = 16;
/// Pages compared per block at the most.
const COMPARED: usize = 2048;

/// A block and where it is.
pub struct Placed {
    pub block: RamBlock,
    pub place: Place,
}

pub enum Place {
    /// In QEMU's process.
    Host { address: u64 },
    /// Nowhere that can be read; as the head said.
    Head,
}

pub struct Layout {
    pub head: Head,
    pub blocks: Vec<Placed>,
    /// `info ramblock` at the time: another answer later means another layout.
    pub fingerprint: String,
}

/// QEMU's list of RAM blocks, which changes exactly when the layout does.
pub fn fingerprint(target: &Target) -> Result<String, MemoryError> {
    Ok(target.monitor.human("info ramblock")?)
}

impl Layout {
    /// Finds the blocks of `head`. `fingerprint` was taken before the head was read.
    pub fn find(target: &Target, head: Head, fingerprint: String) -> Result<Self, MemoryError> {
        if self::fingerprint(target)? != fingerprint {
            return Err(MemoryError::Changed { what: "while it was being read".into() });
        }
        let blocks =
            head.blocks.iter().map(|block| Placed { block: block.clone(), place: Place::Head }).collect();
        let mut layout = Self { head, blocks, fingerprint };
        layout.place_missing(target)?;
        for (at, placed) in layout.blocks.iter().enumerate() {
            let whole = matches!(layout.head.contents[at], Contents::Whole(_));
            if matches!(placed.place, Place::Head) && !whole {
                let what = format!(
                    "QEMU does not say where block {} ({} bytes) is",
                    placed.block.name, placed.block.bytes
                );
                return Err(MemoryError::Layout { what });
            }
        }
        Ok(layout)
    }

    /// Looks again for blocks without an address: video memory, say, is found once the guest has mapped it.
    pub fn place_missing(&mut self, target: &Target) -> Result<(), MemoryError> {
        if self.blocks.iter().all(|placed| matches!(placed.place, Place::Host { .. })) {
            return Ok(());
        }
        let printed = ram_blocks(&self.fingerprint);
        let ranges = guest_ranges(&target.monitor.human("info mtree")?);
        let mapped = process_memory::mapped_ranges(target.process)?;
        for at in 0..self.blocks.len() {
            if matches!(self.blocks[at].place, Place::Host { .. }) {
                continue;
            }
            let block = &self.blocks[at].block;
            let from_list =
                printed.iter().filter(|entry| entry.name == block.name).filter_map(|entry| entry.host);
            let mut candidates: Vec<u64> = from_list.collect();
            if candidates.is_empty() {
                candidates = addresses_by_guest(target, block, &ranges)?;
            }
            for address in candidates {
                if is_mapped(&mapped, address, block.bytes) && self.matches_head(target, at, address)? {
                    self.blocks[at].place = Place::Host { address };
                    break;
                }
            }
        }
        Ok(())
    }

    /// Whether enough of the block's non-zero pages are found at `address`.
    fn matches_head(&self, target: &Target, at: usize, address: u64) -> Result<bool, MemoryError> {
        let samples: Vec<(u64, u64)> = match &self.head.contents[at] {
            Contents::Samples(samples) => samples.clone(),
            Contents::Whole(whole) => {
                let pages = (0u64..).zip(whole.chunks_exact(PAGE));
                let non_zero = pages.filter(|(_, page)| !lifeboat::page::is_zero(page));
                non_zero.map(|(number, page)| (number, sample_digest(page))).collect()
            }
        };
        let stride = samples.len().div_ceil(COMPARED).max(1);
        let (mut compared, mut same) = (0usize, 0usize);
        let mut page = vec![0; PAGE];
        for (number, digest) in samples.into_iter().step_by(stride) {
            process_memory::read(target.process, address + number * PAGE as u64, &mut page)?;
            compared += 1;
            same += usize::from(sample_digest(&page) == digest);
        }
        // A block of zeros has nothing to compare; then QEMU's word and the map of its process stand.
        Ok(compared == 0 || same * TRUST >= compared)
    }
}

/// Host addresses of a block's start, by asking where the guest's addresses of it lie.
fn addresses_by_guest(
    target: &Target,
    block: &RamBlock,
    ranges: &[GuestRange],
) -> Result<Vec<u64>, MemoryError> {
    let mut found = Vec::new();
    // QEMU names the region; the block's name may have its device's path before that.
    let is_ours = |name: &str| block.name == name || block.name.ends_with(&format!("/{name}"));
    let ours = ranges.iter().filter(|range| is_ours(&range.name) && range.offset < block.bytes);
    for range in ours.take(16) {
        let answer = target.monitor.human(&format!("gpa2hva {:#x}", range.start))?;
        let Some((name, host)) = host_address(&answer) else { continue };
        if name == range.name
            && let Some(start) = host.checked_sub(range.offset)
            && !found.contains(&start)
        {
            found.push(start);
        }
    }
    Ok(found)
}

fn is_mapped(mapped: &[(u64, u64)], address: u64, bytes: u64) -> bool {
    address.is_multiple_of(PAGE as u64) && process_memory::covers(mapped, address, bytes)
}
