//! Reading another process's memory. Promises: only reads; a short read is an error, never silence.

use super::MemoryError;
use lifeboat::{hypervisor::libvirt::QemuProcess, page::PAGE};
use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use std::{
    io::{self, IoSliceMut},
    ops::Range,
};

/// Bytes asked for at once: large enough for full speed.
const AT_ONCE: usize = 4 << 20;
/// As many places as the kernel takes in one call.
const RUNS_AT_ONCE: usize = 1024;

/// Fills `into` from `address` of the process.
pub fn read(process: QemuProcess, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
    let mut done = 0;
    while done < into.len() {
        let len = (into.len() - done).min(AT_ONCE);
        let base =
            usize::try_from(address).ok().and_then(|base| base.checked_add(done)).ok_or_else(|| {
                MemoryError::Layout { what: format!("address {address:#x} lies outside of any process") }
            })?;
        let remote = [RemoteIoVec { base, len }];
        let mut local = [IoSliceMut::new(&mut into[done..done + len])];
        let step = "reading the memory of QEMU's process";
        match process_vm_readv(Pid::from_raw(process.pid), &mut local, &remote) {
            Ok(0) => return Err(MemoryError::io(step)(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => done += read,
            Err(errno) => return Err(MemoryError::io(step)(errno.into())),
        }
    }
    Ok(())
}

/// Fills `into` with the pages of `runs`, one after the other, of memory that starts at `address`.
pub fn read_runs(
    process: QemuProcess,
    address: u64,
    runs: &[Range<u64>],
    into: &mut [u8],
) -> Result<(), MemoryError> {
    let mut into = into;
    for runs in runs.chunks(RUNS_AT_ONCE) {
        let place = |run: &Range<u64>| {
            let base = run.start.checked_mul(PAGE as u64).and_then(|offset| address.checked_add(offset));
            let base = base.and_then(|base| usize::try_from(base).ok());
            let base = base.ok_or_else(|| MemoryError::Layout {
                what: format!("page {} lies outside of any process", run.start),
            })?;
            Ok(RemoteIoVec { base, len: (run.end - run.start) as usize * PAGE })
        };
        let remote = runs.iter().map(place).collect::<Result<Vec<_>, MemoryError>>()?;
        let wanted = remote.iter().map(|part| part.len).sum();
        let (part, rest) = into.split_at_mut(wanted);
        let step = "reading the memory of QEMU's process";
        match process_vm_readv(Pid::from_raw(process.pid), &mut [IoSliceMut::new(part)], &remote) {
            Ok(read) if read == wanted => {}
            Ok(_) => return Err(MemoryError::io(step)(io::ErrorKind::UnexpectedEof.into())),
            Err(errno) => return Err(MemoryError::io(step)(errno.into())),
        }
        into = rest;
    }
    Ok(())
}

/// A mapping of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub range: Range<u64>,
    pub readable: bool,
    pub writable: bool,
    /// Written here, it is written for all who map it.
    pub shared: bool,
    /// Empty where it is of no file.
    pub of: String,
}

/// What /proc/PID/maps shows.
pub fn mappings(process: QemuProcess) -> Result<Vec<Mapping>, MemoryError> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid))
        .map_err(MemoryError::io("reading the memory map of QEMU's process"))?;
    Ok(maps.lines().filter_map(parse_mapping).collect())
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?.as_bytes();
    let inode = words.nth(2)?;
    let name = words.next().unwrap_or("");
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(Mapping {
        range: hex(start)?..hex(end)?,
        readable: rights.first() == Some(&b'r'),
        writable: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
        of: if inode == "0" { String::new() } else { name.to_owned() },
    })
}

/// The readable ranges, adjacent ones joined.
pub fn mapped_ranges(process: QemuProcess) -> Result<Vec<(u64, u64)>, MemoryError> {
    Ok(joined(mappings(process)?.into_iter().filter(|mapping| mapping.readable)))
}

/// The ranges of `mappings`, adjacent ones joined.
pub fn joined(mappings: impl Iterator<Item = Mapping>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for Mapping { range, .. } in mappings {
        match ranges.last_mut() {
            Some(last) if last.1 == range.start => last.1 = range.end,
            _ => ranges.push((range.start, range.end)),
        }
    }
    ranges
}

/// Whether all of it lies in one of `ranges`.
pub fn covers(ranges: &[(u64, u64)], address: u64, bytes: u64) -> bool {
    let Some(end) = address.checked_add(bytes) else { return false };
    ranges.iter().any(|(start, stop)| *start <= address && end <= *stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_joined_where_they_touch_and_guard_pages_part_them() {
        let maps = "1000-2000 rw-p 0 00:00 0\n2000-3000 r--p 0 00:00 0\n3000-4000 ---p 0 00:00 0\n4000-5000 rw-p 0 0 0 [heap]\nnoise\n";
        let mappings = maps.lines().filter_map(parse_mapping).filter(|mapping| mapping.readable);
        assert_eq!(joined(mappings), [(0x1000, 0x3000), (0x4000, 0x5000)]);
    }

    #[test]
    fn files_and_sharing_are_told() {
        let line = "7f00-7f10 rw-s 00000000 00:01 2054 /memfd:ram (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert!(mapping.shared && mapping.writable && mapping.of == "/memfd:ram");
        assert_eq!(parse_mapping("4000-5000 rw-p 0 0 0 [heap]").unwrap().of, "");
    }

    #[test]
    fn runs_are_read_one_after_the_other() {
        let ram: Vec<u8> = (0..64 * PAGE).map(|at| (at / PAGE) as u8).collect();
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let pid = stat.split(' ').next().unwrap().parse().unwrap();
        let process = QemuProcess { pid, started: 0 };
        let mut into = vec![0; 5 * PAGE];
        read_runs(process, ram.as_ptr() as u64, &[3..4, 10..13, 63..64], &mut into).unwrap();
        assert!(into.chunks(PAGE).map(|page| page[7]).eq([3, 10, 11, 12, 63]));
        assert!(read_runs(process, u64::MAX - 5, &[9..10, 11..12], &mut into).is_err());
    }
}
