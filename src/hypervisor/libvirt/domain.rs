//! One domain and its monitor. Handles name the domain by UUID and are looked up again on each new connection.

use super::{
    connection::{Hypervisor, lock},
    error::HypervisorError,
    job,
    process::QemuProcess,
};
use crate::{
    hypervisor::guest_agent::{AgentChannel, GuestAgent},
    hypervisor::monitor::{Monitor, MonitorError, read_reply},
    hypervisor::registers,
    id::VmId,
};
use serde_json::{Value, json};
use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    fmt,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::{Arc, Mutex},
    time::Duration,
};
use virt::{
    domain::{
        DomainPausedReason, DomainRunningReason, DomainShutoffReason, DomainState as VirtState,
        DomainStateReason as StateReason,
    },
    enumutil::Enum,
    error::Error,
    sys,
};

/// Whether a domain runs, as libvirt sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainState {
    Running,
    Paused,
    /// Asleep at its own wish (S3).
    Suspended,
    ShuttingDown,
    ShutOff,
    Crashed,
}

impl DomainState {
    /// Whether there is a QEMU process.
    pub fn is_active(self) -> bool {
        !matches!(self, Self::ShutOff | Self::Crashed)
    }
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended by the guest",
            Self::ShuttingDown => "shutting down",
            Self::ShutOff => "shut off",
            Self::Crashed => "crashed",
        })
    }
}

/// Which XML of a domain. Both come with security information (passwords of disks and consoles).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XmlView {
    /// As it runs now; the persistent definition where it does not run.
    Active,
    /// As it will start next time.
    Inactive,
}

/// How a restored guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAs {
    Running,
    Paused,
}

/// A domain. Cheap to clone.
#[derive(Clone)]
pub struct Domain {
    hypervisor: Hypervisor,
    vm: VmId,
    name: Arc<str>,
    /// libvirt's handle, and the number of the connection it belongs to.
    handle: Arc<Mutex<Option<(u64, virt::domain::Domain)>>>,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({} {})", self.name, self.vm)
    }
}

impl Domain {
    pub(super) fn attach(hypervisor: Hypervisor, vm: VmId) -> Result<Self, HypervisorError> {
        let mut domain =
            Self { hypervisor, vm, name: vm.to_string().into(), handle: Arc::new(Mutex::new(None)) };
        domain.name = domain.with("looking it up", |found| found.name())?.into();
        Ok(domain)
    }

    pub fn uuid(&self) -> VmId {
        self.vm
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    pub fn state(&self) -> Result<DomainState, HypervisorError> {
        let (state, _reason) = self.with("asking its state", virt::domain::Domain::state)?;
        Ok(match state {
            Enum::Known(VirtState::Running | VirtState::Blocked) => DomainState::Running,
            Enum::Known(VirtState::Paused) => DomainState::Paused,
            Enum::Known(VirtState::PMSuspended) => DomainState::Suspended,
            Enum::Known(VirtState::Shutdown) => DomainState::ShuttingDown,
            Enum::Known(VirtState::Crashed) => DomainState::Crashed,
            Enum::Known(VirtState::Shutoff | VirtState::NoState) | Enum::Unknown(_) => DomainState::ShutOff,
        })
    }

    /// Whether libvirt knows a reason of its own, or of somebody who uses it, for which the guest stands: an operator's
    /// suspend, a save, a dump, a migration. A `stop` that went past libvirt to QEMU's monitor leaves none.
    pub fn is_held_by_libvirt(&self) -> Result<bool, HypervisorError> {
        let (state, reason) = self.with("asking its state", virt::domain::Domain::state)?;
        let unknown = Enum::Known(StateReason::Paused(Enum::Known(DomainPausedReason::Unknown)));
        Ok(state == Enum::Known(VirtState::Paused) && reason != unknown)
    }

    /// Why it does not run although nobody wanted that: it is gone, or QEMU stopped it. `None` also of a guest that its
    /// operator suspended, or that sleeps.
    pub fn came_to_grief(&self) -> Result<Option<&'static str>, HypervisorError> {
        let (state, reason) = self.with("asking its state", virt::domain::Domain::state)?;
        Ok(match (state, reason) {
            (Enum::Known(VirtState::Crashed), _) => Some("crashed"),
            (Enum::Known(VirtState::Shutoff | VirtState::NoState), _) => Some("is shut off"),
            (_, Enum::Known(StateReason::Paused(Enum::Known(reason)))) => match reason {
                DomainPausedReason::IOError => Some("was stopped by an I/O error"),
                DomainPausedReason::Watchdog => Some("was stopped by its watchdog device"),
                DomainPausedReason::Crashed => Some("was stopped as its system panicked"),
                _ => None,
            },
            _ => None,
        })
    }

    /// Whether it runs, and no processor of it will ever do anything again. What QEMU does not tell is no proof.
    pub fn is_halted_for_good(&self) -> bool {
        self.monitor().human("info registers -a").is_ok_and(|text| registers::halted_for_good(&text))
    }

    /// The operation of libvirt's own for which the guest stands, in libvirt's words. Not asked of libvirt's job statistics:
    /// libvirtd 9.0 was seen to crash when these were asked for while a backup was begun.
    pub fn held_for(&self) -> Result<Option<&'static str>, HypervisorError> {
        let (_, reason) = self.with("asking its state", virt::domain::Domain::state)?;
        let Enum::Known(StateReason::Paused(Enum::Known(reason))) = reason else { return Ok(None) };
        Ok(match reason {
            DomainPausedReason::Save => Some("save"),
            DomainPausedReason::Dump => Some("dump"),
            DomainPausedReason::Migration
            | DomainPausedReason::PostCopy
            | DomainPausedReason::PostCopyFailed => Some("migration"),
            DomainPausedReason::Snapshot | DomainPausedReason::FromSnapshot => Some("snapshot"),
            DomainPausedReason::StartingUp => Some("start"),
            DomainPausedReason::Unknown
            | DomainPausedReason::User
            | DomainPausedReason::IOError
            | DomainPausedReason::Watchdog
            | DomainPausedReason::ShuttingDown
            | DomainPausedReason::Crashed
            | DomainPausedReason::APIError => None,
        })
    }

    /// The operation of libvirt's own that is under way, in libvirt's words: [`super::SAVE`], [`super::MIGRATION_OUT`]
    /// and so on. Known from its first moment on, before it is known to QEMU. `None` also where libvirt's file can't be
    /// read.
    pub fn job(&self) -> Option<String> {
        job::under_way(&self.name)
    }

    /// Cancels the operation that is under way: whoever began it is told so.
    pub fn abort_job(&self) -> Result<(), HypervisorError> {
        self.with("cancelling what is under way", job::abort)
    }

    /// Whether it runs here because it was migrated here. libvirt says so until the first pause.
    pub fn came_by_migration(&self) -> Result<bool, HypervisorError> {
        let (_, reason) = self.with("asking its state", virt::domain::Domain::state)?;
        let came = [DomainRunningReason::Migrated, DomainRunningReason::PostCopy];
        Ok(came.into_iter().any(|came| reason == Enum::Known(StateReason::Running(Enum::Known(came)))))
    }

    /// Whether it does not run here because it was migrated to another host.
    pub fn was_migrated_away(&self) -> Result<bool, HypervisorError> {
        let (_, reason) = self.with("asking its state", virt::domain::Domain::state)?;
        let gone = StateReason::Shutoff(Enum::Known(DomainShutoffReason::Migrated));
        Ok(reason == Enum::Known(gone))
    }

    pub fn is_persistent(&self) -> Result<bool, HypervisorError> {
        self.with("asking whether it is persistent", virt::domain::Domain::is_persistent)
    }

    pub fn xml(&self, view: XmlView) -> Result<String, HypervisorError> {
        let flags = match view {
            XmlView::Active => sys::VIR_DOMAIN_XML_SECURE,
            XmlView::Inactive => sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_INACTIVE,
        };
        self.with("reading its XML", |domain| domain.xml_desc(flags))
    }

    /// Starts it from power-off.
    pub fn start(&self) -> Result<(), HypervisorError> {
        self.with("starting it", virt::domain::Domain::create)
    }

    /// Ends its QEMU at once.
    pub fn destroy(&self) -> Result<(), HypervisorError> {
        self.with("ending it", virt::domain::Domain::destroy)
    }

    /// Removes its definition, with the firmware variables and managed save that belong to it.
    pub fn undefine(&self) -> Result<(), HypervisorError> {
        let flags = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | sys::VIR_DOMAIN_UNDEFINE_NVRAM
            | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA;
        self.with("undefining it", |domain| domain.undefine_flags(flags))
    }

    pub fn suspend(&self) -> Result<(), HypervisorError> {
        self.with("pausing it", virt::domain::Domain::suspend)
    }

    pub fn resume(&self) -> Result<(), HypervisorError> {
        self.with("resuming it", virt::domain::Domain::resume)
    }

    /// Writes its memory and devices to a file, whole or not at all, and ends its QEMU; the guest comes back paused. A guest
    /// that stood stays as it is where this fails.
    pub fn save_paused(&self, file: &str) -> Result<(), HypervisorError> {
        self.with(&format!("saving it to {file}"), |domain| job::save_paused(domain, file))
    }

    /// Whether it is shut off because it was saved: to a file, or as a managed save.
    pub fn was_saved(&self) -> Result<bool, HypervisorError> {
        let (_, reason) = self.with("asking its state", virt::domain::Domain::state)?;
        Ok(reason == Enum::Known(StateReason::Shutoff(Enum::Known(DomainShutoffReason::Saved))))
    }

    /// Makes its managed save run when it is started, even if the guest stood when it was saved. `false` if it has none.
    pub fn let_managed_save_run(&self) -> Result<bool, HypervisorError> {
        self.with("changing its managed save", |domain| {
            let saved = domain.has_managed_save(0)?;
            if saved {
                mark_managed_save_running(domain)?;
            }
            Ok(saved)
        })
    }

    /// Whether the last operation of libvirt's that copied the guest's memory, and came to its end, was one that lets the
    /// guest go on here: a dump or a snapshot. Not to be asked of a guest that runs: see [`Self::held_for`].
    pub fn was_dumped_last(&self) -> Result<bool, HypervisorError> {
        let operation = self.with("asking what was done last", job::last_operation)?;
        let goes_on = [sys::VIR_DOMAIN_JOB_OPERATION_DUMP, sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT];
        Ok(operation.is_some_and(|operation| goes_on.contains(&operation)))
    }

    pub fn autostart(&self) -> Result<bool, HypervisorError> {
        self.with("asking whether it starts by itself", virt::domain::Domain::autostart)
    }

    pub fn set_autostart(&self, on: bool) -> Result<(), HypervisorError> {
        self.with("setting whether it starts by itself", |domain| domain.set_autostart(on).map(|_| ()))
    }

    /// QEMU's monitor, through libvirt.
    pub fn monitor(&self) -> DomainMonitor {
        DomainMonitor { domain: self.clone() }
    }

    /// The agent within the guest, through libvirt, which sees to it that an answer belongs to its question.
    pub fn guest_agent(&self) -> GuestAgent<DomainAgent> {
        GuestAgent::new(DomainAgent { domain: self.clone() })
    }

    /// The QEMU process that runs it.
    pub fn process(&self) -> Result<QemuProcess, HypervisorError> {
        QemuProcess::of_domain(self.vm, &self.name).map_err(|words| HypervisorError::WrongState {
            what: format!("finding the QEMU process of {self:?}"),
            words,
        })
    }

    pub(super) fn with<T>(
        &self,
        what: &str,
        ask: impl FnOnce(&virt::domain::Domain) -> Result<T, Error>,
    ) -> Result<T, HypervisorError> {
        self.hypervisor.with(&format!("domain `{}`: {what}", self.name), |link| {
            let cached = lock(&self.handle)
                .as_ref()
                .filter(|(number, _)| *number == link.number)
                .map(|(_, found)| found.clone());
            let domain = match cached {
                Some(domain) => domain,
                None => {
                    let found = link.connect.lookup_domain_by_uuid_string(&self.vm.to_string())?;
                    *lock(&self.handle) = Some((link.number, found.clone()));
                    found
                }
            };
            ask(&domain)
        })
    }
}

/// The way to a guest's agent.
#[derive(Clone, Debug)]
pub struct DomainAgent {
    domain: Domain,
}

impl AgentChannel for DomainAgent {
    fn ask(&self, request: &str, within: Duration) -> Result<String, String> {
        // libvirt counts seconds, and takes none for "do not wait at all".
        let seconds = i32::try_from(within.as_secs()).unwrap_or(i32::MAX).max(1);
        let ask = |domain: &virt::domain::Domain| domain.qemu_agent_command(request, seconds, 0);
        self.domain.with("asking its agent", ask).map_err(|error| error.to_string())
    }
}

/// The XML stays as it is; libvirt wants one with each change.
fn mark_managed_save_running(domain: &virt::domain::Domain) -> Result<(), Error> {
    // SAFETY: the domain is alive; what comes back is a C string of ours to free, or null with an error.
    let xml = unsafe {
        sys::virDomainManagedSaveGetXMLDesc(domain.as_ptr(), sys::VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
    };
    if xml.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: as above; libvirt only reads `xml`, which is freed once.
    let status = unsafe {
        let status = sys::virDomainManagedSaveDefineXML(domain.as_ptr(), xml, sys::VIR_DOMAIN_SAVE_RUNNING);
        libc::free(xml.cast::<c_void>());
        status
    };
    if status < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// QEMU's monitor of one domain, through libvirt's passthrough. libvirt serialises it with its own jobs.
#[derive(Clone, Debug)]
pub struct DomainMonitor {
    domain: Domain,
}

impl Monitor for DomainMonitor {
    fn execute_with_fds(
        &self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, MonitorError> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        let request = request.to_string();
        let reply =
            self.domain.with(command, |domain| command_with_fds(domain, &request, fds)).map_err(|error| {
                MonitorError::Unreachable { command: command.into(), reason: error.to_string() }
            })?;
        read_reply(command, &reply)
    }
}

fn command_with_fds(
    domain: &virt::domain::Domain,
    request: &str,
    fds: &[BorrowedFd<'_>],
) -> Result<String, Error> {
    if fds.is_empty() {
        return domain.qemu_monitor_command(request, 0);
    }
    let request = CString::new(request)?;
    let mut fds: Vec<c_int> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let (mut returned, mut returned_fds): (c_uint, *mut c_int) = (0, ptr::null_mut());
    let mut reply: *mut c_char = ptr::null_mut();
    // SAFETY: all pointers outlive the call; libvirt copies the descriptors it is given and allocates what it returns.
    let status = unsafe {
        sys::virDomainQemuMonitorCommandWithFiles(
            domain.as_ptr(),
            request.as_ptr(),
            fds.len() as c_uint,
            fds.as_mut_ptr(),
            &mut returned,
            &mut returned_fds,
            &mut reply,
            0,
        )
    };
    if status < 0 {
        return Err(Error::last_error());
    }
    // SAFETY: on success `reply` is a C string and `returned_fds` an array of `returned` descriptors, both ours to free.
    unsafe {
        for at in 0..returned as usize {
            libc::close(*returned_fds.add(at));
        }
        libc::free(returned_fds.cast::<c_void>());
        let text = CStr::from_ptr(reply).to_string_lossy().into_owned();
        libc::free(reply.cast::<c_void>());
        Ok(text)
    }
}
