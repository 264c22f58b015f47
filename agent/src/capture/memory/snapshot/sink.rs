//! The file in memory into which QEMU writes a snapshot, and reading it behind QEMU's back as it grows.
//! Promises: writing to it never waits; what was read is given back to the host, so that it holds only what QEMU is
//! ahead. If nobody reads it holds all memory that is not zero, until QEMU is done and closes it.

use super::super::MemoryError;
use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    time::Duration,
};

/// Bytes that are given back at once.
const GIVE_BACK: u64 = 8 << 20;
const GLANCE: Duration = Duration::from_millis(2);

pub struct Sink(File);

impl Sink {
    pub fn new() -> Result<Self, MemoryError> {
        let file = memfd_create(c"lifeboat-snapshot", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| MemoryError::io("making a file in memory for a snapshot")(errno.into()))?;
        Ok(Self(File::from(file)))
    }

    /// Gives back everything up to `end`.
    fn give_back(&self, from: u64, end: u64) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let number = |at: u64| i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
        if end > from {
            fallocate(&self.0, hole, number(from)?, number(end - from)?)?;
        }
        Ok(())
    }

    /// Gives back whatever QEMU has written so far: nobody will read it.
    pub fn waste(&self) -> io::Result<()> {
        self.give_back(0, self.0.metadata()?.len())
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Reads a sink as it grows; ends where it ends once `ended` says that nothing more comes.
pub struct Tail<'a, E> {
    sink: &'a Sink,
    ended: E,
    at: u64,
    given_back: u64,
}

impl<'a, E: FnMut() -> io::Result<bool>> Tail<'a, E> {
    pub fn new(sink: &'a Sink, ended: E) -> Self {
        Self { sink, ended, at: 0, given_back: 0 }
    }
}

impl<E: FnMut() -> io::Result<bool>> Read for Tail<'_, E> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut last_look = false;
        loop {
            let read = self.sink.0.read_at(into, self.at)?;
            self.at += read as u64;
            if self.at - self.given_back >= GIVE_BACK {
                self.sink.give_back(self.given_back, self.at)?;
                self.given_back = self.at;
            }
            if read > 0 || last_look || into.is_empty() {
                return Ok(read);
            }
            // What was written between the read and the end is read once more.
            last_look = (self.ended)()?;
            if !last_look {
                std::thread::sleep(GLANCE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::unix::fs::MetadataExt, sync::mpsc};

    #[test]
    fn a_growing_sink_is_read_to_its_end_and_what_was_read_is_given_back() {
        let sink = Sink::new().unwrap();
        let writer = sink.0.try_clone().unwrap();
        let (done, is_done) = mpsc::channel();
        let byte = |at: usize| (at / 4096) as u8 ^ at as u8;
        let all: Vec<u8> = (0..3 * GIVE_BACK as usize + 77).map(byte).collect();
        let thread = std::thread::spawn({
            let all = all.clone();
            move || {
                for part in all.chunks(1 << 20) {
                    (&writer).write_all(part).unwrap();
                }
                done.send(()).unwrap();
            }
        });
        let mut read = Vec::new();
        let mut tail = Tail::new(&sink, || Ok(is_done.try_recv().is_ok()));
        tail.read_to_end(&mut read).unwrap();
        thread.join().unwrap();
        assert!(read == all);
        let left = sink.0.metadata().unwrap().blocks() * 512;
        assert!(left < 2 * GIVE_BACK, "{left} bytes are still there");
        sink.waste().unwrap();
        let left = sink.0.metadata().unwrap().blocks() * 512;
        assert!(left <= 4096, "{left} bytes: only the page that QEMU is in the middle of may stay");
    }
}
