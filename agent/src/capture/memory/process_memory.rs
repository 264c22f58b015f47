//! Reading another process's memory. Promises: only reads; a short read is an error, never silence.

use super::MemoryError;
use lifeboat::hypervisor::libvirt::QemuProcess;
use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use std::io::{self, IoSliceMut};

/// Bytes asked for at once: large enough for full speed.
const AT_ONCE: usize = 4 << 20;

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

/// The writable or readable ranges that /proc/PID/maps shows, adjacent ones joined.
pub fn mapped_ranges(process: QemuProcess) -> Result<Vec<(u64, u64)>, MemoryError> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid))
        .map_err(MemoryError::io("reading the memory map of QEMU's process"))?;
    Ok(parse_maps(&maps))
}

fn parse_maps(maps: &str) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let hex = |text| u64::from_str_radix(text, 16);
        let (Ok(start), Ok(end)) = (hex(start), hex(end)) else { continue };
        if !rights.starts_with('r') {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_joined_where_they_touch_and_guard_pages_part_them() {
        let maps = "1000-2000 rw-p 0 00:00 0\n2000-3000 r--p 0 00:00 0\n3000-4000 ---p 0 00:00 0\n4000-5000 rw-p 0 0 0 [heap]\nnoise\n";
        assert_eq!(parse_maps(maps), [(0x1000, 0x3000), (0x4000, 0x5000)]);
    }
}
