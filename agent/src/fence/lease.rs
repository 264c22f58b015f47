//! What the hook reads and writes: the list of protected VMs in the state folder, and in the run folder, which a reboot
//! empties, each VM's lease, starts that were refused, and migrations that are coming in. Small files, one per VM.
//! Promises: a VM is on the list before its first lease is needed. The other reader is packaging/libvirt-hook.sh.

use super::decide::Lease;
use lifeboat::{boot::uptime, durable, id::VmId, units::Generation, volatile};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// The first word of a lease without an end, of one with an end (then seconds since the boot), and of none for good (then
/// the failover: a replica that a later one put here may start).
const FOR_GOOD: &str = "granted";
const UNTIL: &str = "until";
const FENCED: &str = "fenced";

#[derive(Clone, Debug)]
pub struct Leases {
    state: PathBuf,
    run: PathBuf,
}

impl Leases {
    pub fn open(state: &Path, run: &Path) -> io::Result<Self> {
        let leases = Self { state: state.to_owned(), run: run.to_owned() };
        for dir in [state.join(PROTECTED), run.join(LEASES), run.join(REFUSED)] {
            fs::create_dir_all(dir)?;
        }
        Ok(leases)
    }

    /// From here on the hook refuses to start it without a lease.
    pub fn protect(&self, vm: VmId, name: &str) -> io::Result<()> {
        let path = self.state.join(PROTECTED).join(vm.to_string());
        if fs::read_to_string(&path).is_ok_and(|known| known == name) {
            return Ok(());
        }
        durable::replace(&path, name.as_bytes(), 0o600)
    }

    /// The hook lets everything pass.
    pub fn unprotect(&self, vm: VmId) -> io::Result<()> {
        // For good: back after a power cut, it would keep a VM off that nobody protects.
        durable::remove(&self.state.join(PROTECTED).join(vm.to_string()))?;
        volatile::remove(&self.lease(vm))?;
        self.forget_refusal(vm)
    }

    /// The VMs on the list, with what the configuration called them.
    pub fn protected(&self) -> io::Result<Vec<(VmId, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.state.join(PROTECTED))? {
            let entry = entry?;
            let Some(vm) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            found.push((vm, fs::read_to_string(entry.path())?));
        }
        Ok(found)
    }

    /// Lets the VM start: until the next boot or, if it is bound to answers of the site, for so long.
    pub fn grant(&self, vm: VmId, lasts: Option<Duration>) -> io::Result<()> {
        let until = lasts.map(|lasts| uptime().saturating_add(lasts).as_secs());
        self.write(vm, &until.map_or_else(|| FOR_GOOD.to_owned(), |until| format!("{UNTIL} {until}")))
    }

    /// Nothing starts it, nor lets it come in, unless a failover later than `current` put it here.
    pub fn refuse(&self, vm: VmId, current: Generation) -> io::Result<()> {
        self.write(vm, &format!("{FENCED} {current}"))
    }

    pub fn drop(&self, vm: VmId) -> io::Result<()> {
        volatile::remove(&self.lease(vm))
    }

    /// `lasts`: as it would be granted now.
    pub fn look(&self, vm: VmId, lasts: Option<Duration>) -> Lease {
        let text = fs::read_to_string(self.lease(vm)).unwrap_or_default();
        let mut words = text.split_whitespace();
        match (words.next(), lasts) {
            (Some(FENCED), _) => Lease::Fenced,
            (Some(FOR_GOOD), None) => Lease::Fresh,
            (Some(UNTIL), Some(lasts)) => {
                let until = words.next().and_then(|word| word.parse().ok()).map(Duration::from_secs);
                let left = until.unwrap_or_default().saturating_sub(uptime());
                if left >= lasts / 2 { Lease::Fresh } else { Lease::Stale }
            }
            (Some(_), _) => Lease::Stale,
            (None, _) => Lease::Missing,
        }
    }

    pub fn start_was_refused(&self, vm: VmId) -> bool {
        self.run.join(REFUSED).join(vm.to_string()).exists()
    }

    pub fn forget_refusal(&self, vm: VmId) -> io::Result<()> {
        volatile::remove(&self.run.join(REFUSED).join(vm.to_string()))
    }

    fn lease(&self, vm: VmId) -> PathBuf {
        self.run.join(LEASES).join(vm.to_string())
    }

    /// Whole or not at all; that a power cut takes it away is what it is for.
    fn write(&self, vm: VmId, text: &str) -> io::Result<()> {
        volatile::replace(&self.lease(vm), &format!("{text}\n"))
    }
}

const PROTECTED: &str = "protected";
const LEASES: &str = "leases";
const REFUSED: &str = "refused";

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId::from_bytes([9; 16]);

    #[test]
    fn a_lease_is_fresh_only_as_it_would_be_granted_now() {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(&dir.path().join("state"), &dir.path().join("run")).unwrap();
        let minute = Some(Duration::from_secs(60));
        assert_eq!(leases.look(VM, None), Lease::Missing);
        leases.grant(VM, None).unwrap();
        assert_eq!((leases.look(VM, None), leases.look(VM, minute)), (Lease::Fresh, Lease::Stale));
        leases.grant(VM, minute).unwrap();
        assert_eq!((leases.look(VM, minute), leases.look(VM, None)), (Lease::Fresh, Lease::Stale));
        leases.grant(VM, Some(Duration::ZERO)).unwrap();
        assert_eq!(leases.look(VM, minute), Lease::Stale);
        leases.refuse(VM, Generation(2)).unwrap();
        assert_eq!(leases.look(VM, minute), Lease::Fenced);
        leases.drop(VM).unwrap();
        leases.drop(VM).unwrap();
        assert_eq!(leases.look(VM, minute), Lease::Missing);
    }
}
