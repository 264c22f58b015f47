//! The agent's pipeline: compressing and digesting groups, beside the same crates doing the same work without it.

use crate::{
    corpus::Corpus,
    database::{self, Changed},
    measure::{Took, Watch},
    rows::Rows,
};
use anyhow::{Context, Result};
use lifeboat::{chunk::digest::page_check, id::PointId, page::PAGE};
use lifeboat_agent::ship::{
    base_cache::BaseCache,
    budget::Lanes,
    delta::{Deltas, Load},
    seal::Sealer,
};
use std::{collections::HashMap, sync::Arc};

pub async fn measure(corpus: &Corpus, rows: &mut Rows) -> Result<()> {
    let lanes = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    let (mut best, mut bare) = (None, None);
    let mut packed = 0;
    for _ in 0..ROUNDS {
        let (took, sealed) = seal(corpus, lanes).await?;
        packed = sealed;
        keep_best(&mut best, took);
        keep_best(&mut bare, bare_crates(corpus)?);
    }
    let (sealed, bare) = best.zip(bare).context("at least one round")?;
    let (bytes, wall) = (corpus.bytes(), sealed.gb_per_s(corpus.bytes()));
    rows.add(
        "seal",
        sealed.gb_per_cpu_s(bytes),
        "GB/cpu-s",
        bare.gb_per_cpu_s(bytes),
        format!(
            "zstd {LEVEL} + blake3 of pages that pack to {:.0} %; {lanes} lanes: {wall:.2} GB/s; limit: the bare crates",
            100.0 * packed as f64 / bytes as f64
        ),
    );
    Ok(())
}

async fn seal(corpus: &Corpus, lanes: usize) -> Result<(Took, u64)> {
    let (watch, mut packed) = (Watch::start(), 0);
    let mut sealer = Sealer::new(LEVEL, Lanes::new(lanes));
    for group in corpus.groups(0) {
        while sealer.is_full() {
            packed += sealer.take().await?.map_or(0, |frame| frame.encoded_len() as u64);
        }
        sealer.put(Load::Pages(group))?;
    }
    while let Some(frame) = sealer.take().await? {
        packed += frame.encoded_len() as u64;
    }
    Ok((watch.stop(), packed))
}

fn bare_crates(corpus: &Corpus) -> Result<Took> {
    let watch = Watch::start();
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    for chunk in corpus.chunks() {
        std::hint::black_box((compressor.compress(&chunk)?, blake3::hash(&chunk)));
    }
    Ok(watch.stop())
}

/// A database's points, as they come from a guest: what is left of them on the wire, and what that costs.
pub async fn measure_points(points: &[Changed], rows: &mut Rows) -> Result<()> {
    let lanes = 2 * std::thread::available_parallelism().map_or(1, usize::from);
    // The first point is complete, and no measure of what follows.
    let changed: u64 = points.iter().skip(1).map(Changed::bytes).sum();
    let disk: u64 = points.iter().skip(1).map(Changed::disk_bytes).sum();
    let (_, whole) = ship(points, 0, lanes).await?;
    let (mut best, mut bare, mut wire) = (None, None, 0);
    for _ in 0..ROUNDS {
        let (took, sent) = ship(points, BUDGET, lanes).await?;
        wire = sent;
        keep_best(&mut best, took);
        keep_best(&mut bare, bare_points(points)?);
    }
    let (best, bare) = best.zip(bare).context("at least one round")?;
    let share = |bytes: u64| bytes as f64 / changed as f64;
    rows.add(
        "wire_ratio_database",
        share(wire),
        "wire/changed",
        share(whole),
        format!(
            "{}, {:.1} MB of memory and {:.1} MB of disk changed; limit: the same points with whole pages",
            database::WHAT,
            (changed - disk) as f64 / 1e6,
            disk as f64 / 1e6,
        ),
    );
    rows.add(
        "agent_pipeline_gb_per_cpu_s",
        best.gb_per_cpu_s(changed),
        "GB/cpu-s",
        bare.gb_per_cpu_s(changed),
        "the same points: compared, words and references found, zstd 1 + blake3; limit: memcmp, memcpy, xxh3, zstd and \
         blake3 bare, over the same bytes",
    );
    Ok(())
}

/// Ships points; tells what all but the first took.
async fn ship(points: &[Changed], budget: u64, lanes: usize) -> Result<(Took, u64)> {
    let mut deltas = Deltas::new(Arc::new(BaseCache::new(budget)));
    let mut basis = None;
    // Making groups is an engine's work.
    let groups: Vec<Vec<_>> = points.iter().map(|point| point.groups().collect()).collect();
    let (mut watch, mut wire) = (Watch::start(), 0);
    for ((no, point), groups) in (0u128..).zip(points).zip(groups) {
        if no == 1 {
            (watch, wire) = (Watch::start(), 0);
        }
        let mut sealer = Sealer::new(LEVEL, Lanes::new(lanes));
        let id = PointId::from_bytes((no + 1).to_be_bytes());
        deltas.begin(id, basis.replace(id), true);
        deltas.all_images(&point.images);
        for group in groups {
            deltas.put(group);
            while let Some(load) = deltas.ready() {
                wire += put(&mut sealer, load).await?;
            }
        }
        while let Some(load) = deltas.finish_next() {
            wire += put(&mut sealer, load).await?;
        }
        while let Some(frame) = sealer.take().await? {
            wire += frame.encoded_len() as u64;
        }
        deltas.durable(id);
    }
    Ok((watch.stop(), wire))
}

async fn put(sealer: &mut Sealer, load: Load) -> Result<u64> {
    let mut packed = 0;
    while sealer.is_full() {
        packed += sealer.take().await?.map_or(0, |frame| frame.encoded_len() as u64);
    }
    sealer.put(load)?;
    Ok(packed)
}

/// The least that the same work takes: each changed page compared, copied and checked, what is then sent packed and
/// digested.
fn bare_points(points: &[Changed]) -> Result<Took> {
    let mut deltas = Deltas::new(Arc::new(BaseCache::new(BUDGET)));
    let (mut basis, mut loads) = (None, Vec::new());
    for (no, point) in (0u128..).zip(points) {
        let id = PointId::from_bytes((no + 1).to_be_bytes());
        deltas.begin(id, basis.replace(id), true);
        deltas.all_images(&point.images);
        let mut put = |load: Load| {
            if no > 0 {
                loads.push(load);
            }
        };
        for group in point.groups() {
            deltas.put(group);
            std::iter::from_fn(|| deltas.ready()).for_each(&mut put);
        }
        std::iter::from_fn(|| deltas.finish_next()).for_each(&mut put);
    }
    let raw = loads.iter().filter_map(|load| match load {
        Load::Pages(group) => match &group.content {
            lifeboat::page::Content::Bytes(raw) => Some(raw),
            lifeboat::page::Content::Zero => None,
        },
        Load::Words(list) => Some(&list.raw),
        Load::Refs(list) => Some(&list.raw),
    });
    let raw: Vec<_> = raw.collect();
    // What is kept of each page that changes, and where: finding the place is not the crates' work.
    let mut places = HashMap::new();
    let mut place = |of| {
        let next = places.len();
        *places.entry(of).or_insert(next) * PAGE
    };
    let places_of = points.iter().flat_map(|point| point.places().map(&mut place).collect::<Vec<_>>());
    let places_of: Vec<usize> = places_of.collect();
    let mut kept = vec![1u8; places.len() * PAGE];
    let mut visits = points.iter().flat_map(Changed::pages).zip(places_of);
    let first = points.first().map_or(0, |point| point.bytes() as usize / PAGE);
    for (page, at) in visits.by_ref().take(first) {
        kept[at..at + PAGE].copy_from_slice(page);
    }
    let watch = Watch::start();
    for (page, at) in visits {
        let base = &mut kept[at..at + PAGE];
        std::hint::black_box((**page == *base, page_check(page)));
        base.copy_from_slice(page);
    }
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    for raw in raw {
        std::hint::black_box((compressor.compress(raw)?, blake3::hash(raw)));
    }
    Ok(watch.stop())
}

/// The round with the least processor time: what others did on this machine meanwhile can only have added to it.
fn keep_best(best: &mut Option<Took>, took: Took) {
    if best.is_none_or(|best| took.cpu < best.cpu) {
        *best = Some(took);
    }
}

/// What the agent uses.
pub const LEVEL: i32 = 1;
const ROUNDS: usize = 3;
/// `memory_budget` as it is unless set.
const BUDGET: u64 = 256 << 20;
