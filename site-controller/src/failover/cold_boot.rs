//! A resume that goes wrong: one that is refused is tried once more, for its reason may pass; then the replica is booted from
//! the same point's disks instead.
//! Promises: what is wrong was seen, never guessed: QEMU refused the state, or the replica ended or was stopped within
//! moments, or will never go on, or is not up in the time that its runbook gives it, which says so. A guest that stands
//! because its operator wants it so is not touched. Each attempt has images of its own; those of one in which the replica
//! ran, and may have written, are left alone. Each refusal is in the journal before the next attempt.
//! Called by `steps`.

use super::{
    error::FailoverError,
    journal::{Phase, Placed, Record},
    progress::Watcher,
    runbook::Runbook,
    waits,
};
use crate::restore::Reader;
use lifeboat::{
    fault,
    hypervisor::libvirt::{DomainState, HypervisorError},
    id::VmId,
};
use std::{io, path::Path, time::Duration};

impl Runbook {
    /// Starts the replica, unless it was started before, and sees it run.
    pub(super) async fn start_or_boot(
        &self,
        record: &mut Record,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let reader = self.reader(record).await?;
        loop {
            let Err(error) = self.start_and_see(record, &reader, watcher).await else { return Ok(()) };
            match what_now(record, error) {
                Now::Fail(error) => return Err(error),
                Now::TryAgain(why) => self.resume_anew(record, why, watcher).await?,
                Now::Boot(why) => return self.boot(record, why, &reader, watcher).await,
            }
        }
    }

    async fn resume_anew(
        &self,
        record: &mut Record,
        why: String,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        tracing::warn!(vm = record.vm_name, why, "the resume was refused; trying once more");
        watcher.step(format!("the resume was refused ({why}); trying once more"));
        self.end(record).await?;
        let dir = self.attempt_dir(record);
        self.attempt_anew(record)?;
        fault::point("failover.tried-once");
        give_up(&dir);
        self.restore(record, watcher).await
    }

    async fn boot(
        &self,
        record: &mut Record,
        why: String,
        reader: &Reader,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        tracing::warn!(vm = record.vm_name, why, "the resume went wrong; booting from the point's disks");
        watcher.step(format!("the resume went wrong ({why}); booting from the point's disks instead"));
        self.end(record).await?;
        let (dir, image) = (self.attempt_dir(record), self.memory_image(record));
        record.resumes = false;
        record.cold_boot = Some(why);
        self.attempt_anew(record)?;
        fault::point("failover.cold-boot");
        if record.has_run {
            // The point still has it.
            let _ = std::fs::remove_file(image);
        } else {
            give_up(&dir);
        }
        self.restore(record, watcher).await?;
        self.start(record, reader, watcher).await?;
        self.confirm(record, watcher).await
    }

    /// Of a replica that went on, and is not up as its runbook wants it.
    pub(super) async fn boot_what_ran(
        &self,
        record: &mut Record,
        why: &str,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        let vm = record.vm;
        let stands = self.hosts.at(record.host.as_ref())?.ask(move |hypervisor| {
            let domain = hypervisor.domain_by_uuid(vm)?;
            Ok(domain.state()? != DomainState::Running && domain.came_to_grief()?.is_none())
        });
        if stands.await? {
            watcher.step("it stands, as its operator wants it: it is not booted");
            return Ok(());
        }
        let reader = self.reader(record).await?;
        // If it ends here: it goes on once more, or runs on, and is looked at again.
        record.has_run = true;
        self.enter(record, Phase::Starting)?;
        fault::point("failover.not-up");
        self.boot(record, why.to_owned(), &reader, watcher).await?;
        self.go_on(record, watcher).await
    }

    async fn start_and_see(
        &self,
        record: &mut Record,
        reader: &Reader,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        if !(record.phase == Phase::Starting && self.is_active(record).await?) {
            self.start(record, reader, watcher).await?;
        }
        self.confirm(record, watcher).await?;
        self.keeps_running(record, reader).await
    }

    /// A resumed replica is watched for a moment: what comes of a state that does not fit shows at once, if at all.
    async fn keeps_running(&self, record: &Record, reader: &Reader) -> Result<(), FailoverError> {
        if !record.resumes || !reader.plan().manifest.meta.was_running {
            return Ok(());
        }
        self.watch_for_grief(record.vm, record.host.as_ref(), record.console_from.unwrap_or(0)).await
    }

    /// An error if the resumed replica ends, is stopped, panics or is halted for good within a moment. What its console said
    /// up to `said` it said before.
    pub async fn watch_for_grief(
        &self,
        replica: VmId,
        at: Option<&Placed>,
        said: u64,
    ) -> Result<(), FailoverError> {
        let host = self.hosts.at(at)?;
        let (mut halted, wrong) = (0, |grief| Err(FailoverError::WentWrong { grief }));
        for _ in 0..LOOKS {
            let look = host.ask(move |hypervisor| {
                let domain = hypervisor.domain_by_uuid(replica)?;
                Ok((domain.came_to_grief()?, domain.is_halted_for_good()))
            });
            let (grief, is_halted) = look.await?;
            if let Some(grief) = grief {
                return wrong(grief);
            }
            halted += u32::from(is_halted);
            tokio::time::sleep(LOOK_EVERY).await;
        }
        // A guest that is only busy is never seen so each time.
        if halted == LOOKS {
            return wrong("is halted for good, as no processor of it takes interrupts any more,");
        }
        // Where a console can't be read nothing is known.
        let panicked = waits::console_says(self, replica, at, said, PANICKED.into()).await;
        if panicked.unwrap_or(false) { wrong("says on its console that its kernel panicked") } else { Ok(()) }
    }

    /// What is left of the failed resume must not run beside the other.
    async fn end(&self, record: &Record) -> Result<(), FailoverError> {
        let (host, state) = self.hosts.whereabouts(record.vm, Some(record)).await?;
        if state.is_some_and(DomainState::is_active) {
            let vm = record.vm;
            host.work(move |hypervisor| Ok::<_, FailoverError>(hypervisor.domain_by_uuid(vm)?.destroy()?))
                .await?;
        }
        Ok(())
    }
}

/// The images of a resume that was refused: nothing has run on them, and the next attempt needs the room.
fn give_up(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %dir.display(), %error, "what a refused resume leaves could not be removed");
    }
}

/// What comes after a start that went wrong.
#[derive(Debug)]
enum Now {
    Fail(FailoverError),
    TryAgain(String),
    Boot(String),
}

/// A libvirt that can't be reached is asked again by the operator: the replica may run. Enters in the record what was seen.
fn what_now(record: &mut Record, error: FailoverError) -> Now {
    if !record.resumes || record.phase != Phase::Starting {
        return Now::Fail(error);
    }
    match &error {
        FailoverError::Hypervisor(HypervisorError::Refused { .. } | HypervisorError::WrongState { .. }) => {
            record.refused.push(error.to_string());
            if record.refused.len() < TRIES {
                return Now::TryAgain(error.to_string());
            }
            let (times, why) = (record.refused.len(), error.to_string());
            if record.manner.no_cold_boot {
                return Now::Fail(FailoverError::StillRefused { times, why });
            }
            Now::Boot(format!("it was refused {times} times: {}", record.refused.join("; then: ")))
        }
        FailoverError::DidNotRun { .. } | FailoverError::WentWrong { .. } => {
            record.has_run = true;
            if record.manner.no_cold_boot { Now::Fail(error) } else { Now::Boot(error.to_string()) }
        }
        _ => Now::Fail(error),
    }
}

/// How often a resume that is refused is tried.
pub(super) const TRIES: usize = 2;
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOKS: u32 = 5;
/// In Linux' words.
const PANICKED: &str = "Kernel panic - not syncing";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::journal::tests::record;

    fn refused(words: &str) -> FailoverError {
        HypervisorError::Refused { what: "restore".into(), words: words.into() }.into()
    }

    fn starting() -> Record {
        Record { phase: Phase::Starting, ..record() }
    }

    #[test]
    fn a_resume_that_is_refused_is_tried_once_more_and_then_it_boots_and_says_both() {
        let mut record = starting();
        assert!(matches!(what_now(&mut record, refused("one")), Now::TryAgain(why) if why.contains("one")));
        let Now::Boot(why) = what_now(&mut record, refused("two")) else { panic!("{record:?}") };
        assert!(why.contains("2 times") && why.contains("one") && why.contains("two"), "{why}");
        assert!(!record.has_run, "nothing ran");

        let mut record = starting();
        record.manner.no_cold_boot = true;
        assert!(matches!(what_now(&mut record, refused("one")), Now::TryAgain(_)), "{record:?}");
        let left = what_now(&mut record, refused("two"));
        assert!(matches!(&left, Now::Fail(FailoverError::StillRefused { times: 2, .. })), "{left:?}");
    }

    #[test]
    fn what_ran_and_ended_is_not_resumed_again_and_what_nobody_knows_is_left_to_the_operator() {
        let mut record = starting();
        let ended = FailoverError::WentWrong { grief: "has crashed" };
        assert!(matches!(what_now(&mut record, ended), Now::Boot(_)));
        assert!(record.has_run && record.refused.is_empty());

        let mut record = starting();
        let lost = HypervisorError::ConnectionLost { what: "restore".into(), words: "gone".into() };
        assert!(matches!(what_now(&mut record, lost.into()), Now::Fail(_)));
        record.phase = Phase::Restored;
        assert!(matches!(what_now(&mut record, refused("the definition")), Now::Fail(_)));
        (record.phase, record.resumes) = (Phase::Starting, false);
        assert!(matches!(what_now(&mut record, refused("the boot")), Now::Fail(_)));
        assert!(record.refused.is_empty());
    }
}
