//! What the kernel knows of another process's pages: /proc/PID/pagemap and /proc/PID/clear_refs.
//! Promises: flags are read, and cleared, of the very process they were opened for; a kernel that keeps no such flags
//! is told by trying. Called by the engine; tests have a kernel of their own behind [`PageFlags`].

use crate::capture::memory::MemoryError;
use lifeboat::{hypervisor::libvirt::QemuProcess, page::PAGE};
use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
};

/// What is known of one page (the 64 bits of a pagemap entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    const WRITTEN: u64 = 1 << 55;
    const EXCLUSIVE: u64 = 1 << 56;
    const SWAPPED: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;

    /// Written since the flags were last cleared, or moved, or its mapping is new.
    pub fn is_written(self) -> bool {
        self.0 & Self::WRITTEN != 0
    }

    /// Nothing is there: a page of zeros, if the memory is anonymous.
    pub fn is_gone(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) == 0
    }

    /// Mapped, but not this process's own: the kernel's page of zeros, or one that was merged with another's.
    pub fn is_shared(self) -> bool {
        self.0 & (Self::PRESENT | Self::EXCLUSIVE) == Self::PRESENT
    }
}

/// A kernel that flags pages.
pub trait PageFlags: Send + Sync {
    /// The entries of the pages from `address` on.
    fn read(&self, address: u64, entries: &mut [Entry]) -> Result<(), MemoryError>;
    /// Clears the flags of all pages of the process.
    fn clear(&self) -> Result<(), MemoryError>;
}

/// The real one.
pub struct KernelFlags {
    pagemap: File,
    clear_refs: File,
}

impl KernelFlags {
    /// Opening changes nothing.
    pub fn open(process: QemuProcess) -> Result<Self, MemoryError> {
        let pid = process.pid;
        let io = MemoryError::io;
        Ok(Self {
            pagemap: File::open(format!("/proc/{pid}/pagemap")).map_err(io("opening QEMU's pagemap"))?,
            clear_refs: OpenOptions::new()
                .write(true)
                .open(format!("/proc/{pid}/clear_refs"))
                .map_err(io("opening QEMU's clear_refs"))?,
        })
    }
}

impl PageFlags for KernelFlags {
    fn read(&self, address: u64, entries: &mut [Entry]) -> Result<(), MemoryError> {
        let step = "reading QEMU's pagemap";
        let mut bytes = vec![0; entries.len() * 8];
        self.pagemap.read_exact_at(&mut bytes, address / PAGE as u64 * 8).map_err(MemoryError::io(step))?;
        for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
            *entry = Entry(u64::from_ne_bytes(bytes.try_into().unwrap_or_default()));
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), MemoryError> {
        // `4` is "soft-dirty flags, of everything that is mapped".
        match (&self.clear_refs).write(b"4") {
            Ok(1) => Ok(()),
            Ok(_) => Err(MemoryError::io("clearing QEMU's page flags")(io::ErrorKind::WriteZero.into())),
            Err(error) => Err(MemoryError::io("clearing QEMU's page flags")(error)),
        }
    }
}

/// Whether this kernel flags pages that are written: a page of our own that just was must be flagged.
pub fn kernel_has_flags() -> Result<bool, MemoryError> {
    let written = vec![1u8; 2 * PAGE];
    let address = (written.as_ptr() as u64).next_multiple_of(PAGE as u64);
    let pagemap = File::open("/proc/self/pagemap").map_err(MemoryError::io("opening our own pagemap"))?;
    let mut entry = [0; 8];
    pagemap
        .read_exact_at(&mut entry, address / PAGE as u64 * 8)
        .map_err(MemoryError::io("reading our own pagemap"))?;
    std::hint::black_box(&written);
    Ok(Entry(u64::from_ne_bytes(entry)).is_written())
}
