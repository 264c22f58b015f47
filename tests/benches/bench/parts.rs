//! What a pause would be made of where the kernel flags written pages: the steps that QEMU does, as they were measured,
//! and in place of reading all memory the flags of all pages, their clearing, and the pages that are flagged. These are
//! measured here on the memory of the same guest, natively: an entry costs the same to read whether the kernel keeps
//! that flag or not. Called by `pauses`.

use crate::{measure::percentile, rows::Rows};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use rig::Guest;
use std::{fs, io::IoSliceMut, os::unix::fs::FileExt, time::Instant};

const PAGE: usize = 4096;
const TIMES: usize = 50;
/// As many as the row is about: the most that one call takes is 1,024.
const DIRTY_PAGES: usize = 1000;
/// Of a pause, whatever finds the changed memory.
const OTHERS: [&str; 4] = ["stop", "device", "disk", "cont"];

/// `took`: what each step of each pause took, in milliseconds.
pub fn measure(rows: &mut Rows, guest: &Guest, took: &[(String, Vec<f64>)]) -> Result<()> {
    let pid = guest.qemu_pid()?;
    let (start, pages) = memory_of(pid)?;
    let scan = scan_ms(pid, start, pages)?;
    let clear = clear_ms(pid)?;
    let read = read_ms(pid, start, pages)?;
    let mib = (pages * PAGE) >> 20;
    let note =
        format!("one core reads the kernel's entries of {mib} MiB of guest memory; limit: 1.7 ms a GiB");
    rows.add("pause_part_scan_ms", scan, "ms", 1.7 * mib as f64 / 1024.0, note);
    let note =
        "the kernel walks all of QEMU's entries to clear its flags; where it keeps none, nothing is cleared";
    rows.add("pause_part_clear_ms", clear, "ms", None, note);
    let limit = (DIRTY_PAGES * PAGE) as f64 / 5e9 * 1e3;
    let note = format!("{DIRTY_PAGES} pages here and there, in one call; limit: 5 GB/s");
    rows.add("pause_part_read_ms", read, "ms", limit, note);

    let of = |name: &str| took.iter().find(|(step, _)| step == name).map(|(_, all)| all.as_slice());
    let others: Vec<&[f64]> = OTHERS.iter().filter_map(|name| of(name)).collect();
    let cuts = others.iter().map(|all| all.len()).min().unwrap_or_default();
    let pauses: Vec<f64> =
        (0..cuts).map(|cut| others.iter().map(|all| all[cut]).sum::<f64>() + scan + clear + read).collect();
    let aim = 10.0 + 0.4 * (DIRTY_PAGES * PAGE) as f64 / 1e6;
    let note = format!(
        "derived: {} of each of {cuts} pauses, which an emulated processor makes longer, scan, clear and read; limit: the aim",
        OTHERS.join(", ")
    );
    rows.add("pause_p50_derived_ms", percentile(&pauses, 0.5), "ms", None, note.clone());
    rows.add("pause_p99_derived_ms", percentile(&pauses, 0.99), "ms", aim, note);
    Ok(())
}

/// The guest's memory is by far the largest that QEMU may write: where it starts, and its pages.
fn memory_of(pid: i32) -> Result<(usize, usize)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("QEMU's memory map")?;
    let ranges = maps.lines().filter(|line| line.contains(" rw-")).filter_map(|line| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let [from, to] = [from, to].map(|text| usize::from_str_radix(text, 16));
        Some((from.ok()?, to.ok()?))
    });
    let (from, to) = ranges.max_by_key(|(from, to)| to - from).context("QEMU has no memory")?;
    Ok((from, (to - from) / PAGE))
}

fn scan_ms(pid: i32, start: usize, pages: usize) -> Result<f64> {
    let entries = fs::File::open(format!("/proc/{pid}/pagemap")).context("the kernel's page entries")?;
    let mut bytes = vec![0; pages * 8];
    let mut present = 0;
    let took = times(|| {
        entries.read_exact_at(&mut bytes, (start / PAGE * 8) as u64)?;
        let all = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry));
        present = all.filter(|entry| entry >> 55 != 0).count();
        Ok(())
    })?;
    ensure!(present > 0, "the guest has no memory at all");
    Ok(took)
}

fn clear_ms(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/clear_refs");
    // As the kernel counts: 4 is the flags of written pages.
    times(|| fs::write(&path, "4").with_context(|| format!("writing {path}")))
}

fn read_ms(pid: i32, start: usize, pages: usize) -> Result<f64> {
    let mut bytes = vec![0; DIRTY_PAGES * PAGE];
    let step = (pages / DIRTY_PAGES).max(1);
    let base = |no: usize| start + no * step % pages * PAGE;
    let remote: Vec<_> = (0..DIRTY_PAGES).map(|no| RemoteIoVec { base: base(no), len: PAGE }).collect();
    times(|| {
        let read = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(&mut bytes)], &remote)?;
        ensure!(read == DIRTY_PAGES * PAGE, "{read} bytes were read");
        Ok(())
    })
}

/// The median of several, in milliseconds.
fn times(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut took = Vec::new();
    for _ in 0..TIMES {
        let began = Instant::now();
        work()?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(percentile(&took, 0.5))
}
