//! A real guest (QEMU through libvirt) as a [`Source`]: looks at it, cuts it, hands over what changed.
//! Promises: memory, devices and all disks of a point are of one instant; a guest that can't be cut faithfully is
//! refused with the reason; whatever fails, the guest runs on and everything is owed again. Blocking work runs on
//! blocking threads. Called by `protect`; the contract is `capture::source`'s.

mod barrier;
mod blobs;
mod cut;
mod frozen;
mod images;
mod leave;
mod look;
mod off;
mod standing;

use crate::{
    capture::{
        disk::{DiskTarget, Disks},
        freeze::Freezer,
        memory::{
            choose::{Chooser, Kind, MemoryMode, MemoryStatus, Wishes},
            device_state::DeviceState,
        },
        quiesce::{Pauser, StandingGuard},
        source::{Attained, CaptureError, Cut, Source},
    },
    watchdog::{Found as FoundStanding, Markers, Watchdog, What, found_standing},
};
use async_trait::async_trait;
use cut::GuestCut;
use frozen::Freezing;
use lifeboat::{
    clock::Clock,
    fault,
    hypervisor::libvirt::{Domain, DomainEvent, Happened, Hypervisor, QemuProcess},
    id::{PointId, VmId},
    wire::{message::Place, order::ConsistencyWish},
};
use look::Begun;
use off::{Resting, Stood, cut::OffCut};
use standing::Standing;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{Mutex, OwnedMutexGuard, broadcast};

/// How a guest is captured.
#[derive(Clone, Debug)]
pub struct GuestSettings {
    pub vm: VmId,
    pub name: String,
    pub memory: MemoryMode,
    /// The memory engine to use; `None` for the best that fits.
    pub engine: Option<Kind>,
    /// Where QEMU may write scratch images of disks, and serve views of them.
    pub scratch_dir: PathBuf,
    /// Where it is remembered what stands on the disks of a guest that is off, and for sockets of those that read them.
    pub rest_dir: PathBuf,
    pub run_dir: PathBuf,
    /// Where changed memory goes that does not fit `staging_bytes`.
    pub spool_dir: PathBuf,
    pub staging_bytes: usize,
    /// Folder of pause markers; see [`Markers`].
    pub marker_dir: PathBuf,
    /// No pause lasts longer.
    pub pause_limit: Duration,
    /// Nor do file systems stay frozen for longer.
    pub freeze_limit: Duration,
}

impl GuestSettings {
    /// Changed memory that is staged without touching a disk.
    pub const STAGING_BYTES: usize = 256 << 20;
    /// Where scratch images are, in the state folder.
    pub const SCRATCH: &str = "scratch";
    pub const PAUSE_LIMIT: Duration = Duration::from_secs(10);
    pub const FREEZE_LIMIT: Duration = Duration::from_secs(5);
}

/// See the module.
pub struct GuestSource {
    standing: Standing,
    memory: Arc<std::sync::Mutex<MemoryStatus>>,
    freezing: Freezing,
    state: Arc<Mutex<State>>,
}

/// Everything that outlives one cut. One cut at a time owns it.
struct State {
    settings: GuestSettings,
    hypervisor: Hypervisor,
    clock: Arc<dyn Clock>,
    pauser: Pauser,
    events: broadcast::Receiver<DomainEvent>,
    /// The guest was reset, or may have been, since its memory layout was last read.
    may_have_reset: bool,
    memory: Chooser,
    disks: Option<AttachedDisks>,
    resting: Resting,
    freezer: Freezer,
    freezing: Freezing,
    /// Room that this QEMU process was shown.
    device_state: Option<(QemuProcess, DeviceState)>,
    /// A cut that was begun was neither sent nor put back.
    unfinished: bool,
    /// The QEMU process that was seen to come in by a migration: libvirt forgets that with the first pause.
    arrived: Option<QemuProcess>,
}

struct AttachedDisks {
    disks: Disks,
    targets: Vec<DiskTarget>,
    process: QemuProcess,
}

type Owned = OwnedMutexGuard<State>;

/// What a cut begins with.
enum Found {
    On(Begun),
    Off(Stood),
}

impl GuestSource {
    pub fn new(
        hypervisor: Hypervisor,
        watchdog: Arc<Watchdog>,
        clock: Arc<dyn Clock>,
        settings: GuestSettings,
    ) -> Self {
        let memory = Arc::new(std::sync::Mutex::default());
        let wishes = Wishes {
            vm: settings.vm,
            name: settings.name.clone(),
            found: FoundStanding::new(settings.marker_dir.clone()),
            mode: settings.memory,
            engine: settings.engine,
            staging_bytes: settings.staging_bytes,
            spool_dir: settings.spool_dir.clone(),
        };
        let markers = Markers::new(settings.marker_dir.clone());
        let guard = StandingGuard::new(markers.clone(), watchdog.clone());
        let freezes = markers.of(What::Freeze);
        let freezer = Freezer::new(settings.vm, freezes, watchdog.clone(), settings.freeze_limit);
        let freezing = Freezing::default();
        let standing = Standing { hypervisor: hypervisor.clone(), vm: settings.vm, guard };
        let asked = hypervisor.clone();
        let when_over = Box::new(move |vm| {
            if let Ok(domain) = asked.domain_by_uuid(vm) {
                found_standing::look(&domain);
            }
        });
        let state = State {
            pauser: Pauser::new(markers, watchdog, settings.pause_limit, when_over),
            events: hypervisor.subscribe(),
            may_have_reset: false,
            memory: Chooser::new(wishes, memory.clone()),
            disks: None,
            resting: Resting::open(settings.vm, settings.rest_dir.clone()),
            freezer,
            freezing: freezing.clone(),
            device_state: None,
            unfinished: false,
            arrived: None,
            settings,
            hypervisor,
            clock,
        };
        Self { standing, memory, freezing, state: Arc::new(Mutex::new(state)) }
    }

    /// What is asked of libvirt beside a cut that may be open.
    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Standing) -> Result<T, CaptureError> + Send + 'static,
    ) -> Result<T, CaptureError> {
        let standing = self.standing.clone();
        tokio::task::spawn_blocking(move || work(&standing)).await.map_err(failed)?
    }
}

pub use leave::{clear, leave};

#[async_trait]
impl Source for GuestSource {
    async fn begin(&mut self, point: PointId, over: &[PointId]) -> Result<Box<dyn Cut>, CaptureError> {
        fault::point("cut.begin");
        let state = self.state.clone().lock_owned().await;
        let over = over.to_vec();
        let (state, found) = blocking(state, move |state| match off::look(state, &over)? {
            Some(stood) => Ok(Found::Off(stood)),
            None => look::begin(state, &over).map(Found::On),
        })
        .await;
        match (found?, state) {
            (Found::On(begun), state) => Ok(Box::new(GuestCut::new(state, point, begun))),
            (Found::Off(stood), Some(state)) => Ok(Box::new(OffCut::open(state, point, stood).await?)),
            (Found::Off(_), None) => Err(failed("the look at the guest was cut short")),
        }
    }

    async fn rests(&mut self, over: &[PointId]) -> Result<bool, CaptureError> {
        let (state, over) = (self.state.clone().lock_owned().await, over.to_vec());
        let (_, found) = blocking(state, move |state| off::look(state, &over)).await;
        Ok(found?.is_some_and(|stood| stood.is_unchanged()))
    }

    async fn settle(&mut self, point: PointId) -> Result<(), CaptureError> {
        fault::point("cut.before-settle");
        let mut state = self.state.clone().lock_owned().await;
        if state.resting.settle(point) {
            return Ok(());
        }
        if let Some(attached) = &mut state.disks {
            attached.disks.settle(point).await.map_err(failed)?;
        }
        fault::point("cut.half-settled");
        state.memory.settle(point);
        fault::point("cut.settled");
        Ok(())
    }

    async fn place(&mut self) -> Result<Option<Place>, CaptureError> {
        let state = self.state.clone().lock_owned().await;
        blocking(state, look::place).await.1
    }

    fn memory(&self) -> MemoryStatus {
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn wish(&mut self, consistency: ConsistencyWish) {
        self.freezing.wish(consistency);
    }

    fn consistency(&self) -> Option<Attained> {
        self.freezing.attained()
    }

    async fn clear(&mut self) -> Result<(), CaptureError> {
        let state = self.state.clone().lock_owned().await;
        let cleared = blocking(state, |state| {
            clear(&state.hypervisor, state.settings.vm, state.settings.scratch_dir.clone())
        });
        cleared.await.1
    }

    async fn leave(&mut self) -> Result<(), CaptureError> {
        let state = self.state.clone().lock_owned().await;
        let left = blocking(state, |state| {
            (state.disks, state.device_state) = (None, None);
            state.resting.forget();
            state.memory.forget();
            leave(&state.hypervisor, state.settings.vm, state.settings.scratch_dir.clone())
        });
        left.await.1.map(drop)
    }

    async fn runs(&mut self) -> Result<bool, CaptureError> {
        self.aside(Standing::runs).await
    }

    async fn stand(&mut self, held: &Path) -> Result<(), CaptureError> {
        let held = held.to_owned();
        self.aside(move |standing| standing.stand(&held)).await
    }

    async fn keep_standing(&mut self) -> Result<(), CaptureError> {
        self.aside(Standing::keep).await
    }

    async fn go_on(&mut self) -> Result<(), CaptureError> {
        self.aside(Standing::go_on).await
    }

    async fn shut_off(&mut self) -> Result<(), CaptureError> {
        self.aside(Standing::shut_off).await
    }
}

impl State {
    fn domain(&self) -> Result<Domain, CaptureError> {
        let vm = self.settings.vm;
        self.hypervisor.domain_by_uuid(vm).map_err(look::domain_error)
    }

    /// Takes the events that have come; `true` if the guest was reset, or may have been.
    fn take_resets(&mut self) -> bool {
        let mut reset = false;
        loop {
            match self.events.try_recv() {
                Ok(event) => {
                    let ours = event.vm.is_none_or(|vm| vm == self.settings.vm);
                    let unsettling = matches!(
                        event.happened,
                        Happened::Reset | Happened::Started | Happened::EventsMissed
                    );
                    reset |= ours && unsettling;
                }
                Err(broadcast::error::TryRecvError::Lagged(_)) => reset = true,
                Err(broadcast::error::TryRecvError::Empty | broadcast::error::TryRecvError::Closed) => break,
            }
        }
        self.may_have_reset |= reset;
        reset
    }
}

/// Runs `work` on a blocking thread and gives the state back beside its outcome. It runs to its end even if the caller
/// stops waiting; the state then falls back to the source, which puts back at the next `begin`.
async fn blocking<T: Send + 'static>(
    mut state: Owned,
    work: impl FnOnce(&mut State) -> Result<T, CaptureError> + Send + 'static,
) -> (Option<Owned>, Result<T, CaptureError>) {
    let run = move || {
        let outcome = work(&mut state);
        (state, outcome)
    };
    match tokio::task::spawn_blocking(run).await {
        Ok((state, outcome)) => (Some(state), outcome),
        Err(error) => (None, Err(CaptureError::Failed(format!("capture ended early: {error}")))),
    }
}

fn failed(error: impl std::fmt::Display) -> CaptureError {
    CaptureError::Failed(error.to_string())
}
