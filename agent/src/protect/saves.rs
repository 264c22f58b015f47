//! What took all of the guest and found it standing in a pause of ours. libvirt resumes after a dump, or after a failure,
//! only what it had stopped itself. Promises: a guest that is left standing goes on; one that its operator had suspended
//! is left as it is. A look costs a few questions and never waits. Called by `protect::lookout` with each look. What
//! becomes of a save or a migration which finds it standing is `watchdog::found_standing`'s business.

use crate::watchdog::{gone_out, guest_status};
use lifeboat::hypervisor::libvirt::Domain;
use std::thread::JoinHandle;

#[derive(Default)]
pub struct Saves {
    /// What waits for libvirt. On a thread of its own: a look must not.
    waiting: Option<JoinHandle<()>>,
}

impl Saves {
    /// To be told of each look that found somebody at work.
    pub fn at_work(&mut self, domain: &Domain) {
        // One that finds the guest running stops it first, and libvirt knows why it stands.
        let found_standing = matches!(domain.is_held_by_libvirt(), Ok(false));
        if found_standing && self.waiting.as_ref().is_none_or(JoinHandle::is_finished) && may_go_on(domain) {
            let domain = domain.clone();
            self.waiting = Some(std::thread::spawn(move || let_go(&domain)));
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
