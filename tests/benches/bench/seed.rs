//! The first point of a large disk, beside `qemu-img convert` (and `nbdcopy`, where it is installed) of the same disk.

use crate::{
    corpus::Corpus,
    measure::{Watch, drop_cache},
    rows::Rows,
    scene::{GUEST, PATIENCE, Scene, number, run},
};
use anyhow::{Context, Result};
use rig::{DiskFormat, GuestSpec};
use std::{fs::File, io::Write, path::Path, process::Command};

pub fn measure(corpus: &Corpus, scratch: &Path, rows: &mut Rows) -> Result<()> {
    let spec = GuestSpec::new(GUEST).memory_mib(136).pattern_mib(4).disk(DiskFormat::Raw, DISK_MIB).idle();
    let image = scratch.join("seed.raw");
    let mut file = File::create(&image).context("making the disk")?;
    let mut left = DISK_MIB << 20;
    // Other bytes each time round, or compression would find the first round again.
    for turn in 0u8.. {
        for group in corpus.groups(0) {
            if left == 0 {
                break;
            }
            if let lifeboat::page::Content::Bytes(bytes) = group.content {
                let take = left.min(bytes.len() as u64) as usize;
                let bytes: Vec<u8> = bytes[..take].iter().map(|byte| byte.wrapping_add(turn)).collect();
                file.write_all(&bytes)?;
                left -= take as u64;
            }
        }
        if left == 0 {
            break;
        }
    }
    drop(file);
    drop_cache(&image)?;
    let watch = Watch::start();
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw", "-T", "none", "-t", "none"])
        .args([&image, &scratch.join("copy.raw")]))?;
    let convert = watch.stop().gb_per_s(DISK_MIB << 20);
    std::fs::remove_file(scratch.join("copy.raw"))?;

    let mut scene = Scene::furnished("seed", LINK_MBIT, &spec, |site| {
        run(Command::new("cp").arg(&image).arg(site.host_path(spec.disk_path(0))?))
    })?;
    scene.guest.wait_for_tick(3, PATIENCE)?;
    drop_cache(&scene.source.host_path(spec.disk_path(0))?)?;
    let watch = Watch::start();
    scene.protect("60s", "")?;
    let points = scene.controller.wait_points(GUEST, 1, PATIENCE)?;
    let took = watch.stop();
    let first = points.first().context("a first point")?;
    rows.add(
        "seed_gb_per_s",
        took.gb_per_s(number(first, "disk_changed_bytes")),
        "GB/s",
        convert,
        format!(
            "{:.0} MB of disk and {:.0} MB of memory in {:.1} s, compressed, hashed twice and synced at the other site; \
             limit: qemu-img convert of the same disk to the same file system, both uncached",
            number(first, "disk_changed_bytes") as f64 / 1e6,
            number(first, "memory_changed_bytes") as f64 / 1e6,
            took.wall.as_secs_f64()
        ),
    );
    Ok(())
}

const DISK_MIB: u64 = 1024;
const LINK_MBIT: u64 = 10_000;
