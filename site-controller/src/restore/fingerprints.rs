//! The fingerprints of all pages of an image of a point, so that an agent can find out what differs.
//! The image is read once, verified, in the order of the packs; the fingerprints go to a nameless sparse file, 16 bytes a
//! page, so that a region's stand in one block of it and a region of zeros is a hole. Promises: memory as a restore's, disk
//! 1/256 of what the image holds; nothing is left behind however the controller ends. Called by `intake::compare`
//! and by `seed`.

use crate::restore::{Progress, Reader, RestoreError, Run};
use futures_util::TryStreamExt;
use lifeboat::{
    chunk::fingerprint::{Fingerprint, FingerprintKey, REGION_PAGES, RegionTable},
    format::manifest::ImageKind,
    page::{PAGE, pages_for},
    wire::compare::Fingerprints,
};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek64},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

/// See the module.
#[derive(Debug)]
pub struct ImageFingerprints {
    file: Arc<File>,
    key: FingerprintKey,
    bytes: u64,
}

impl ImageFingerprints {
    /// Reads the image. `progress` is told from time to time.
    pub async fn read(
        reader: &Reader,
        kind: ImageKind,
        name: &str,
        dir: &Path,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<Self, RestoreError> {
        let planned = reader.plan().image(kind, name);
        let planned = planned.ok_or_else(|| RestoreError::NoImage(name.to_owned()))?;
        let (bytes, total_bytes) = (planned.image.bytes, planned.live_bytes);
        let failed = |step| {
            let path = dir.to_path_buf();
            move |source| RestoreError::File { path, step, source }
        };
        let key = FingerprintKey::from_bytes(StdRng::from_os_rng().random());
        let regions = regions_for(bytes);
        let file = nameless_file(dir)
            .and_then(|file| file.set_len(regions * PAGE as u64).map(|()| file))
            .map_err(failed("making a nameless file for fingerprints"))?;
        let file = Arc::new(file);
        let mut done_bytes = 0;
        progress(Progress { done_bytes, total_bytes });
        let mut segments = std::pin::pin!(reader.segments(kind, name)?);
        while let Some(runs) = segments.try_next().await? {
            let pages: u64 = runs.iter().map(|run| pages_for(run.bytes.len() as u64)).sum();
            let file = file.clone();
            let noted = tokio::task::spawn_blocking(move || note(&file, &key, &runs)).await;
            noted
                .unwrap_or_else(|error| Err(io::Error::other(error)))
                .map_err(failed("writing fingerprints"))?;
            done_bytes += pages * PAGE as u64;
            progress(Progress { done_bytes, total_bytes });
        }
        Ok(Self { file, key, bytes })
    }

    pub fn key(&self) -> FingerprintKey {
        self.key
    }

    /// Of the pages of one region; zero beyond the image's end. Blocks.
    pub fn table(&self, region: u64) -> io::Result<RegionTable> {
        let mut block = [0; PAGE];
        if region < regions_for(self.bytes) {
            self.file.read_exact_at(&mut block, region * PAGE as u64)?;
        }
        Ok(table(&block))
    }

    /// Of `count` pages from `first`. Blocks.
    pub fn pages(&self, first: u64, count: u32) -> io::Result<Fingerprints> {
        let end = first.saturating_add(u64::from(count));
        let last = end.min(regions_for(self.bytes) * REGION_PAGES as u64);
        let mut bytes = vec![0; last.saturating_sub(first) as usize * Fingerprint::LEN];
        self.file.read_exact_at(&mut bytes, first.saturating_mul(Fingerprint::LEN as u64))?;
        let all = bytes.chunks_exact(Fingerprint::LEN).map(read_one);
        let mut made = Fingerprints::collect(self.key, self.bytes, all, first);
        made.extend_zeros(end);
        Ok(made)
    }

    /// Of `count` regions from `first`; further if all is zero from there on. Blocks.
    pub fn regions(&self, first: u64, count: u32) -> io::Result<Fingerprints> {
        let (mut at, asked_end) = (first, first.saturating_add(u64::from(count)));
        let regions = regions_for(self.bytes);
        let mut made = Fingerprints::collect(self.key, self.bytes, [], first);
        let mut block = [0; PAGE];
        while at < asked_end.min(regions) {
            match self.next_data(at)? {
                // All the rest is zero.
                None => at = regions,
                Some(data) if data > at => at = data.min(regions),
                Some(_) => {
                    self.file.read_exact_at(&mut block, at * PAGE as u64)?;
                    made.extend_zeros(at);
                    made.push(self.key.region(&table(&block)));
                    at += 1;
                }
            }
        }
        made.extend_zeros(at.max(asked_end));
        Ok(made)
    }

    /// The next region, from `at` on, that may not be zero.
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        let offset = i64::try_from(at * PAGE as u64).map_err(io::Error::other)?;
        match lseek64(&self.file, offset, Whence::SeekData) {
            Ok(data) => Ok(Some(u64::try_from(data).map_err(io::Error::other)? / PAGE as u64)),
            Err(Errno::ENXIO) => Ok(None),
            // A file system that does not tell holes: everything is data.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(at)),
            Err(error) => Err(error.into()),
        }
    }
}

fn regions_for(bytes: u64) -> u64 {
    pages_for(bytes).div_ceil(REGION_PAGES as u64)
}

fn read_one(bytes: &[u8]) -> Fingerprint {
    let mut one = [0; Fingerprint::LEN];
    one.copy_from_slice(bytes);
    Fingerprint::from_bytes(one)
}

fn table(block: &[u8; PAGE]) -> RegionTable {
    let mut table = [Fingerprint::ZERO; REGION_PAGES];
    for (place, bytes) in table.iter_mut().zip(block.chunks_exact(Fingerprint::LEN)) {
        *place = read_one(bytes);
    }
    table
}

fn note(file: &File, key: &FingerprintKey, runs: &[Run]) -> io::Result<()> {
    for run in runs {
        let all: Vec<u8> = run.bytes.chunks(PAGE).flat_map(|page| *key.page(page).as_bytes()).collect();
        // Zeros that were sent as such leave a hole as well.
        if all.iter().any(|byte| *byte != 0) {
            file.write_all_at(&all, run.first_page * Fingerprint::LEN as u64)?;
        }
    }
    Ok(())
}

fn nameless_file(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
        // A file system without nameless files: make one and take its name away.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) =>
        {
            let path = dir.join(format!(".fingerprints-{:032x}", StdRng::from_os_rng().random::<u128>()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        opened => opened,
    }
}
