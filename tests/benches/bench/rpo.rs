//! How old the newest point is at its worst, over links of two speeds, for a guest that changes 3 MB of memory and 1 MB
//! of disk a second.

use crate::{
    rows::Rows,
    scene::{GUEST, PATIENCE, Scene, changed, number, p99, rpo_peaks},
};
use anyhow::Result;
use rig::{DiskFormat, GuestSpec};

pub fn measure(rows: &mut Rows) -> Result<()> {
    over(rows, "rpo_p99_100mbit_s", 100)?;
    over(rows, "rpo_p99_1gbit_s", 1000)
}

fn over(rows: &mut Rows, row: &'static str, mbit: u64) -> Result<()> {
    // Each tick of 100 ms: 75 pages of memory, 25 blocks of disk.
    let spec =
        GuestSpec::new(GUEST).memory_mib(256).disk(DiskFormat::Raw, 256).dirty_kib(300).disk_writes(25);
    let mut scene = Scene::witness("rpo", mbit, &spec)?;
    scene.protect("1s", "")?;
    scene.more_points(3, PATIENCE)?;
    let points = scene.more_points(POINTS, PATIENCE)?;
    let first = points.first().map_or(0, |point| number(point, "cut_at"));
    let last = points.last().map_or(0, |point| number(point, "cut_at"));
    let seconds = last.saturating_sub(first) as f64 / 1e3;
    let rate = points.iter().skip(1).map(changed).sum::<u64>() as f64 / 1e6 / seconds.max(0.001);
    let wire = points.iter().skip(1).map(|point| number(point, "wire_bytes")).sum::<u64>() as f64 / 1e6;
    let note = format!(
        "{} points, asked for 1 a second; {rate:.1} MB/s changed, {:.1} Mbit/s of the link used; {}; limit: the aim",
        points.len(),
        wire * 8.0 / seconds.max(0.001),
        scene.says()
    );
    rows.add(row, p99(&rpo_peaks(&points)), "s", 2.0, note);
    Ok(())
}

const POINTS: usize = 60;
