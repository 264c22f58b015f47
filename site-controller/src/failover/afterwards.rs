//! What a guest needs that goes on from an older instant: its clock stepped, switches told where it is, a new generation
//! id, and whatever its operator wants run in it.
//! Promises: best effort. Each outcome is recorded and told, none fails the failover, all of it has a limit of time.
//! Called by `steps` once the replica runs.

use super::{
    error::FailoverError,
    images,
    journal::{Manner, Placed, Record},
    outcome::Afterwards,
    progress::Watcher,
    runbook::Runbook,
};
use lifeboat::{
    clock::Clock,
    format::manifest::blob,
    hypervisor::{
        domain_xml::resumed::Resumed,
        guest_agent::{AgentChannel, AgentError, GuestAgent, ProgramEnd},
        libvirt::{Domain, Hypervisor, XmlView},
        monitor::Monitor,
    },
    id::VmId,
};
use serde_json::json;
use std::time::Duration;

impl Runbook {
    /// Once for each failover, and only where the replica runs on.
    pub(super) async fn after_resume(
        &self,
        record: &mut Record,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        if !record.resumes || !record.after_resume.is_empty() {
            return Ok(());
        }
        record.after_resume = match self.settle_guest(record, watcher).await {
            Ok(done) if done.is_empty() => return Ok(()),
            Ok(done) => done,
            Err(error) => vec![Afterwards::of("what a resumed guest needs", Err(error.to_string()))],
        };
        for step in &record.after_resume {
            tracing::info!(vm = record.vm_name, "after the resume: {step}");
        }
        Ok(self.journal.save(record)?)
    }

    /// Nothing is done for a guest that stood at the source, and stands here.
    async fn settle_guest(
        &self,
        record: &Record,
        watcher: &Watcher,
    ) -> Result<Vec<Afterwards>, FailoverError> {
        let reader = self.reader(record).await?;
        if !reader.plan().manifest.meta.was_running {
            return Ok(Vec::new());
        }
        watcher.step("after the resume: clock, network, generation id, hook");
        let before = images::text_blob(&reader, blob::DOMAIN_XML).await?;
        self.settle_replica(record.vm, record.host.as_ref(), before, &record.manner).await
    }

    /// What a replica that goes on is given; `before` is the XML of its point.
    pub async fn settle_replica(
        &self,
        replica: VmId,
        at: Option<&Placed>,
        before: String,
        manner: &Manner,
    ) -> Result<Vec<Afterwards>, FailoverError> {
        let clock = self.clock.clone();
        let own = &manner.guest_hook;
        let hook = if own.is_empty() { self.guest_hook.clone() } else { own.clone() };
        let settle = move |hypervisor: &Hypervisor| -> Result<_, FailoverError> {
            Ok(settle(&hypervisor.domain_by_uuid(replica)?, &before, &*clock, &hook))
        };
        self.hosts.at(at)?.work(settle).await
    }
}

fn settle(domain: &Domain, before: &str, clock: &dyn Clock, hook: &[String]) -> Vec<Afterwards> {
    let now = domain.xml(XmlView::Active).map_err(|error| error.to_string());
    let now = now.and_then(|xml| Resumed::read(&xml).map_err(|error| error.to_string()));
    let now = match now {
        Ok(now) => now,
        Err(why) => return vec![Afterwards::of("what a resumed guest needs", Err(why))],
    };
    // QEMU has announced it once already, as it does after each incoming migration, which a restore is.
    let announced = announce(&domain.monitor(), now.interfaces);
    let genid = generation_id(before, &now);
    let agent = domain.guest_agent();
    let answers = match now.agent {
        true => agent.ping(PING_WITHIN),
        false => {
            Err(AgentError::Silent { command: "guest-ping", why: "it has no channel for an agent".into() })
        }
    };
    let mut done = vec![Afterwards::of("network announced", announced)];
    done.extend(genid.map(|outcome| Afterwards::of("VM generation id changed", outcome)));
    done.insert(0, Afterwards::of("clock stepped", step_clock(&agent, &answers, domain, clock)));
    if let Some((program, arguments)) = hook.split_first() {
        done.push(Afterwards::of("guest hook", run_hook(&agent, &answers, program, arguments)));
    }
    done
}

/// By the agent, to the site's time. Not through libvirt's call for it, which waits for the agent without a limit; what that
/// does besides is done here as well.
fn step_clock(
    agent: &GuestAgent<impl AgentChannel>,
    answers: &Result<(), AgentError>,
    domain: &Domain,
    clock: &dyn Clock,
) -> Result<Option<String>, String> {
    answers
        .clone()
        .map_err(|error| format!("{error}; the guest's RTC tells the right time, its clock does not"))?;
    agent.set_time(clock.now()).map_err(|error| error.to_string())?;
    // Ticks that the guest slept through are not made up for on top of that. Not every machine type has it.
    let _ = domain.monitor().execute("rtc-reset-reinjection", json!({}));
    Ok(None)
}

fn announce(monitor: &dyn Monitor, has_interfaces: bool) -> Result<Option<String>, String> {
    if !has_interfaces {
        return Err("it has no network interface".into());
    }
    let rounds = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
    monitor.execute("announce-self", rounds).map(|_| None).map_err(|error| error.to_string())
}

/// libvirt makes a new one when it restores a guest that has one; here it is only looked whether it did.
fn generation_id(before: &str, now: &Resumed) -> Option<Result<Option<String>, String>> {
    let now = now.genid.as_ref()?;
    let before = Resumed::read(before).ok().and_then(|before| before.genid);
    Some(match before {
        Some(before) if before == *now => Err("it is the one that it had at the source".into()),
        Some(_) | None => Ok(None),
    })
}

fn run_hook(
    agent: &GuestAgent<impl AgentChannel>,
    answers: &Result<(), AgentError>,
    program: &str,
    arguments: &[String],
) -> Result<Option<String>, String> {
    answers.clone().map_err(|error| error.to_string())?;
    match agent.run(program, arguments, HOOK_WITHIN).map_err(|error| error.to_string())? {
        ProgramEnd::Exited(0) => Ok(None),
        ProgramEnd::Exited(code) => Err(format!("`{program}` ended with {code}")),
        ProgramEnd::Killed(signal) => Err(format!("`{program}` was ended by signal {signal}")),
    }
}

/// An agent that was at work when the point was cut answers at once.
const PING_WITHIN: Duration = Duration::from_secs(3);
const HOOK_WITHIN: Duration = Duration::from_secs(30);
