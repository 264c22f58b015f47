//! The look at a guest with which every cut begins: is it there, can it be cut, what is it made of.

use super::{
    AttachedDisks, State, failed,
    frozen::{self, Freezable},
    images,
};
use crate::capture::{
    disk::{DiskError, DiskTarget, Disks},
    memory::{
        MemoryError, RamImage, Target,
        choose::{ChooseError, Look},
        device_state::DeviceState,
    },
    others,
    source::CaptureError,
};
use lifeboat::{
    fault,
    format::manifest::Image,
    hypervisor::{
        domain_xml::DomainSpec,
        libvirt::{Domain, DomainMonitor, HypervisorError, QemuProcess, XmlView},
        monitor::Monitor,
    },
    id::PointId,
    wire::message::Place,
};
use std::sync::Arc;

/// For who wants memory and can't have it.
const INSTEAD: &str = "or set `memory = \"auto\"` to protect its disks until then";

/// What the look found; it must still be so at the barrier.
pub struct Begun {
    pub domain: Domain,
    pub monitor: Arc<DomainMonitor>,
    pub spec: DomainSpec,
    /// Empty where points are of disks only.
    pub ram: Vec<RamImage>,
    /// Memory and disks, numbered.
    pub images: Vec<Image>,
    pub freezable: Freezable,
}

pub fn begin(state: &mut State, over: &[PointId]) -> Result<Begun, CaptureError> {
    let domain = state.domain()?;
    let running = domain.state().map_err(domain_error)?;
    if !running.is_active() {
        return Err(CaptureError::NotRunning(format!("domain `{}` is {running}", domain.name())));
    }
    if let Some(others) = others::somebody(&domain) {
        return Err(CaptureError::Busy(others));
    }
    let spec = read_spec(&domain)?;
    if !spec.disk_obstacles.is_empty() {
        return Err(unsupported(&spec, &spec.disk_obstacles.join(". ")));
    }
    let monitor = Arc::new(domain.monitor());
    let process = domain.process().map_err(domain_error)?;
    // Disks first: what a killed agent left there may keep QEMU from draining its I/O, and the end of the migration
    // whose head is read for memory waits for that.
    attach_disks(state, &monitor, process, &spec, over)?;
    let ram = begin_memory(state, &monitor, process, &spec, over)?;
    fault::point("cut.head-read");
    let freezable = frozen::ask(state, &domain, !ram.is_empty());
    state.unfinished = true;
    let disks = state.disks.iter().flat_map(|attached| attached.disks.images()).collect();
    let images = images::number(&ram, disks)?;
    Ok(Begun { domain, monitor, spec, ram, images, freezable })
}

/// Where the guest is, as libvirt says.
pub fn place(state: &mut State) -> Result<Option<Place>, CaptureError> {
    let domain = match state.hypervisor.domain_by_uuid(state.settings.vm) {
        Err(HypervisorError::NotFound { .. }) => return Ok(Some(Place::NotHere)),
        domain => domain.map_err(domain_error)?,
    };
    if !domain.state().map_err(domain_error)?.is_active() {
        let left = domain.was_migrated_away().map_err(domain_error)?;
        return Ok(Some(if left { Place::Left } else { Place::NotHere }));
    }
    if domain.held_for().map_err(domain_error)?.is_some() {
        return Ok(None);
    }
    let process = domain.process().map_err(domain_error)?;
    if domain.came_by_migration().map_err(domain_error)? || came_standing(&domain, process) {
        state.arrived = Some(process);
    }
    Ok(Some(Place::Here { migrated: state.arrived == Some(process) }))
}

/// A guest that was migrated while it stood, or is to stand where it came, is one whose operator suspended it, as libvirt
/// says: that it came in is told by QEMU. One that was restored standing has another reason.
fn came_standing(domain: &Domain, process: QemuProcess) -> bool {
    let suspended = matches!(domain.is_held_by_libvirt(), Ok(true));
    let completed = || {
        let answer = domain.monitor().execute("query-migrate", serde_json::json!({})).ok()?;
        Some(answer.get("status")?.as_str()? == "completed")
    };
    suspended && process.was_started_to_receive() && completed() == Some(true)
}

pub fn read_spec(domain: &Domain) -> Result<DomainSpec, CaptureError> {
    DomainSpec::read(&domain.xml(XmlView::Active).map_err(domain_error)?).map_err(failed)
}

pub fn unsupported(spec: &DomainSpec, why: &str) -> CaptureError {
    CaptureError::Unsupported(format!("domain `{}` can't be protected as it is: {why}", spec.name))
}

fn begin_memory(
    state: &mut State,
    monitor: &Arc<DomainMonitor>,
    process: QemuProcess,
    spec: &DomainSpec,
    over: &[PointId],
) -> Result<Vec<RamImage>, CaptureError> {
    state.take_resets();
    let target = Target { monitor: monitor.clone(), process, may_have_reset: state.may_have_reset };
    let look = Look { spec, target: &target };
    let ram = match state.memory.begin(&look, over.last().copied(), state.clock.now()) {
        Ok(ram) if ram.is_empty() => return Ok(ram),
        Ok(ram) => ram,
        Err(ChooseError::Unfit(why)) => {
            return Err(unsupported(spec, &format!("{why}; {INSTEAD}")));
        }
        Err(ChooseError::Memory(error)) => return Err(memory_error(error)),
    };
    let room = state.device_state.take().filter(|(known, _)| *known == process);
    let room = match room {
        Some((_, room)) if room.is_known(&**monitor).map_err(failed)? => room,
        _ => DeviceState::prepare(&**monitor).map_err(failed)?,
    };
    state.device_state = Some((process, room));
    // Only now, with the layout read anew, is a reset dealt with. One that came meanwhile is found at the barrier.
    state.may_have_reset = false;
    Ok(ram)
}

fn attach_disks(
    state: &mut State,
    monitor: &Arc<DomainMonitor>,
    process: QemuProcess,
    spec: &DomainSpec,
    over: &[PointId],
) -> Result<(), CaptureError> {
    let mut targets = Vec::new();
    for disk in spec.replicated_disks() {
        let alias = disk.alias.clone().ok_or_else(|| failed(format!("disk {} has no alias", disk.target)))?;
        targets.push(DiskTarget { target: disk.target.clone(), alias });
    }
    let known = state.disks.take().filter(|known| known.targets == targets && known.process == process);
    let mut attached = match known {
        Some(known) => known,
        None => {
            let (vm, scratch) = (state.settings.vm, state.settings.scratch_dir.clone());
            let disks = Disks::attach(monitor.clone(), vm, &targets, scratch).map_err(disk_error)?;
            AttachedDisks { disks, targets, process }
        }
    };
    // Whatever earlier cuts left unfinished is taken back, and what is owed since the basis is found out.
    let recovered = attached.disks.recover(over).map_err(disk_error);
    state.disks = Some(attached);
    recovered
}

pub fn disk_error(error: DiskError) -> CaptureError {
    match error {
        DiskError::Busy => CaptureError::Busy(error.to_string()),
        _ if error.is_permanent() => CaptureError::Unsupported(error.to_string()),
        _ => failed(error),
    }
}

fn memory_error(error: MemoryError) -> CaptureError {
    match error {
        MemoryError::Busy { .. } => CaptureError::Busy(error.to_string()),
        _ => failed(error),
    }
}

/// What protection must do about an error of libvirt's.
pub fn domain_error(error: HypervisorError) -> CaptureError {
    match error {
        HypervisorError::NotFound { .. } | HypervisorError::WrongState { .. } => {
            CaptureError::NotRunning(error.to_string())
        }
        HypervisorError::ConnectionLost { .. } | HypervisorError::Refused { .. } => {
            CaptureError::Failed(error.to_string())
        }
    }
}
