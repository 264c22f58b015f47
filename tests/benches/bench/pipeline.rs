//! The agent's pipeline: compressing and digesting groups, beside the same crates doing the same work without it.

use crate::{
    corpus::Corpus,
    measure::{Took, Watch},
    rows::Rows,
};
use anyhow::{Context, Result};
use lifeboat_agent::ship::{budget::Lanes, seal::Sealer};

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
        sealer.put(group)?;
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

/// The round with the least processor time: what others did on this machine meanwhile can only have added to it.
fn keep_best(best: &mut Option<Took>, took: Took) {
    if best.is_none_or(|best| took.cpu < best.cpu) {
        *best = Some(took);
    }
}

/// What the agent uses.
pub const LEVEL: i32 = 1;
const ROUNDS: usize = 3;
