//! Images as files and as bytes.
//! Promises: a file appears under its name only when it is complete and on stable storage; what no frame holds stays a
//! hole. Called by failover and drills.

use crate::restore::{Progress, Reader, RestoreError, Run};
use futures_util::TryStreamExt;
use lifeboat::{format::manifest::ImageKind, page::PAGE};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

impl Reader {
    /// Writes an image to a raw, sparse file. Built as `<target>.partial` and renamed once it is durable, so that a
    /// restore that was interrupted is told from one that was not; a file that is there is replaced.
    pub async fn write_file(
        &self,
        kind: ImageKind,
        name: &str,
        target: &Path,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<(), RestoreError> {
        let planned = self.plan().image(kind, name).ok_or_else(|| RestoreError::NoImage(name.to_owned()))?;
        let (bytes, total_bytes) = (planned.image.bytes, planned.live_bytes);
        let mut partial = target.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = step(&partial, "creating", {
            let partial = partial.clone();
            move || {
                let file = File::options().write(true).create(true).truncate(true).open(partial)?;
                file.set_len(bytes)?;
                Ok(Arc::new(file))
            }
        })
        .await?;
        let mut done_bytes = 0;
        progress(Progress { done_bytes, total_bytes });
        let mut segments = std::pin::pin!(self.segments(kind, name)?);
        while let Some(runs) = segments.try_next().await? {
            let file = file.clone();
            let pages = runs.iter().map(|run| run.bytes.len().div_ceil(PAGE) as u64).sum::<u64>();
            step(&partial, "writing", move || write(&file, runs)).await?;
            done_bytes += pages * PAGE as u64;
            progress(Progress { done_bytes, total_bytes });
        }
        let (from, to) = (partial.clone(), target.to_path_buf());
        step(target, "finishing", move || {
            file.sync_all()?;
            std::fs::rename(from, &to)?;
            match to.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
                Some(_) | None => File::open(".")?.sync_all(),
            }
        })
        .await
    }

    /// A small image, whole; refused if it has more than `most` bytes.
    pub async fn read_whole(&self, kind: ImageKind, name: &str, most: u64) -> Result<Vec<u8>, RestoreError> {
        let planned = self.plan().image(kind, name).ok_or_else(|| RestoreError::NoImage(name.to_owned()))?;
        let bytes = planned.image.bytes;
        let len = usize::try_from(bytes).ok().filter(|_| bytes <= most);
        let len = len.ok_or_else(|| RestoreError::TooLarge { image: name.to_owned(), bytes, most })?;
        let mut whole = vec![0; len];
        self.for_each_run(
            kind,
            name,
            |_| (),
            |first_page, bytes| {
                let from = first_page as usize * PAGE;
                whole[from..from + bytes.len()].copy_from_slice(&bytes);
                Ok::<(), RestoreError>(())
            },
        )
        .await?;
        Ok(whole)
    }
}

fn write(file: &File, runs: Vec<Run>) -> io::Result<()> {
    runs.iter().try_for_each(|run| file.write_all_at(&run.bytes, run.offset()))
}

async fn step<T: Send + 'static>(
    path: &Path,
    step: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, RestoreError> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|source| RestoreError::File { path: path.to_path_buf(), step, source })
}
