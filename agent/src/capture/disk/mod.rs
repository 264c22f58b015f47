//! Disks of a running guest: which blocks changed since the basis, and their bytes as they were at the cut.
//! Promises: a change is forgotten only by [`Disks::settle`], until then it can be owed again; a guest's write never
//! fails because of us. Calls QEMU through `hypervisor::monitor` and `capture::nbd`. Called by `capture::guest`. Methods
//! that are not `async` block.
//!
//! **Marks** are QEMU's dirty bitmaps, one bit a page. Their names carry the point since which they record and the
//! disk's size, so that a restarted agent knows what they stand for ([`marks`]). Those of points under way are a chain, so
//! that any of these may turn out to be the site's newest. They die with QEMU: then a disk is full.
//!
//! **Views** are `copy-before-write` filters, put between the guest and its disk while it stands still ([`core`]), and
//! taken away as soon as the view was read ([`sweep`]). Why not `blockdev-backup sync=none`, QEMU's usual way: up to
//! QEMU 10.0 that job knows one answer to old data that can't be kept (scratch space full or failing): the guest's
//! write fails. It also waits without limit for a scratch that hangs. The filter, added by hand, breaks the *view*
//! instead (`on-cbw-error=break-snapshot`) and waits a bounded time (`cbw-timeout`); both since QEMU 7.1. Reads of a
//! broken view are errors, never new data. A reader that is slow or dead holds nothing up: QEMU locks what it reads
//! only while it copies it out.
//!
//! If the agent is killed, the filter stays until the next `recover`: the guest goes on, each region is kept once at
//! most, in a nameless scratch file. What can't be had while a view is open (resizing, some block jobs) is refused by
//! QEMU with a clear error, and possible again a moment later.

mod core;
mod error;
mod marks;
mod names;
mod pages;
mod qemu;
mod scratch;
mod serve;
mod sweep;
#[cfg(test)]
pub mod tests;
mod view;

pub use error::DiskError;

use self::{
    core::{Core, Opened},
    qemu::Qemu,
    view::View,
};
use lifeboat::nbd::{ALLOCATION, Client, NbdError};
use lifeboat::{
    hypervisor::monitor::Monitor,
    id::{PointId, VmId},
    page::{Content, PAGE, PageRun},
};
use serde_json::Value;
use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::net::UnixStream;

/// A disk to track, as libvirt names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskTarget {
    /// `vda`
    pub target: String,
    /// `virtio-disk0`
    pub alias: String,
}

/// A disk as a point holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    pub target: String,
    pub bytes: u64,
    /// Everything is told, not only changes; what is not told is zero.
    pub full: bool,
}

/// All tracked disks of one guest. For each point: `recover`, `prepare`, (guest stopped) one transaction with
/// `mark_actions`, `marked`, (guest runs) `open_views`, `next` …, `close_views`; then `sent` or `put_back`. Some time after
/// `sent`, while no point is being cut, `settle`.
pub struct Disks {
    core: Arc<Mutex<Core>>,
    /// Views not read to their end yet, with their disk's index.
    views: VecDeque<(usize, View)>,
    /// Views that were: their connections stay until QEMU was told to end them.
    read: Vec<View>,
    changed_bytes: u64,
}

impl Disks {
    /// Finds the disks in QEMU. Refuses with the reason what can't be tracked. Changes nothing. `scratch_dir` must be
    /// writable by the agent alone, and holds what the guest overwrites while a view is read.
    pub fn attach(
        monitor: Arc<dyn Monitor>,
        vm: VmId,
        targets: &[DiskTarget],
        scratch_dir: PathBuf,
    ) -> Result<Self, DiskError> {
        let core = Core::attach(Qemu(monitor), vm, targets, scratch_dir)?;
        Ok(Self {
            core: Arc::new(Mutex::new(core)),
            views: VecDeque::new(),
            read: Vec::new(),
            changed_bytes: 0,
        })
    }

    /// Begins a point: takes away whatever an earlier one left, and finds out what is owed since its basis. `over` are the
    /// newest point known to be durable and those under way since, the basis last: should these be lost, what they
    /// carried is still known. A disk whose marks don't tell goes in full.
    pub fn recover(&mut self, over: &[PointId]) -> Result<(), DiskError> {
        self.changed_bytes = 0;
        let done = lock(&self.core).recover(over);
        self.hang_up();
        done
    }

    /// While the guest runs: makes everything that the cut needs.
    pub fn prepare(&mut self, point: PointId) -> Result<(), DiskError> {
        lock(&self.core).prepare(point)
    }

    /// For one transaction, to be run while the guest is stopped.
    pub fn mark_actions(&self) -> Vec<Value> {
        lock(&self.core).mark_actions()
    }

    /// The transaction succeeded. **To be called before the guest goes on**: it is now that the views begin. If that
    /// fails, `open_views` says why; the guest may go on all the same.
    pub fn marked(&mut self) {
        lock(&self.core).marked();
    }

    /// In the order of the targets; known after `recover`.
    pub fn images(&self) -> Vec<DiskImage> {
        lock(&self.core).images()
    }

    pub async fn open_views(&mut self) -> Result<(), DiskError> {
        let opened = self.blocking(Core::open_views).await?;
        // All connections stay with us from here on, also if one of them fails.
        for (index, opened) in opened.into_iter().enumerate() {
            let view = connect(opened).await?;
            self.views.push_back((index, view));
        }
        Ok(())
    }

    /// The next pages of a disk: its index, runs, and content (at most `GROUP_PAGES` pages of bytes, any number of
    /// zeros). `None` once everything was told. After giving up in the middle, call `put_back`.
    pub async fn next(&mut self) -> Result<Option<(usize, Vec<PageRun>, Content)>, DiskError> {
        while let Some((index, view)) = self.views.front_mut() {
            let index = *index;
            if let Some((runs, content)) = view.next().await? {
                self.changed_bytes += runs.iter().map(|run| u64::from(run.count) * PAGE as u64).sum::<u64>();
                return Ok(Some((index, runs, content)));
            }
            self.read.extend(self.views.pop_front().map(|(_, view)| view));
        }
        Ok(None)
    }

    /// Takes the views away; the marks stay.
    pub async fn close_views(&mut self) -> Result<(), DiskError> {
        let done = self.blocking(Core::close_views).await;
        self.hang_up();
        done
    }

    /// `point` is on its way to the site, whole: the next one may be cut over it.
    pub async fn sent(&mut self, point: PointId) -> Result<(), DiskError> {
        let done = self.blocking(move |core| core.sent(point)).await;
        self.hang_up();
        done
    }

    /// `point` is durable at the site: what it carried is no longer owed.
    pub async fn settle(&mut self, point: PointId) -> Result<(), DiskError> {
        self.blocking(move |core| core.settle(point)).await
    }

    /// The point failed, wherever it was: everything that was owed before it is owed again. Can be repeated.
    pub async fn put_back(&mut self) -> Result<(), DiskError> {
        let done = self.blocking(Core::put_back).await;
        self.hang_up();
        done
    }

    /// Leaves nothing of ours behind, in QEMU or on disk.
    pub async fn detach(&mut self) -> Result<(), DiskError> {
        let done = self.blocking(Core::detach).await;
        self.hang_up();
        done
    }

    /// As `detach`, for who can't wait for a future.
    pub fn leave(self) -> Result<(), DiskError> {
        lock(&self.core).detach()
    }

    /// Takes away what an earlier point left in QEMU; the marks stay. For who can't wait for a future.
    pub fn clear(self) -> Result<(), DiskError> {
        lock(&self.core).clear()
    }

    /// Bytes of the pages told since `recover`.
    pub fn changed_bytes(&self) -> u64 {
        self.changed_bytes
    }

    fn hang_up(&mut self) {
        self.views.clear();
        self.read.clear();
    }

    /// Runs `work` on a blocking thread. If the caller goes away meanwhile, it is still done to its end.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Core) -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        let core = Arc::clone(&self.core);
        let done = tokio::task::spawn_blocking(move || work(&mut lock(&core))).await;
        done.map_err(|_| DiskError::Interrupted)?
    }
}

async fn connect(opened: Opened) -> Result<View, DiskError> {
    let Opened { target, bytes, export, old, scratch, lines } = opened;
    let open = async |line, context: String| {
        let stream =
            UnixStream::from_std(line).map_err(|error| NbdError::lost("watching a socket", error))?;
        Client::open(stream, &export, &[context]).await
    };
    let clients = async {
        let changes = match lines.changes.zip(old) {
            Some((line, old)) => Some(open(line, format!("qemu:dirty-bitmap:{old}")).await?),
            None => None,
        };
        Ok((open(lines.contents, ALLOCATION.into()).await?, changes))
    };
    let (client, changes) =
        clients.await.map_err(|source| DiskError::View { target: target.clone(), source })?;
    View::new(&target, bytes, client, changes, scratch)
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}
