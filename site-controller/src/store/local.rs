//! Objects as files below one directory, through `object_store`'s local file system with fsync on.
//!
//! Which sync makes which promise (object_store 0.14.2, `local.rs`):
//! * *bytes*: both `put` and a multipart upload write to `<name>#<n>`, `sync_all` that file, close it and check the
//!   close, all before the name exists;
//! * *name*: `put` with `Create` hard-links, an upload renames; both then fsync the parent directory. A `put`'s unlinking
//!   of `<name>#<n>` is not synced, so that it may come back after a power cut: `sweep_partials`;
//! * *directories*: object_store fsyncs those that it creates itself, but takes one that exists for durable. It need
//!   not be (created by a process that died, or by another task that has not yet synced it). So this room creates all
//!   directories itself and, once per process, syncs each one's parent, whoever created it: `ensure_directory`;
//! * *removal*: object_store syncs nothing after a delete; `delete` here syncs the parent directory;
//! * a failed `complete` leaves `<name>#<n>` behind; `finish_durable` removes it, so that a full disk does not stay full.

use crate::store::{
    error::{Cause, StoreError},
    objects::{ObjectInfo, Objects, Upload},
};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::TryStreamExt;
use lifeboat::units::ByteSize;
use nix::fcntl::{Flock, FlockArg};
use object_store::{
    GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload,
    local::LocalFileSystem, path::Path as ObjectPath,
};
use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// A directory of objects, owned by this process while it is open.
#[derive(Debug)]
pub struct LocalObjects {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    files: LocalFileSystem,
    reserve: u64,
    /// Directories whose own entry is known to be durable.
    synced: Mutex<HashSet<PathBuf>>,
    _lock: Flock<File>,
}

impl LocalObjects {
    /// Opens (or creates) the directory `root` and locks it against a second controller. Uploads leave `reserve` free.
    pub async fn open(root: &Path, reserve: ByteSize) -> Result<Self, StoreError> {
        let root = root.to_path_buf();
        blocking("opening the store", move || {
            let shown = root.display().to_string();
            let fail = |step| {
                let shown = shown.clone();
                move |error: io::Error| StoreError::disk(&shown, step, error)
            };
            create_durably(&root).map_err(fail("creating the directory"))?;
            let root = fs::canonicalize(&root).map_err(fail("resolving the directory"))?;
            // It may have been created, but not synced, by a process that died. A confined daemon need not be able to.
            match sync_parent(&root) {
                Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
                    return Err(fail("syncing the directory above it")(error));
                }
                Ok(()) | Err(_) => {}
            }
            let file = File::options().create(true).truncate(false).write(true).open(root.join(LOCK));
            let lock = Flock::lock(file.map_err(fail("opening the lock"))?, FlockArg::LockExclusiveNonblock);
            let lock = lock.map_err(|(_, errno)| match errno {
                nix::errno::Errno::EWOULDBLOCK => StoreError::InUse { path: shown.clone() },
                other => StoreError::disk(&shown, "locking", io::Error::from(other)),
            })?;
            let files = LocalFileSystem::new_with_prefix(&root)
                .map_err(|error| StoreError::disk(&shown, "opening the store", error))?
                .with_fsync(true);
            let synced = Mutex::new(HashSet::from([root.clone()]));
            Ok(Self { shared: Arc::new(Shared { root, files, reserve: reserve.0, synced, _lock: lock }) })
        })
        .await
    }

    async fn ensure_parent(&self, path: &str) -> Result<(), StoreError> {
        let (shared, path) = (self.shared.clone(), path.to_owned());
        blocking("creating the directory", move || {
            let target = shared.root.join(&path);
            let parent = target.parent().unwrap_or(&shared.root);
            shared
                .ensure_directory(parent)
                .map_err(|error| StoreError::disk(&path, "creating the directory", error))
        })
        .await
    }
}

impl Shared {
    /// Creates `directory` and those above it up to the root, and sees that each one's entry is durable.
    fn ensure_directory(&self, directory: &Path) -> io::Result<()> {
        // Held over the syncs on purpose: whoever finds a directory in the set must find it durable.
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let mut missing = Vec::new();
        let mut at = directory;
        while !synced.contains(at) {
            missing.push(at.to_path_buf());
            at = at.parent().ok_or(io::ErrorKind::InvalidInput)?;
        }
        for directory in missing.into_iter().rev() {
            match fs::create_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Ok(()) | Err(_) => sync_parent(&directory)?,
            }
            synced.insert(directory);
        }
        Ok(())
    }

    fn free(&self) -> io::Result<u64> {
        let found = nix::sys::statvfs::statvfs(&self.root)?;
        Ok(found.blocks_available().saturating_mul(found.fragment_size()))
    }

    fn check_room(&self, path: &str, more: u64) -> Result<(), StoreError> {
        let free = self.free().map_err(|error| StoreError::disk(path, "asking for free space", error))?;
        if free >= self.reserve.saturating_add(more) {
            return Ok(());
        }
        let why = format!("{} are free, {} are kept in reserve", ByteSize(free), ByteSize(self.reserve));
        Err(StoreError::Full { path: path.into(), why })
    }
}

#[async_trait]
impl Objects for LocalObjects {
    async fn put_durable(&self, path: &str, bytes: Bytes) -> Result<(), StoreError> {
        let location = location(path)?;
        self.ensure_parent(path).await?;
        let put =
            self.shared.files.put_opts(&location, PutPayload::from_bytes(bytes), PutMode::Create.into());
        put.await.map(drop).map_err(|error| translate(path, "writing", error))
    }

    async fn create(&self, path: &str) -> Result<Box<dyn Upload>, StoreError> {
        let location = location(path)?;
        self.shared.check_room(path, 0)?;
        self.ensure_parent(path).await?;
        let inner = self.shared.files.put_multipart(&location).await;
        let inner = inner.map_err(|error| translate(path, "creating", error))?;
        Ok(Box::new(LocalUpload { shared: self.shared.clone(), path: path.to_owned(), inner }))
    }

    async fn get(&self, path: &str, max: u64) -> Result<Bytes, StoreError> {
        let found = self.shared.files.get_opts(&location(path)?, GetOptions::default()).await;
        let found = found.map_err(|error| translate(path, "opening", error))?;
        if found.meta.size > max {
            return Err(StoreError::damaged(
                path,
                format!("{} bytes, at most {max} expected", found.meta.size),
            ));
        }
        found.bytes().await.map_err(|error| translate(path, "reading", error))
    }

    async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let wanted = range.end - range.start;
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..Default::default() };
        let found = self.shared.files.get_opts(&location(path)?, options).await;
        let found = found.map_err(|error| match error {
            missing @ object_store::Error::NotFound { .. } => translate(path, "opening", missing),
            // The only other refusal before reading is a range that starts past the end.
            other if !contains_io(&other) => StoreError::damaged(path, "it ends too early"),
            other => translate(path, "opening", other),
        })?;
        if found.range.end - found.range.start != wanted {
            return Err(StoreError::damaged(path, "it ends too early"));
        }
        let bytes = found.bytes().await.map_err(|error| translate(path, "reading", error))?;
        if bytes.len() as u64 == wanted {
            Ok(bytes)
        } else {
            Err(StoreError::damaged(path, "it ends too early"))
        }
    }

    async fn list(&self, directory: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let found = self.shared.files.list(Some(&location(directory)?));
        let mut found: Vec<ObjectInfo> = found
            .map_ok(|meta| ObjectInfo { path: meta.location.to_string(), bytes: meta.size })
            .try_collect()
            .await
            .map_err(|error| translate(directory, "listing", error))?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    async fn delete(&self, path: &str) -> Result<(), StoreError> {
        match self.shared.files.delete(&location(path)?).await {
            Ok(()) => {}
            // Also synced then: a former process may have removed it just before it died.
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(translate(path, "deleting", error)),
        }
        let (target, path) = (self.shared.root.join(path), path.to_owned());
        blocking("syncing the directory", move || match sync_parent(&target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            synced => synced.map_err(|error| StoreError::disk(&path, "syncing the directory", error)),
        })
        .await
    }

    async fn sweep_partials(&self) -> Result<u64, StoreError> {
        let shared = self.shared.clone();
        blocking("removing partial uploads", move || {
            let mut removed = 0;
            for room in [super::paths::VMS, super::paths::QUARANTINE] {
                removed += sweep(&shared.root.join(room))
                    .map_err(|error| StoreError::disk(room, "removing partial uploads", error))?;
            }
            Ok(removed)
        })
        .await
    }

    async fn free_bytes(&self) -> Result<u64, StoreError> {
        let free = self.shared.free();
        free.map_err(|error| StoreError::disk(&shown_of(&self.shared.root), "asking for free space", error))
    }

    async fn check_room(&self, path: &str) -> Result<(), StoreError> {
        self.shared.check_room(path, 0)
    }
}

struct LocalUpload {
    shared: Arc<Shared>,
    path: String,
    inner: Box<dyn MultipartUpload>,
}

#[async_trait]
impl Upload for LocalUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.shared.check_room(&self.path, bytes.len() as u64)?;
        let written = self.inner.put_part(PutPayload::from_bytes(bytes)).await;
        written.map_err(|error| translate(&self.path, "writing", error))
    }

    async fn finish_durable(mut self: Box<Self>) -> Result<(), StoreError> {
        let Err(error) = self.inner.complete().await else { return Ok(()) };
        let (shared, path) = (self.shared.clone(), self.path.clone());
        let leftover = shared.root.join(format!("{path}#1"));
        // The name was this upload's alone, so is its staging file. What can't be removed is swept at the next start.
        drop(tokio::task::spawn_blocking(move || fs::remove_file(leftover)).await);
        Err(translate(&path, "finishing", error))
    }

    async fn abort(mut self: Box<Self>) {
        if let Err(error) = self.inner.abort().await {
            tracing::warn!(path = self.path, %error, "a partial upload was not removed; it is at the next start");
        }
    }
}

fn location(path: &str) -> Result<ObjectPath, StoreError> {
    ObjectPath::parse(path).map_err(|error| StoreError::disk(path, "reading its name", error))
}

fn translate(path: &str, step: &'static str, error: object_store::Error) -> StoreError {
    match error {
        object_store::Error::NotFound { .. } => StoreError::Missing { path: path.into() },
        object_store::Error::AlreadyExists { .. } => StoreError::Exists { path: path.into() },
        other => StoreError::disk(path, step, other),
    }
}

fn contains_io(error: &object_store::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(found) = cause {
        if found.is::<io::Error>() {
            return true;
        }
        cause = found.source();
    }
    false
}

async fn blocking<T: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(StoreError::Disk { path: String::new(), step, source: Cause::from(error) }),
    }
}

/// Creates `directory` and what is missing above it, each synced into its parent.
fn create_durably(directory: &Path) -> io::Result<()> {
    if directory.as_os_str().is_empty() || directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        create_durably(parent)?;
    }
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        Ok(()) | Err(_) => sync_parent(directory),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Removes staging files (`<name>#<number>`) below `directory`.
fn sweep(directory: &Path) -> io::Result<u64> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            removed += sweep(&entry.path())?;
            continue;
        }
        let name = entry.file_name();
        let partial = name.to_str().and_then(|name| name.rsplit_once('#')).is_some_and(|(_, number)| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        });
        if partial {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn shown_of(path: &Path) -> String {
    path.display().to_string()
}

const LOCK: &str = "lock";
