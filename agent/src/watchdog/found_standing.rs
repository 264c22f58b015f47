//! A save, or a migration to another host, that began in a pause of ours. libvirt found the guest standing, and would leave
//! it so where it comes or comes back, with nobody there to know better.
//! Promises: what began so is cancelled; its operator is told so by libvirt, and begins it again. A managed save that was
//! faster is set to run; a save to a file that was, nobody can tell us where it is: said in the log. No pause begins while
//! somebody is at work (`capture::others`), so that what is found when a pause is over began in it. Called when a guest
//! that we had stopped goes on: by the agent, and by the watchdog where it was the watchdog that let it go.

use lifeboat::hypervisor::libvirt::{Domain, HypervisorError, MIGRATION_OUT, SAVE};
use std::{
    thread,
    time::{Duration, Instant},
};

pub fn look(domain: &Domain) {
    let job = domain.job().filter(|job| [MIGRATION_OUT, SAVE].contains(&job.as_str()));
    if let Some(job) = &job {
        cancel(domain, job);
    }
    // On a thread of its own: a cut, and the next guest that stands, must not wait for libvirt.
    if job.is_some_and(|job| job == SAVE) || matches!(domain.was_saved(), Ok(true)) {
        let domain = domain.clone();
        thread::spawn(move || {
            if let Err(error) = mend(&domain) {
                let domain = domain.name();
                tracing::warn!(domain, %error, "it may have been saved in a pause of ours: if it comes back paused, resume it");
            }
        });
    }
}

fn cancel(domain: &Domain, job: &str) {
    let name = domain.name();
    match domain.abort_job() {
        Ok(()) => tracing::warn!(
            domain = name,
            job,
            "libvirt's job began in a pause of ours, and would leave the guest paused; cancelled it: begin it again"
        ),
        Err(error) => tracing::warn!(
            domain = name,
            job,
            %error,
            "libvirt's job began in a pause of ours and can't be cancelled: if the guest is paused after it, resume it"
        ),
    }
}

/// What was saved all the same is to run when it comes back.
fn mend(domain: &Domain) -> Result<(), HypervisorError> {
    let until = Instant::now() + OVER_WITHIN;
    while domain.job().is_some_and(|job| job == SAVE) && Instant::now() < until {
        thread::sleep(AGAIN);
    }
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
        thread::sleep(AGAIN);
    }
    tracing::info!(
        domain = domain.name(),
        "it was saved in a pause of ours; the managed save will run when it starts"
    );
    Ok(())
}

const AGAIN: Duration = Duration::from_millis(50);
/// A save that does not end when it is cancelled is at its end anyway.
const OVER_WITHIN: Duration = Duration::from_secs(60);
/// From a guest's end to libvirt's knowing of its managed save: a few calls of libvirt's own.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);
