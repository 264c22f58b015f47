//! Takes a migration stream apart, incrementally, as far as RAM goes.
//! Promises: memory is bounded by the block list (at most [`BLOCKS_MAX`](super::BLOCKS_MAX) names) and one page;
//! every page handed out lies inside its block. Input is untrusted. Called by the agent's layout discovery and tests.

use super::{BLOCK_BYTES_MAX, BLOCKS_MAX, MAGIC, RamBlock, StreamError, flag, section};
use crate::page::PAGE;
use std::io::{self, BufRead, BufReader, Read};

const BUFFER: usize = 256 << 10;
const MACHINE_NAME_MAX: u32 = 1024;
const CAPABILITIES_MAX: u32 = 256;
const ALIAS_FLAGS: [u8; 2] = [0x08, 0x04];

/// What comes next in a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// One page as it was when QEMU sent it; a later record of the same page counts.
    Page { block: usize, page: u64, bytes: &'a [u8; PAGE] },
    /// One page filled with one byte, zero as a rule.
    Filled { block: usize, page: u64, byte: u8 },
    /// QEMU ended a section; more may follow.
    SectionEnd,
    /// Device sections (or the end) follow: nothing more is understood. [`StreamReader::into_rest`] has the bytes.
    Devices,
}

/// A stream being read, past its head.
pub struct StreamReader<R> {
    input: BufReader<R>,
    config: Vec<u8>,
    blocks: Vec<RamBlock>,
    ram_id: Option<u32>,
    bitmap_id: Option<u32>,
    /// Id of the RAM section whose records are being read.
    inside: Option<u32>,
    current: Option<usize>,
    page: Box<[u8; PAGE]>,
}

impl<R: Read> StreamReader<R> {
    /// Reads magic, version and configuration.
    pub fn begin(input: R) -> Result<Self, StreamError> {
        let mut reader = Self {
            input: BufReader::with_capacity(BUFFER, input),
            config: Vec::new(),
            blocks: Vec::new(),
            ram_id: None,
            bitmap_id: None,
            inside: None,
            current: None,
            page: Box::new([0; PAGE]),
        };
        if reader.array::<8>()? != MAGIC {
            return Err(StreamError::Malformed("wrong magic or version"));
        }
        if reader.peek()? == section::CONFIGURATION {
            reader.read_config()?;
        }
        Ok(reader)
    }

    /// The configuration section: the bytes between the version and the first section.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The RAM blocks in stream order; empty until the first event has been returned.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Reads on to the next page, end of a section, or start of the devices.
    pub fn next_event(&mut self) -> Result<Event<'_>, StreamError> {
        loop {
            let Some(id) = self.inside else {
                match self.open_section()? {
                    Opened::Ram => continue,
                    Opened::Skipped => return Ok(Event::SectionEnd),
                    Opened::Devices => return Ok(Event::Devices),
                }
            };
            let record = self.be64()?;
            let (flags, offset) = (record & flag::MASK, record & !flag::MASK);
            match flags & !flag::CONTINUE {
                flag::EOS => {
                    self.footer(id)?;
                    self.inside = None;
                    return Ok(Event::SectionEnd);
                }
                flag::MEM_SIZE => self.read_block_list(offset)?,
                flag::MULTIFD_FLUSH => {}
                flag::PAGE => {
                    let (block, page) = self.place(flags, offset)?;
                    self.input.read_exact(&mut self.page[..])?;
                    return Ok(Event::Page { block, page, bytes: &self.page });
                }
                flag::ZERO => {
                    let (block, page) = self.place(flags, offset)?;
                    return Ok(Event::Filled { block, page, byte: self.byte()? });
                }
                _ => return Err(StreamError::Malformed("an unknown kind of RAM record")),
            }
        }
    }

    /// The rest of the stream, from its first device section on.
    pub fn into_rest(self) -> impl Read {
        self.input
    }

    fn open_section(&mut self) -> Result<Opened, StreamError> {
        match self.peek()? {
            section::EOF | section::FULL | section::DESCRIPTION => return Ok(Opened::Devices),
            section::COMMAND => {
                self.byte()?;
                let (_command, len) = (self.be16()?, self.be16()?);
                self.skip(u64::from(len))?;
                return Ok(Opened::Skipped);
            }
            section::START | section::PART | section::END => {}
            _ => return Err(StreamError::Malformed("an unknown kind of section")),
        }
        let kind = self.byte()?;
        let id = self.be32()?;
        if kind == section::START {
            let name = self.short_string()?;
            let (_instance, version) = (self.be32()?, self.be32()?);
            match name.as_str() {
                "ram" if version == 4 => self.ram_id = Some(id),
                "ram" => return Err(StreamError::Malformed("the RAM section has a version other than 4")),
                "dirty-bitmap" => self.bitmap_id = Some(id),
                _ => return Err(StreamError::UnknownSection { name }),
            }
        }
        if self.ram_id == Some(id) {
            self.inside = Some(id);
            Ok(Opened::Ram)
        } else if self.bitmap_id == Some(id) {
            self.skip_bitmap_section()?;
            self.footer(id)?;
            Ok(Opened::Skipped)
        } else {
            Err(StreamError::Malformed("a part of a section that never started"))
        }
    }

    /// Bitmap sections that name bitmaps but carry no bits, as a pre-copy phase writes them.
    fn skip_bitmap_section(&mut self) -> Result<(), StreamError> {
        loop {
            let flags = self.byte()?;
            if flags & !0x1d != 0 {
                return Err(StreamError::Malformed("a bitmap section with contents"));
            }
            for alias in ALIAS_FLAGS {
                if flags & alias != 0 {
                    self.short_string()?;
                }
            }
            if flags & 0x10 != 0 {
                self.skip(5)?;
            }
            if flags & 0x01 != 0 {
                return Ok(());
            }
        }
    }

    fn read_config(&mut self) -> Result<(), StreamError> {
        let kind = self.byte()?;
        let len = self.be32()?;
        if len > MACHINE_NAME_MAX {
            return Err(StreamError::Malformed("a machine type with an endless name"));
        }
        self.config.push(kind);
        self.config.extend_from_slice(&len.to_be_bytes());
        self.keep(len as usize)?;
        while self.peek()? == section::SUBSECTION {
            self.keep(1)?;
            let name = self.keep_short_string()?;
            self.keep(4)?;
            match name.as_slice() {
                b"configuration/target-page-bits" => self.keep(4)?,
                b"configuration/uuid" => self.keep(16)?,
                b"configuration/capabilities" => {
                    let count = self.be32()?;
                    self.config.extend_from_slice(&count.to_be_bytes());
                    if count > CAPABILITIES_MAX {
                        return Err(StreamError::Malformed("an endless list of capabilities"));
                    }
                    for _ in 0..count {
                        self.keep_short_string()?;
                    }
                }
                _ => {
                    return Err(StreamError::UnknownSection {
                        name: String::from_utf8_lossy(&name).into_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    fn read_block_list(&mut self, mut total: u64) -> Result<(), StreamError> {
        if !self.blocks.is_empty() {
            return Err(StreamError::Malformed("a second list of RAM blocks"));
        }
        while total > 0 {
            let block = RamBlock { name: self.short_string()?, bytes: self.be64()? };
            block.check()?;
            if self.blocks.len() == BLOCKS_MAX || self.blocks.iter().any(|other| other.name == block.name) {
                return Err(StreamError::Malformed("too many RAM blocks, or one twice"));
            }
            total = total
                .checked_sub(block.bytes)
                .ok_or(StreamError::Malformed("RAM blocks do not add up to their total"))?;
            self.blocks.push(block);
        }
        Ok(())
    }

    /// Which block and page a record speaks of.
    fn place(&mut self, flags: u64, offset: u64) -> Result<(usize, u64), StreamError> {
        if flags & flag::CONTINUE == 0 {
            let name = self.short_string()?;
            self.current = self.blocks.iter().position(|block| block.name == name);
        }
        let at = self.current.ok_or(StreamError::Malformed("a page of a RAM block that is not listed"))?;
        let page = offset / PAGE as u64;
        if page >= self.blocks[at].pages() {
            return Err(StreamError::OutsideBlock { block: self.blocks[at].name.clone(), page });
        }
        debug_assert!(offset < BLOCK_BYTES_MAX);
        Ok((at, page))
    }

    fn footer(&mut self, id: u32) -> Result<(), StreamError> {
        if self.byte()? == section::FOOTER && self.be32()? == id {
            Ok(())
        } else {
            Err(StreamError::Malformed("a section without its footer"))
        }
    }

    fn peek(&mut self) -> Result<u8, StreamError> {
        let buffered = self.input.fill_buf()?;
        buffered.first().copied().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof).into())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, StreamError> {
        Ok(self.array::<1>()?[0])
    }
    fn be16(&mut self) -> Result<u16, StreamError> {
        Ok(u16::from_be_bytes(self.array()?))
    }
    fn be32(&mut self) -> Result<u32, StreamError> {
        Ok(u32::from_be_bytes(self.array()?))
    }
    fn be64(&mut self) -> Result<u64, StreamError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn short_bytes(&mut self) -> Result<Vec<u8>, StreamError> {
        let mut bytes = vec![0; usize::from(self.byte()?)];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn short_string(&mut self) -> Result<String, StreamError> {
        String::from_utf8(self.short_bytes()?).map_err(|_| StreamError::Malformed("a name that is not text"))
    }

    fn skip(&mut self, len: u64) -> Result<(), StreamError> {
        let skipped = io::copy(&mut self.input.by_ref().take(len), &mut io::sink())?;
        if skipped == len { Ok(()) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) }
    }

    /// Copies the next `len` bytes (a small, checked number) into the configuration.
    fn keep(&mut self, len: usize) -> Result<(), StreamError> {
        let at = self.config.len();
        self.config.resize(at + len, 0);
        Ok(self.input.read_exact(&mut self.config[at..])?)
    }

    fn keep_short_string(&mut self) -> Result<Vec<u8>, StreamError> {
        let bytes = self.short_bytes()?;
        self.config.push(bytes.len() as u8);
        self.config.extend_from_slice(&bytes);
        Ok(bytes)
    }
}

enum Opened {
    Ram,
    Skipped,
    Devices,
}
