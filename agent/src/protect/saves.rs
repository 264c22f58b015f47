//! What took all of the guest and found it standing in a pause of ours. libvirt notes in a saved image whether the guest
//! ran when the save began, and brings it back so; and it resumes after a dump, or after a failure, only what it had
//! stopped itself. Promises: such a managed save is set to run, a guest that is left standing goes on; one that its
//! operator had suspended, or wanted back paused, is left as it is. Where a save goes to a file, nobody can tell us to
//! which: said in the log. A look costs a few questions and never waits. Called by `protect::lookout` with each look.

use crate::watchdog::{gone_out, guest_status};
use lifeboat::hypervisor::libvirt::{Domain, HypervisorError};
use std::{
    thread::JoinHandle,
    time::{Duration, Instant},
};

#[derive(Default)]
pub struct Saves {
    /// When somebody was last seen at work, it was not libvirt that had stopped the guest, nor its operator.
    standing: bool,
    /// What waits for libvirt. On a thread of its own: a look must not.
    waiting: Option<JoinHandle<()>>,
}

impl Saves {
    /// To be told of each look: whether somebody is at work.
    pub fn looked(&mut self, domain: &Domain, at_work: bool) {
        if at_work {
            // A save that finds the guest running stops it first, and libvirt knows why it stands.
            self.standing = matches!(domain.is_held_by_libvirt(), Ok(false));
            if self.standing && self.waiting.as_ref().is_none_or(JoinHandle::is_finished) && may_go_on(domain)
            {
                let domain = domain.clone();
                self.waiting = Some(std::thread::spawn(move || let_go(&domain)));
            }
        } else if std::mem::take(&mut self.standing) {
            let domain = domain.clone();
            self.waiting = Some(std::thread::spawn(move || {
                if let Err(error) = wake(&domain) {
                    let domain = domain.name();
                    tracing::warn!(domain, %error, "it may have been saved in a pause of ours: if it comes back paused, resume it");
                }
            }));
        }
    }
}

/// Its memory has gone out, and libvirt, where it does not end the guest, resumes only what it had stopped itself.
fn may_go_on(domain: &Domain) -> bool {
    let monitor = domain.monitor();
    guest_status(&monitor).is_ok_and(|status| gone_out::is_end(&status))
        && gone_out::may_go_on(domain, &monitor).unwrap_or(false)
}

/// libvirt carries this out when its own work is over, and not before; if that has ended the guest, it refuses.
fn let_go(domain: &Domain) {
    match domain.resume() {
        Ok(()) => tracing::info!(
            domain = domain.name(),
            "what began in a pause of ours had left it standing; resumed it"
        ),
        Err(error) => tracing::debug!(domain = domain.name(), %error, "it was not resumed"),
    }
}

fn wake(domain: &Domain) -> Result<(), HypervisorError> {
    if !domain.was_saved()? {
        return Ok(());
    }
    // libvirt ends the guest before it knows of the managed save, which a save to a file never becomes.
    let until = Instant::now() + KNOWN_WITHIN;
    while !domain.let_managed_save_run()? {
        if Instant::now() > until {
            tracing::warn!(
                domain = domain.name(),
                "it was saved to a file in a pause of ours: restore it with `virsh restore --running`"
            );
            return Ok(());
        }
        std::thread::sleep(KNOWN_WITHIN / 20);
    }
    tracing::info!(
        domain = domain.name(),
        "it was saved in a pause of ours; the managed save will run when it starts"
    );
    Ok(())
}

/// From a guest's end to libvirt's knowing of its managed save: a few calls of libvirt's own.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);
