//! From a point in the store to what QEMU starts from: raw disks, and a libvirt save image that holds the memory.
//! Promises: the memory image is an ordinary migration stream, composed in store order at the store's speed; nothing
//! larger than a few segments of pages is in memory. Called by `runbook`.

use super::progress::Watcher;
use crate::restore::{Progress, Reader, RestoreError};
use futures_util::TryStreamExt;
use lifeboat::{
    format::manifest::{ImageKind, blob},
    page::PAGE,
    qemu::{
        save_image::{SaveHeader, SaveImageError},
        stream::{RamBlock, StreamError, StreamWriter},
    },
};
use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Device states and XML are read whole; a guest with many devices has a few MiB.
const BLOB_MAX: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("composing the memory image: {0}")]
    Stream(#[from] StreamError),
    #[error("composing the memory image: {0}")]
    SaveImage(#[from] SaveImageError),
    #[error("{}: writing the memory image failed: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("the point's {0} is not text")]
    NotText(&'static str),
}

/// One blob of the point, as text.
pub async fn text_blob(reader: &Reader, name: &'static str) -> Result<String, ImageError> {
    let bytes = reader.read_whole(ImageKind::Blob, name, BLOB_MAX).await?;
    String::from_utf8(bytes).map_err(|_| ImageError::NotText(name))
}

/// Bytes that all images of the point take when they are written out, at the most.
pub fn bytes_needed(reader: &Reader) -> u64 {
    reader.plan().images().iter().fold(0u64, |sum, image| sum.saturating_add(image.live_bytes))
}

/// Writes disk `target` of the point to `file`, whole and synced.
pub async fn write_disk(
    reader: &Reader,
    target: &str,
    file: &Path,
    watcher: &Watcher,
) -> Result<(), RestoreError> {
    let step = format!("disk {target}");
    let tell = |progress: Progress| watcher.bytes(&step, progress.done_bytes, progress.total_bytes);
    reader.write_file(ImageKind::Disk, target, file, tell).await
}

/// Writes a save image with `xml` and the point's memory and devices.
pub async fn write_save_image(
    reader: &Reader,
    xml: String,
    was_running: bool,
    path: &Path,
    watcher: &Watcher,
) -> Result<(), ImageError> {
    let config = reader.read_whole(ImageKind::Blob, blob::MACHINE_CONFIG, BLOB_MAX).await?;
    let devices = reader.read_whole(ImageKind::Blob, blob::DEVICE_STATE, BLOB_MAX).await?;
    let ram = reader.plan().images().iter().filter(|planned| planned.image.kind == ImageKind::Ram);
    let blocks: Vec<RamBlock> = ram
        .clone()
        .map(|planned| RamBlock { name: planned.image.name.clone(), bytes: planned.image.bytes })
        .collect();
    let total = ram.map(|planned| planned.live_bytes).sum();
    let header = SaveHeader { xml, cookie: None, was_running }.compose()?;
    let begin = {
        let (path, blocks) = (path.to_path_buf(), blocks.clone());
        blocking(path.clone(), move || {
            let failed = |source| ImageError::Write { path: path.clone(), source };
            let mut file = File::create(&path).map_err(failed)?;
            file.write_all(&header).map_err(failed)?;
            Ok(StreamWriter::begin(file, &config, blocks)?)
        })
    };
    let mut writer = begin.await?;
    let mut done = 0;
    for (at, block) in blocks.iter().enumerate() {
        let mut segments = std::pin::pin!(reader.segments(ImageKind::Ram, &block.name)?);
        while let Some(runs) = segments.try_next().await? {
            done += runs.iter().map(|run| run.bytes.len() as u64).sum::<u64>();
            writer = blocking(path.to_path_buf(), move || {
                for run in runs {
                    writer.pages(at, run.first_page, &run.bytes)?;
                }
                Ok(writer)
            })
            .await?;
            watcher.bytes("memory", done, total);
        }
    }
    blocking(path.to_path_buf(), move || Ok(writer.finish(&devices).map(drop)?)).await
}

async fn blocking<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let died = |error| ImageError::Write { path, source: io::Error::other(error) };
    tokio::task::spawn_blocking(work).await.map_err(died)?
}

const _: () = assert!(PAGE == 4096, "QEMU's migration stream is made of 4 KiB pages on x86");
