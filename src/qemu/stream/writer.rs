//! Composes a migration stream that QEMU loads as if another QEMU had sent it.
//! Promises: pages may come in any order; those of blocks that do not start out as zeros are completed with zero
//! records, so that a caller hands over only what it has. Writes in large batches. Called by the site's restore.

use super::{BLOCKS_MAX, MAGIC, RamBlock, StreamError, flag, section};
use crate::page::PAGE;
use std::io::Write;

const BATCH: usize = 1 << 20;
/// Id of the RAM section; any number that no device section bears. QEMU numbers its own from 0 on.
const RAM_ID: u32 = 2;
/// A description of the devices with nothing in it: what QEMU's own tools accept at the end.
const EMPTY_DESCRIPTION: [u8; 7] = [section::DESCRIPTION, 0, 0, 0, 2, b'{', b'}'];

/// Whether QEMU creates this block as zeros, so that its zero pages need not be sent: main memory only. Firmware,
/// option ROMs, ACPI tables and video memory are sent whole.
pub fn starts_zeroed(name: &str) -> bool {
    name == "pc.ram" || name == "mach-virt.ram" || name.strip_prefix("ram-node").is_some_and(is_number)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

struct Block {
    ram: RamBlock,
    /// One bit per page that has been written, kept only for blocks that must be complete.
    written: Option<Vec<u64>>,
}

/// A stream being composed.
pub struct StreamWriter<W> {
    out: W,
    batch: Vec<u8>,
    blocks: Vec<Block>,
    current: Option<usize>,
}

impl<W: Write> StreamWriter<W> {
    /// Starts a stream: `config` as [`StreamReader::config`](super::StreamReader::config) gave it, `blocks` in its order.
    pub fn begin(out: W, config: &[u8], blocks: Vec<RamBlock>) -> Result<Self, StreamError> {
        if blocks.is_empty() || blocks.len() > BLOCKS_MAX {
            return Err(StreamError::Malformed("no RAM blocks or too many"));
        }
        if config.first().is_some_and(|first| *first != section::CONFIGURATION) {
            return Err(StreamError::Malformed("the machine configuration is not one"));
        }
        let mut total = 0u64;
        for block in &blocks {
            block.check()?;
            total += block.bytes;
        }
        let mut batch = Vec::with_capacity(BATCH + PAGE + 512);
        batch.extend_from_slice(&MAGIC);
        batch.extend_from_slice(config);
        batch.push(section::START);
        batch.extend_from_slice(&RAM_ID.to_be_bytes());
        batch.extend_from_slice(b"\x03ram");
        batch.extend_from_slice(&0u32.to_be_bytes());
        batch.extend_from_slice(&4u32.to_be_bytes());
        batch.extend_from_slice(&(total | flag::MEM_SIZE).to_be_bytes());
        for block in &blocks {
            batch.push(block.name.len() as u8);
            batch.extend_from_slice(block.name.as_bytes());
            batch.extend_from_slice(&block.bytes.to_be_bytes());
        }
        end_section(&mut batch);
        batch.push(section::END);
        batch.extend_from_slice(&RAM_ID.to_be_bytes());
        let blocks = blocks
            .into_iter()
            .map(|ram| {
                let written = (!starts_zeroed(&ram.name)).then(|| vec![0; ram.pages().div_ceil(64) as usize]);
                Block { ram, written }
            })
            .collect();
        Ok(Self { out, batch, blocks, current: None })
    }

    /// Adds pages from `first` on; `bytes` is a whole number of pages.
    pub fn pages(&mut self, block: usize, first: u64, bytes: &[u8]) -> Result<(), StreamError> {
        if !bytes.len().is_multiple_of(PAGE) {
            return Err(StreamError::Malformed("pages that are not whole"));
        }
        self.check(block, first, (bytes.len() / PAGE) as u64)?;
        for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE)) {
            self.record(block, page, flag::PAGE);
            self.batch.extend_from_slice(bytes);
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Says that `count` pages from `first` on are zero.
    pub fn zero(&mut self, block: usize, first: u64, count: u64) -> Result<(), StreamError> {
        self.check(block, first, count)?;
        for page in first..first + count {
            self.record(block, page, flag::ZERO);
            self.batch.push(0);
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Completes the blocks that must be complete, then adds `device_state` (sections up to and with the EOF byte).
    pub fn finish(mut self, device_state: &[u8]) -> Result<W, StreamError> {
        if device_state.first() != Some(&section::FULL) || device_state.last() != Some(&section::EOF) {
            return Err(StreamError::Malformed("the device state does not hold whole sections"));
        }
        for block in 0..self.blocks.len() {
            let Some(written) = self.blocks[block].written.take() else { continue };
            for page in 0..self.blocks[block].ram.pages() {
                if (written[(page / 64) as usize] >> (page % 64)) & 1 == 0 {
                    self.zero(block, page, 1)?;
                }
            }
        }
        end_section(&mut self.batch);
        self.out.write_all(&self.batch)?;
        self.out.write_all(device_state)?;
        self.out.write_all(&EMPTY_DESCRIPTION)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn check(&self, block: usize, first: u64, count: u64) -> Result<(), StreamError> {
        let found = self.blocks.get(block).ok_or(StreamError::Malformed("no such RAM block"))?;
        match first.checked_add(count) {
            Some(end) if end <= found.ram.pages() => Ok(()),
            _ => Err(StreamError::OutsideBlock { block: found.ram.name.clone(), page: first }),
        }
    }

    fn record(&mut self, block: usize, page: u64, kind: u64) {
        let place = (page * PAGE as u64) | kind;
        let entry = &mut self.blocks[block];
        if let Some(written) = &mut entry.written {
            written[(page / 64) as usize] |= 1 << (page % 64);
        }
        if self.current == Some(block) {
            self.batch.extend_from_slice(&(place | flag::CONTINUE).to_be_bytes());
        } else {
            self.batch.extend_from_slice(&place.to_be_bytes());
            self.batch.push(entry.ram.name.len() as u8);
            self.batch.extend_from_slice(entry.ram.name.as_bytes());
            self.current = Some(block);
        }
    }

    fn flush_if_full(&mut self) -> Result<(), StreamError> {
        if self.batch.len() >= BATCH {
            self.out.write_all(&self.batch)?;
            self.batch.clear();
        }
        Ok(())
    }
}

fn end_section(batch: &mut Vec<u8>) {
    batch.extend_from_slice(&flag::EOS.to_be_bytes());
    batch.push(section::FOOTER);
    batch.extend_from_slice(&RAM_ID.to_be_bytes());
}
