//! QEMU's migration stream, the parts that Lifeboat reads and writes: its head, its RAM, and where devices begin.
//! All integers are big-endian. [`StreamReader`] takes a stream apart as far as its RAM goes; [`StreamWriter`] composes
//! one that `-incoming` (and so libvirt's restore) loads. Device sections carry no length and stay opaque.

mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use reader::{Event, StreamReader};
pub use writer::{StreamWriter, starts_zeroed};

use crate::page::PAGE;
use std::io;

pub(crate) const MAGIC: [u8; 8] = [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3];
/// Bytes of magic and version, with which every stream starts, device state from `xen-save-devices-state` included.
pub const MAGIC_LEN: usize = MAGIC.len();

mod section {
    pub const EOF: u8 = 0;
    pub const START: u8 = 1;
    pub const PART: u8 = 2;
    pub const END: u8 = 3;
    pub const FULL: u8 = 4;
    pub const SUBSECTION: u8 = 5;
    pub const DESCRIPTION: u8 = 6;
    pub const CONFIGURATION: u8 = 7;
    pub const COMMAND: u8 = 8;
    pub const FOOTER: u8 = 0x7e;
}

mod flag {
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const EOS: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    pub const MULTIFD_FLUSH: u64 = 0x200;
    pub const MASK: u64 = 0xfff;
}

/// RAM blocks in one stream at the most. A large guest has some dozens.
pub const BLOCKS_MAX: usize = 4096;
/// Bytes of one RAM block at the most: the physical address space of any x86 machine.
pub const BLOCK_BYTES_MAX: u64 = 1 << 52;

/// One block of guest memory, named and sized as QEMU does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    pub name: String,
    /// Bytes in use; a multiple of the page size.
    pub bytes: u64,
}

impl RamBlock {
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE as u64
    }

    /// Refuses what no RAM block can be.
    fn check(&self) -> Result<(), StreamError> {
        let sound = !self.name.is_empty()
            && self.name.len() <= 255
            && self.bytes <= BLOCK_BYTES_MAX
            && self.bytes.is_multiple_of(PAGE as u64);
        if sound { Ok(()) } else { Err(StreamError::BadBlock { name: self.name.clone(), bytes: self.bytes }) }
    }
}

/// A migration stream could not be read or composed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other end stopped, or its pipe broke.
    #[error("the migration stream could not be moved: {0}")]
    Io(#[from] io::Error),
    #[error("not a migration stream of a kind known here: {0}")]
    Malformed(&'static str),
    #[error("section `{name}` of the migration stream is not known here; capability {name} must be off")]
    UnknownSection { name: String },
    #[error("RAM block `{name}` of {bytes} bytes is not one that QEMU could have")]
    BadBlock { name: String, bytes: u64 },
    #[error("page {page} lies outside RAM block `{block}`")]
    OutsideBlock { block: String, page: u64 },
}
