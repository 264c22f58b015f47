//! An operator's orders about fenced copies, carried out on the files and through libvirt: they work whether the daemon
//! runs or not, which goes by the same files. Promises: a copy that is fenced is not let go by any order but `allow`; a
//! saved state is removed only when it was discarded, or when the guest goes on from it. Called by the commands.

use super::{
    FenceError,
    book::{Allowed, Book},
    diverged::{Kept, Shelf},
    keeper::{BOOK, SHELF},
    lease::Leases,
};
use crate::protect::holds::Holds;
use lifeboat::{
    hypervisor::libvirt::{Domain, Hypervisor, HypervisorError, StartAs},
    id::VmId,
    units::{Generation, UnixMs},
};
use serde::Serialize;
use std::{io, path::Path};

pub struct Orders {
    book: Book,
    leases: Leases,
    shelf: Shelf,
    holds: Holds,
}

/// One copy that diverged, as `diverged --json` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Diverged {
    pub vm: VmId,
    pub name: String,
    /// The failover that fenced it; `None` if it is not fenced any more.
    pub fenced_by: Option<Generation>,
    pub fenced_at: Option<UnixMs>,
    /// What is kept of it.
    pub kept: Vec<Kept>,
}

impl Orders {
    pub fn open(state: &Path, run: &Path) -> Result<Self, FenceError> {
        let book = Book::open(state.join(BOOK)).map_err(file("opening the folder of fenced VMs"))?;
        let leases = Leases::open(state, run).map_err(file("opening the folders of leases"))?;
        let holds = Holds::open(state).map_err(file("opening the folder of held VMs"))?;
        Ok(Self { book, leases, shelf: Shelf::new(state.join(SHELF)), holds })
    }

    /// All copies that are fenced, or of which something is kept.
    pub fn list(&self) -> Result<Vec<Diverged>, FenceError> {
        let mut all: Vec<Diverged> = Vec::new();
        let kept = self.shelf.list();
        let mut vms = self.book.vms().map_err(file("listing fenced VMs"))?;
        vms.extend(kept.iter().map(|kept| kept.vm));
        vms.sort();
        vms.dedup();
        for vm in vms {
            let record = self.book.load(vm).map_err(file("reading what became of a copy"))?;
            let kept: Vec<Kept> = kept.iter().filter(|kept| kept.vm == vm).cloned().collect();
            if record.fenced.is_none() && kept.is_empty() {
                continue;
            }
            let name = kept.last().map_or(record.name, |kept| kept.name.clone());
            let fenced = record.fenced;
            let (fenced_by, fenced_at) =
                (fenced.as_ref().map(|fenced| fenced.current), fenced.as_ref().map(|fenced| fenced.at));
            all.push(Diverged { vm, name, fenced_by, fenced_at, kept });
        }
        Ok(all)
    }

    /// By name or UUID, of those that diverged.
    pub fn find(&self, name: &str) -> Result<Diverged, FenceError> {
        let meant = |row: &Diverged| row.name == name || row.vm.to_string() == name;
        self.list()?.into_iter().find(meant).ok_or_else(|| FenceError::Unknown(name.to_owned()))
    }

    /// The VM that may be meant by an order: protected here, or fenced.
    pub fn vm(&self, name: &str) -> Result<VmId, FenceError> {
        let protected = self.leases.protected().map_err(file("listing protected VMs"))?;
        let meant = |(vm, known): &(VmId, String)| known == name || vm.to_string() == name;
        match protected.into_iter().find(meant) {
            Some((vm, _)) => Ok(vm),
            None => self.find(name).map(|row| row.vm),
        }
    }

    /// This copy may run, whatever the site would say of what is known to have been until now.
    pub fn allow(&self, vm: VmId, by: &str, now: UnixMs) -> Result<(), FenceError> {
        let allowed = self.book.update(vm, |record| {
            let fenced = record.fenced.take().map(|fenced| fenced.current);
            let before = record.allowed.as_ref().map(|allowed| allowed.up_to);
            let up_to = fenced.max(before).unwrap_or(Generation(0));
            record.allowed = Some(Allowed { at: now, by: by.to_owned(), up_to });
        });
        allowed.map_err(file("noting the order"))?;
        // The daemon bounds it if it is to be bounded.
        self.leases.grant(vm, None).map_err(file("writing the VM's lease"))
    }

    /// A guest that is held for a planned failover.
    pub fn held(&self, name: &str) -> Result<VmId, FenceError> {
        let vm = self.vm(name)?;
        if self.holds.is_held(vm) { Ok(vm) } else { Err(FenceError::NotHeld(name.to_owned())) }
    }

    /// Ends a hold without the site's word: this copy may run, and goes on. `false` if it is off.
    pub fn resume_held(
        &self,
        hypervisor: &Hypervisor,
        vm: VmId,
        by: &str,
        now: UnixMs,
    ) -> Result<bool, FenceError> {
        // First, or the fence would pause it again.
        self.allow(vm, by, now)?;
        let stands = match found(hypervisor, vm)? {
            Some(domain) if domain.state()?.is_active() => {
                if domain.is_held_by_libvirt()? {
                    domain.resume()?;
                }
                true
            }
            _ => false,
        };
        self.holds.remove(vm).map_err(file("removing the record of the hold"))?;
        Ok(stands)
    }

    /// The hook lets it start from now on, unless it is fenced.
    pub fn unprotect(&self, vm: VmId) -> Result<(), FenceError> {
        let record = self.book.load(vm).map_err(file("reading what became of a copy"))?;
        if record.fenced.is_some() {
            return Err(FenceError::StillFenced(vm));
        }
        self.leases.unprotect(vm).map_err(file("taking the VM off the list of the protected"))
    }

    /// Gives up what only this copy knows. A fenced guest that still stands in memory is ended; its disks stay.
    pub fn discard(&self, hypervisor: &Hypervisor, row: &Diverged) -> Result<(), FenceError> {
        if row.fenced_by.is_some()
            && let Some(domain) = found(hypervisor, row.vm)?
            && domain.state()?.is_active()
        {
            if !domain.is_held_by_libvirt()? {
                return Err(FenceError::Runs(row.vm));
            }
            domain.destroy()?;
        }
        self.shelf.discard(row.vm).map_err(file("removing what was kept"))?;
        let forgotten = self.book.update(row.vm, |record| {
            if let Some(fenced) = &mut record.fenced {
                fenced.saved = None;
            }
        });
        forgotten.map(drop).map_err(file("noting what became of a copy"))
    }

    /// Lets the guest go on from what was kept, which it then is again.
    pub fn restore(&self, hypervisor: &Hypervisor, row: &Diverged) -> Result<(), FenceError> {
        if row.fenced_by.is_some() {
            return Err(FenceError::StillFenced(row.vm));
        }
        let whole = row.kept.iter().rev().find(|kept| kept.memory_bytes.is_some());
        let Some(kept) = whole else { return Err(FenceError::NothingKept(row.vm)) };
        hypervisor.restore(&kept.image().to_string_lossy(), None, StartAs::Running)?;
        // It would be of another moment than the disks from now on.
        std::fs::remove_dir_all(&kept.folder).map_err(file("removing what the guest went on from"))
    }
}

fn found(hypervisor: &Hypervisor, vm: VmId) -> Result<Option<Domain>, FenceError> {
    match hypervisor.domain_by_uuid(vm) {
        Err(HypervisorError::NotFound { .. }) => Ok(None),
        found => Ok(Some(found?)),
    }
}

fn file(what: &'static str) -> impl Fn(io::Error) -> FenceError {
    move |source| FenceError::File { what, source }
}
