//! Guests that do real work: PostgreSQL under pgbench, and a compiler. What goes over the wire of what they change, and
//! what being protected costs them in their own work.

use crate::{
    rows::Rows,
    scene::{Scene, changed, number, p99, rpo_peaks},
};
use anyhow::Result;
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

pub fn measure(rows: &mut Rows) -> Result<()> {
    let names = ("wire_ratio_guest", "guest_slowdown_pct");
    one(rows, "database", names, 0.08)?;
    one(rows, "compile", ("wire_ratio_compile", "compile_slowdown_pct"), 0.15)
}

fn one(rows: &mut Rows, kind: &str, names: (&'static str, &'static str), aim: f64) -> Result<()> {
    let mut scene = Scene::at_work("work", 1000, kind)?;
    sleep(SETTLE);
    // In turns, so that a slow minute of this machine falls on both.
    let (mut bare, mut protected) = (0.0, 0.0);
    let (mut points, mut peaks) = (Vec::new(), Vec::new());
    let mut says = String::new();
    for _ in 0..ROUNDS {
        bare += rate(&scene);
        scene.protect("1s", "")?;
        // What comes first after a start of the agent is not what a second of work changes.
        scene.more_points(3, Duration::from_secs(600))?;
        let before = scene.controller.points(crate::scene::GUEST)?.len();
        protected += rate(&scene);
        let of_round = scene.controller.points(crate::scene::GUEST)?.split_off(before);
        // Of each round for itself: between two of them nobody promised a point.
        peaks.extend(rpo_peaks(&of_round));
        points.extend(of_round);
        says = scene.says();
        scene.unprotect()?;
    }
    let wire: u64 = points.iter().map(|point| number(point, "wire_bytes")).sum();
    let bytes: u64 = points.iter().map(changed).sum();
    let note = format!(
        "{kind}: {} points, {:.1} MB changed in each on average, RPO p99 {:.1} s; {says}; limit: the aim",
        points.len(),
        bytes as f64 / 1e6 / points.len().max(1) as f64,
        p99(&peaks),
    );
    rows.add(names.0, wire as f64 / bytes.max(1) as f64, "of changed", aim, note);
    let note = format!(
        "{kind}: {:.1} a second unprotected, {:.1} with a point a second; guest, QEMU, agent and site share this \
         machine's cores; limit: the aim",
        bare / f64::from(ROUNDS),
        protected / f64::from(ROUNDS)
    );
    rows.add(names.1, (1.0 - protected / bare.max(1e-9)) * 100.0, "%", 5.0, note);
    Ok(())
}

/// Work a second, by the guest's own count.
fn rate(scene: &Scene) -> f64 {
    let (began, before) = (Instant::now(), scene.work_done());
    sleep(ROUND);
    (scene.work_done() - before) as f64 / began.elapsed().as_secs_f64()
}

/// For the database to have read what it works on.
const SETTLE: Duration = Duration::from_secs(15);
const ROUND: Duration = Duration::from_secs(25);
const ROUNDS: u32 = 3;
