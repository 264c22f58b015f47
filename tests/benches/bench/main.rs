//! `make bench`: what a point costs, from the cut to the restore, beside what the machine could do at best.
//! Prints a table for people and writes `<target>/bench/report.json`. Asserts nothing: a number is for reading. `cargo
//! bench --bench bench -- store` (or pipeline, journal, transport, guest, pauses, rpo, seed, work, failover) measures
//! that part alone. Reading order: [`scene`] puts the products around a real guest, for [`pauses`], [`rpo`], [`seed`]
//! and [`work`], as [`guest`] and [`failover`] do for themselves; the others measure one part each, in this process.

mod corpus;
mod database;
mod failover;
mod guest;
mod journal;
mod measure;
mod parts;
mod pauses;
mod pipeline;
mod rows;
mod rpo;
mod scene;
mod seed;
mod store;
mod transport;
mod work;

use anyhow::{Context, Result};
use corpus::Corpus;
use rows::Rows;
use std::{fs, path::Path, time::Instant};
use tokio::runtime::Runtime;

fn main() -> Result<()> {
    // Asked by `cargo test --benches` and the like for a list of tests: there are none.
    if std::env::args().any(|word| word == "--list" || word == "--test") {
        return Ok(());
    }
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("a runtime")?;
    let folder = rig::target_dir()?.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    // On the same disk as everything else, and gone afterwards.
    let scratch = tempfile::tempdir_in(&folder).context("a scratch folder")?;
    let mut rows = Rows::default();

    let measured = measure(&chosen, began, &runtime, scratch.path(), &mut rows);
    // What was measured before a part failed is not lost.
    let report = folder.join("report.json");
    fs::write(&report, serde_json::to_vec_pretty(&rows)?)
        .with_context(|| format!("writing {}", report.display()))?;
    print!("{}", rows.table());
    println!("\nprofile: {PROFILE}; as numbers: {}", report.display());
    measured
}

/// The parts that are wanted, one after the other.
fn measure(
    chosen: &[String],
    began: Instant,
    runtime: &Runtime,
    scratch: &Path,
    rows: &mut Rows,
) -> Result<()> {
    let wanted = |part: &str| chosen.is_empty() || chosen.iter().any(|word| word == part);
    let corpus = Corpus::of_programs()?;
    say(began, &format!("{} MB of pages to work on", corpus.bytes() / 1_000_000));
    if wanted("pipeline") {
        runtime.block_on(pipeline::measure(&corpus, rows))?;
        let points = database::points(scratch)?;
        say(began, "a database has worked");
        runtime.block_on(pipeline::measure_points(&points, rows))?;
        say(began, "sealing is measured");
    }
    if wanted("store") {
        runtime.block_on(store::measure(&corpus, scratch, rows))?;
        say(began, "ingest and restore are measured");
    }
    if wanted("journal") {
        runtime.block_on(journal::measure(scratch, rows))?;
        say(began, "1,800 points are taken in, folded and restored");
    }
    if wanted("transport") {
        runtime.block_on(transport::measure(scratch, rows))?;
        say(began, "the transport is measured");
    }
    if wanted("guest") {
        guest::measure(runtime, scratch, rows)?;
        say(began, "the guest has been protected");
    }
    if wanted("pauses") {
        pauses::measure(rows)?;
        say(began, "pauses are measured");
    }
    if wanted("rpo") {
        rpo::measure(rows)?;
        say(began, "RPO is measured");
    }
    if wanted("seed") {
        seed::measure(&corpus, scratch, rows)?;
        say(began, "a first point is measured");
    }
    if wanted("work") {
        work::measure(rows)?;
        say(began, "guests at work are measured");
    }
    if wanted("failover") {
        failover::measure(rows)?;
        say(began, "failovers are measured");
    }
    Ok(())
}

fn say(began: Instant, what: &str) {
    eprintln!("{:6.1} s  {what}", began.elapsed().as_secs_f64());
}

const PROFILE: &str = if cfg!(debug_assertions) { "dev (opt-level 2, checks on)" } else { "release" };
