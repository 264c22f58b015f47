//! The guard: a process and a service of its own, that pauses bound guests whose leases have run out, whatever became of
//! the agent. Promises: it goes by what is on disk alone, so that one which is started anew knows what its predecessor
//! knew; a libvirt that hangs holds up neither other guests nor the end: at the hard limit the guest's QEMU is stopped
//! by the kernel, and goes on only when a lease lets it. It resumes nothing else. Run by `lifeboat-agent guard`.

use super::{FenceError, keeper::pause};
use crate::{config::AgentConfig, witness::files::Files};
use lifeboat::{
    boot,
    hypervisor::libvirt::{Hypervisor, HypervisorError, QemuProcess},
    id::VmId,
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        mman::{MlockAllFlags, mlockall},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use std::{
    collections::BTreeMap,
    fs::File,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, TryRecvError, channel},
    },
    time::Duration,
};

/// A connection that is made when it is needed; it makes itself anew.
struct Libvirt {
    uri: String,
    link: Mutex<Option<Hypervisor>>,
}

impl Libvirt {
    fn get(&self) -> Result<Hypervisor, FenceError> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if link.is_none() {
            *link = Some(Hypervisor::connect(&self.uri)?);
        }
        Ok(link.clone().map_or_else(|| Hypervisor::connect(&self.uri), Ok)?)
    }
}

/// What is done about one guest whose time is over.
#[derive(Default)]
struct Row {
    /// A try through libvirt that is under way.
    trying: Option<Receiver<bool>>,
    /// libvirt has said that it stands or is off, when no lease held.
    stands: bool,
    /// Stopped by the kernel, by us.
    stopped: bool,
    said: bool,
}

/// Runs until it is ended.
pub fn run(config: &AgentConfig) -> Result<(), FenceError> {
    let failed = |what| move |source| FenceError::File { what, source };
    let files = Files::open(&config.state_dir, &config.run_dir).map_err(failed("opening its folders"))?;
    let lock = File::create(files.lock()).map_err(failed("opening its lock"))?;
    let _only = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| FenceError::GuardRuns)?;
    // It must not be what the kernel takes when memory runs out, nor wait for a disk.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    let mut rows = BTreeMap::<VmId, Row>::new();
    let libvirt = Arc::new(Libvirt { uri: config.libvirt.clone(), link: Mutex::default() });
    tracing::info!("guarding");
    loop {
        std::thread::sleep(LOOK);
        let bound = match files.all_bound() {
            Ok(bound) => bound,
            Err(error) => {
                tracing::error!(%error, "which VMs are bound can't be read");
                continue;
            }
        };
        // A copy that is not bound any more is fenced, or free: what is stopped stays so until `fence` or its operator ends it.
        rows.retain(|vm, _| bound.contains(vm));
        for vm in bound {
            look(&files, &libvirt, vm, rows.entry(vm).or_default());
        }
        if let Err(error) = files.beat(boot::uptime_ms()) {
            tracing::error!(%error, "that this host is guarded can't be told to its agent");
        }
    }
}

fn look(files: &Files, libvirt: &Arc<Libvirt>, vm: VmId, row: &mut Row) {
    let (now, until) = (boot::uptime_ms(), files.until(vm).unwrap_or_default());
    if now < until.soft {
        if let Some((pid, started)) = files.stopped(vm) {
            tracing::warn!(%vm, "a lease holds again: its QEMU goes on");
            signal(QemuProcess { pid, started }, Signal::SIGCONT);
            let _ = files.forget_stopped(vm);
        }
        // A try that still hangs in libvirt may pause it yet; it is noted as ours then.
        (row.stands, row.stopped, row.said) = (false, false, false);
        return;
    }
    if !std::mem::replace(&mut row.said, true) {
        tracing::warn!(%vm, "no lease holds any more: this guest may not run here");
    }
    match row.trying.as_ref().map(Receiver::try_recv) {
        Some(Ok(stands)) => (row.stands, row.trying) = (stands, None),
        Some(Err(TryRecvError::Disconnected)) => row.trying = None,
        Some(Err(TryRecvError::Empty)) | None => {}
    }
    if row.trying.is_none() && !row.stopped {
        let (done, trying) = channel();
        let (files, libvirt) = (files.clone(), libvirt.clone());
        row.trying = Some(trying);
        std::thread::spawn(move || {
            let paused = libvirt.get().and_then(|hypervisor| through_libvirt(&files, &hypervisor, vm));
            if let Err(error) = &paused {
                tracing::warn!(%vm, %error, "a guest without a lease could not be paused yet");
            }
            // Nobody may be waiting any more.
            let _ = done.send(paused.is_ok());
        });
    }
    if now >= until.hard && !row.stands && !row.stopped {
        stop(files, vm, row);
    }
}

/// Returns once libvirt has said that the guest stands, or that there is none.
fn through_libvirt(files: &Files, hypervisor: &Hypervisor, vm: VmId) -> Result<(), FenceError> {
    let domain = match hypervisor.domain_by_uuid(vm) {
        Err(HypervisorError::NotFound { .. }) => return Ok(()),
        found => found?,
    };
    if !domain.state()?.is_active() || domain.is_held_by_libvirt()? {
        return Ok(());
    }
    // Whoever may is to resume it, also if we end here.
    let noted = |done: std::io::Result<()>| {
        done.map_err(|source| FenceError::File { what: "noting that the guest is paused", source })
    };
    noted(files.note_paused(vm))?;
    pause(&domain)?;
    // Once more: an agent that found it running has taken the first note for done with.
    noted(files.note_paused(vm))?;
    tracing::warn!(%vm, "paused: no lease lets it run");
    Ok(())
}

fn stop(files: &Files, vm: VmId, row: &mut Row) {
    // Off, or another one's to end.
    let Ok(process) = QemuProcess::find(vm) else { return };
    tracing::error!(%vm, pid = process.pid, "libvirt has not paused it in time: its QEMU is stopped");
    let _ = files.note_paused(vm);
    let _ = files.note_stopped(vm, process.pid, process.started);
    row.stopped = signal(process, Signal::SIGSTOP);
}

fn signal(process: QemuProcess, what: Signal) -> bool {
    process.is_alive() && kill(Pid::from_raw(process.pid), what).is_ok()
}

const LOOK: Duration = Duration::from_millis(100);
