//! QEMU's background snapshot as a memory engine: the guest stands only until QEMU has write-protected its memory, and
//! runs while QEMU writes all of it, as of that instant, into a file in memory (`sink`). Each page is compared with the
//! digest of what the site holds (`follow`), as stop-and-read does.
//!
//! Promises: the sink never blocks QEMU, so that neither our death nor our slowness holds the guest's writes up; QEMU
//! is never told to cancel, which on 7.2 leaves vCPUs blocked; capabilities are put back as found, also after our death
//! (`watchdog::capabilities`). QEMU 7.2 resumes the guest by itself, also one that its operator had paused: that is read as
//! stop-and-read does. QEMU 10.0 leaves it as it was, which we stopped: it is told to go on once it is protected. Costs, per
//! point: all memory is read, and the guest's first write to each page takes a fault.

mod follow;
mod room;
mod sink;

use super::{
    Fitness, Held, MemoryEngine, MemoryError, RamImage, Staging, Target, stop_and_read::StopAndRead,
};
use crate::watchdog::{
    Found, Noted,
    capabilities::{Capability, at_rest, capabilities, migration_status, set_capabilities},
    guest_status,
};
use follow::Following;
use lifeboat::{
    fault,
    hypervisor::{
        domain_xml::DomainSpec,
        monitor::{Monitor, MonitorError},
    },
    id::{PointId, VmId},
    page::PageGroup,
};
use serde_json::json;
use sink::Sink;
use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

pub const NAME: &str = "snapshot";
const CAPABILITY: &str = "background-snapshot";
/// Those that QEMU refuses beside it, or that change what the stream looks like.
const UNWANTED: [&str; 20] = [
    "auto-converge",
    "block",
    "compress",
    "dirty-bitmaps",
    "late-block-activate",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "return-path",
    "switchover-ack",
    "validate-uuid",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-copy-send",
];
const HUGE_PAGES: &str =
    "its memory is made of huge pages, each of which QEMU would protect and copy whole at its first write";
const FD_NAME: &str = "lifeboat-snapshot";
/// How long QEMU may take until the guest runs again. The watchdog's limit is the shorter one as a rule.
const PATIENCE: Duration = Duration::from_secs(60);
/// How late a command may reach QEMU whose answer was lost: libvirt waits 30 s for its turn.
const LATE: Duration = Duration::from_secs(35);

/// See the module.
pub struct Snapshot {
    vm: VmId,
    found: Found,
    /// Knows the layout, what the site holds and what is staged.
    base: StopAndRead,
    target: Option<Target>,
    ready: Option<Ready>,
    following: Option<Following>,
}

/// Made while the guest still runs.
struct Ready {
    sink: Sink,
    noted: Noted,
    wanted: Vec<Capability>,
}

impl Snapshot {
    pub fn new(staging: Staging, vm: VmId, found: Found) -> Self {
        Self { vm, found, base: StopAndRead::new(staging), target: None, ready: None, following: None }
    }

    /// Whether QEMU, its host and the guest's memory allow it. QEMU itself is asked: it tries its kernel.
    pub fn probe(target: &Target, vm: VmId, found: &Found, spec: &DomainSpec) -> Fitness {
        let refuse = |why: String| Fitness { usable: false, why };
        if spec.huge_pages {
            return refuse(HUGE_PAGES.into());
        }
        if let Err(why) = room::check(target.process, spec.memory_bytes) {
            return refuse(why);
        }
        match try_capability(&*target.monitor, vm, found) {
            Ok(()) => Fitness {
                usable: true,
                why: "QEMU write-protects memory in a short pause and is read while the guest runs".into(),
            },
            Err(MemoryError::Monitor(MonitorError::Refused { reason, .. })) => refuse(format!(
                "QEMU refuses it ({reason}); where QEMU does not run as root it needs \
                 sysctl vm.unprivileged_userfaultfd=1"
            )),
            Err(error) => refuse(format!("it could not be tried: {error}")),
        }
    }

    fn target(&self) -> Result<&Target, MemoryError> {
        self.target.as_ref().ok_or(MemoryError::Order("no guest was looked at"))
    }

    /// Waits for what an earlier cut left running, and takes away what it prepared in vain.
    fn wait_for_earlier(&mut self) {
        if let (Some(ready), Some(target)) = (self.ready.take(), &self.target) {
            // Refused if QEMU has closed it by itself; then all is well.
            let _ = target.monitor.execute("closefd", json!({ "fdname": FD_NAME }));
            if let Err(error) = ready.noted.forget() {
                tracing::warn!(vm = %self.vm, %error, "a note of capabilities stays");
            }
        }
        if let Some(earlier) = self.following.take() {
            earlier.discard();
            let _ = earlier.join();
        }
    }

    fn prepare(&mut self) -> Result<Ready, MemoryError> {
        let target = self.target()?;
        room::check(target.process, self.base.memory_bytes()).map_err(|why| MemoryError::Unfit { why })?;
        let monitor = &*target.monitor;
        let (noted, wanted) = note(monitor, self.vm, &self.found)?;
        let sink = Sink::new()?;
        monitor.execute_with_fds("getfd", json!({ "fdname": FD_NAME }), &[sink.as_fd()])?;
        fault::point("snapshot.prepared");
        Ok(Ready { sink, noted, wanted })
    }

    /// Has QEMU begin, and returns once the guest runs. From `migrate` on somebody follows to the end, whatever happens.
    fn begin_following(&mut self, ready: Ready) -> Result<(), MemoryError> {
        let target = self.target()?.clone();
        let monitor = target.monitor.clone();
        let Ready { sink, noted, wanted } = ready;
        let lent = self.base.lend()?;
        // Between this and `migrate` nothing else may fail. If it is refused, the next `begin` finds the note.
        set_capabilities(&*monitor, &wanted)?;
        fault::point("snapshot.capable");
        let begun = monitor.execute("migrate", json!({ "uri": format!("fd:{FD_NAME}") }));
        // Where the answer is lost QEMU may yet begin, and must then find the capability as it is.
        let lost = matches!(begun, Err(MonitorError::Unreachable { .. }));
        let patience = if lost { LATE } else { Duration::ZERO };
        let following = self.following.insert(Following::start(target, sink, noted, lent, patience));
        if let Err(error) = begun {
            following.discard();
            return Err(error.into());
        }
        fault::point("snapshot.started");
        let began = Instant::now();
        while guest_status(&*monitor)? != "running" {
            let Progress { status, pages } = Progress::ask(&*monitor)?;
            if matches!(status.as_str(), "failed" | "cancelled" | "none") || began.elapsed() > PATIENCE {
                following.discard();
                return Err(MemoryError::Snapshot { status });
            }
            // All is write-protected, and QEMU has done what it does about the guest, before it answered this: one that
            // leaves it as it found it is told; to any other it says nothing new.
            if pages > 0 || status == "completed" {
                monitor.execute("cont", json!({}))?;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        fault::point("snapshot.resumed");
        Ok(())
    }
}

impl MemoryEngine for Snapshot {
    fn name(&self) -> &'static str {
        NAME
    }

    fn begin(&mut self, target: &Target, basis: Option<PointId>) -> Result<Vec<RamImage>, MemoryError> {
        self.wait_for_earlier();
        self.target = Some(target.clone());
        put_back_left_over(&*target.monitor, self.vm, &self.found)?;
        self.base.begin(target, basis)
    }

    fn before(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        let pages = self.base.before()?;
        if pages.is_none() && self.ready.is_none() {
            self.ready = Some(self.prepare()?);
        }
        Ok(pages)
    }

    /// Nothing yet: memory is taken last, because that lets the guest go.
    fn drain(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn finish(&mut self, may_resume: bool) -> Result<bool, MemoryError> {
        if !may_resume {
            // What was prepared is taken away at the next `begin`.
            self.base.drain()?;
            return Ok(false);
        }
        let ready = self.ready.take().ok_or(MemoryError::Order("not prepared while the guest ran"))?;
        self.begin_following(ready)?;
        Ok(true)
    }

    fn after(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        if let Some(following) = self.following.take() {
            let followed = following.join()?;
            self.base.give_back(followed.lent, followed.changed_pages)?;
        }
        self.base.after()
    }

    fn machine_config(&self) -> Vec<u8> {
        self.base.machine_config()
    }

    fn changed_bytes(&self) -> u64 {
        self.base.changed_bytes()
    }

    fn sent(&mut self, point: PointId) {
        self.base.sent(point);
    }

    fn settle(&mut self, point: PointId) {
        self.base.settle(point);
    }

    fn put_back(&mut self) {
        if let Some(following) = &self.following {
            following.discard();
        }
        self.base.put_back();
    }

    fn hand_over(&mut self) -> Held {
        self.wait_for_earlier();
        self.base.hand_over()
    }

    fn take_over(&mut self, held: Held) {
        self.base.take_over(held);
    }
}

impl Drop for Snapshot {
    /// The follower puts the capabilities back: the process should not end before that. If it does, others see to it.
    fn drop(&mut self) {
        self.wait_for_earlier();
    }
}

/// How far QEMU's snapshot is.
struct Progress {
    status: String,
    /// Pages that were written. There are none before all memory is write-protected (QEMU, migration/migration.c,
    /// `bg_migration_thread`).
    pages: u64,
}

impl Progress {
    fn ask(monitor: &dyn Monitor) -> Result<Self, MonitorError> {
        let told = monitor.execute("query-migrate", json!({}))?;
        let pages = ["normal", "duplicate"].map(|kind| told["ram"][kind].as_u64().unwrap_or_default());
        let status = told["status"].as_str().unwrap_or("none").to_owned();
        Ok(Self { status, pages: pages.into_iter().fold(0, u64::saturating_add) })
    }
}

/// Writes down how the capabilities that matter are found; returns that, and how they are wanted.
fn note(monitor: &dyn Monitor, vm: VmId, found: &Found) -> Result<(Noted, Vec<Capability>), MemoryError> {
    let status = migration_status(monitor)?;
    if !at_rest(&status) {
        return Err(MemoryError::Busy { status });
    }
    let matters = |one: &Capability| {
        one.capability == CAPABILITY || (one.state && UNWANTED.contains(&one.capability.as_str()))
    };
    let touched: Vec<Capability> = capabilities(monitor)?.into_iter().filter(matters).collect();
    if touched.iter().all(|one| one.capability != CAPABILITY) {
        return Err(MemoryError::Unfit { why: "this QEMU has no background snapshots".into() });
    }
    let wanted = touched.iter().cloned().map(|one| Capability { state: one.capability == CAPABILITY, ..one });
    let wanted = wanted.collect();
    let noted = found.note(vm, touched).map_err(MemoryError::io("noting QEMU's capabilities"))?;
    let status = "an earlier snapshot's capabilities are being put back";
    Ok((noted.ok_or_else(|| MemoryError::Busy { status: status.into() })?, wanted))
}

/// Sets the capability and puts it back: QEMU tries its kernel and the guest's memory then.
fn try_capability(monitor: &dyn Monitor, vm: VmId, found: &Found) -> Result<(), MemoryError> {
    put_back_left_over(monitor, vm, found)?;
    let (noted, wanted) = note(monitor, vm, found)?;
    let set = set_capabilities(monitor, &wanted);
    put_back(&noted, monitor)?;
    Ok(set?)
}

fn put_back_left_over(monitor: &dyn Monitor, vm: VmId, found: &Found) -> Result<(), MemoryError> {
    let left = found.left_over(vm).map_err(MemoryError::io("reading which capabilities were found"))?;
    left.map_or(Ok(()), |noted| put_back(&noted, monitor))
}

fn put_back(noted: &Noted, monitor: &dyn Monitor) -> Result<(), MemoryError> {
    match noted.put_back(monitor) {
        Ok(true) => Ok(()),
        Ok(false) => Err(MemoryError::Busy { status: "active".into() }),
        Err(error) => Err(MemoryError::Capabilities(error)),
    }
}
