//! A save, or a migration to another host, that began in a pause of ours. libvirt found the guest standing, and would leave
//! it so where it comes or comes back, with nobody there to know better.
//! Promises: what began so is cancelled; its operator is told so by libvirt, and begins it again. No pause begins while
//! somebody is at work (`capture::others`), so that what is found when a pause is over began in it. What is over by then
//! can't be undone. Called when a guest that we had stopped goes on: by the agent, and by the watchdog where it was the
//! watchdog that let it go.

use lifeboat::hypervisor::libvirt::{Domain, MIGRATION_OUT, SAVE};

pub fn cancel_what_takes_it_away(domain: &Domain) {
    let name = domain.name();
    let Some(job) = domain.job().filter(|job| [MIGRATION_OUT, SAVE].contains(&job.as_str())) else { return };
    match domain.abort_job() {
        Ok(()) => tracing::warn!(
            domain = name,
            job,
            "libvirt's job began in a pause of ours, and would have left the guest paused; it was cancelled: begin it again"
        ),
        Err(error) => tracing::warn!(
            domain = name,
            job,
            %error,
            "libvirt's job began in a pause of ours and can't be cancelled: if the guest is paused after it, resume it"
        ),
    }
}
