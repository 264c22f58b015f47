//! Other addresses for a replica at this site, or in a drill: the MAC addresses of its cards, and what its guest has on them.
//! Promises: best effort, told loudly, and within a limit of time: none of it makes a failover fail. What is to be done is
//! in the journal before the first of it is done, so that a controller that dies does the same again.
//! [`plan`] decides, [`guest`] does it through the guest's agent. Called by `steps`, and by `drill`.

pub mod guest;
pub mod plan;

use super::{
    error::FailoverError,
    images,
    journal::{Placed, Record},
    outcome::Afterwards,
    progress::Watcher,
    replica_xml::{self, Rewritten, XmlError},
    runbook::Runbook,
};
use crate::group::addresses::AddressRules;
use lifeboat::{address::Address, format::manifest::blob, id::VmId};
use plan::{Cards, Plan};
use std::time::{Duration, Instant};

/// A replica, and its host.
type At<'a> = (VmId, Option<&'a Placed>);

impl Runbook {
    /// Once for each failover, where the runbook says anything of it.
    pub(super) async fn give_addresses(
        &self,
        record: &mut Record,
        watcher: &Watcher,
    ) -> Result<(), FailoverError> {
        if record.manner.addresses.at(&self.site).is_empty() || !record.addresses.is_empty() {
            return Ok(());
        }
        watcher.step("giving it its addresses here");
        record.addresses = match self.addresses_of(record).await {
            Ok(done) => done,
            // What can't be written down is not gone on with.
            Err(error @ FailoverError::Journal(_)) => return Err(error),
            Err(error) => vec![not_done("addresses", error.to_string())],
        };
        for step in record.addresses.iter().filter(|step| !step.done) {
            tracing::warn!(vm = record.vm_name, "{step}");
            watcher.step(format!("WARNING: {step}"));
        }
        Ok(self.journal.save(record)?)
    }

    async fn addresses_of(&self, record: &mut Record) -> Result<Vec<Afterwards>, FailoverError> {
        let reader = self.reader(record).await?;
        let before = images::text_blob(&reader, blob::DOMAIN_XML).await?;
        let cards = self.cards(&record.manner.addresses, &before, record.vm, record.resumes)?;
        let stands = record.resumes && !reader.plan().manifest.meta.was_running;
        if stands || record.leaves_off() {
            let why =
                "it stands, or is off, as it was at the source: whoever lets it go on gives it its addresses";
            let words = cards.rules.words().into_iter().filter(|_| cards.need_the_guest());
            return Ok(cards
                .without_the_guest()
                .into_iter()
                .chain(words.map(|what| not_done(&what, why.into())))
                .collect());
        }
        let known = record.address_plan.clone();
        let host = record.host.clone();
        self.settle_addresses((record.vm, host.as_ref()), &cards, known, |plan| {
            record.address_plan = Some(plan.clone());
            Ok(self.journal.save(record)?)
        })
        .await
    }

    /// What becomes of the cards of a replica, whose XML is `before` at its point.
    pub fn cards(
        &self,
        rules: &AddressRules,
        before: &str,
        replica: VmId,
        resumes: bool,
    ) -> Result<Cards, XmlError> {
        Ok(Cards::new(rules.at(&self.site), replica_xml::wiring(before)?, replica, resumes))
    }

    /// The replica's XML with the MAC addresses that its cards have here.
    pub(super) fn with_macs(
        &self,
        rewritten: Rewritten,
        before: &str,
        record: &Record,
    ) -> Result<Rewritten, XmlError> {
        let macs = self.cards(&record.manner.addresses, before, record.vm, record.resumes)?.macs;
        if macs.is_empty() {
            return Ok(rewritten);
        }
        Ok(Rewritten { xml: replica_xml::with_macs(&rewritten.xml, &macs)?, ..rewritten })
    }

    /// Does all that can be done. `known`: it was decided before; otherwise `note` is told before anything is done.
    pub async fn settle_addresses(
        &self,
        at: At<'_>,
        cards: &Cards,
        known: Option<Plan>,
        mut note: impl FnMut(&Plan) -> Result<(), FailoverError> + Send,
    ) -> Result<Vec<Afterwards>, FailoverError> {
        let mut said = cards.without_the_guest();
        if !cards.need_the_guest() {
            return Ok(said);
        }
        let plan = match known {
            Some(plan) => plan,
            None => match self.decide(at, cards).await? {
                Ok(plan) => {
                    note(&plan)?;
                    plan
                }
                Err(why) => {
                    let known: Vec<String> = said.iter().map(|step| step.what.clone()).collect();
                    let words = cards.rules.words().into_iter().filter(|what| !known.contains(what));
                    said.extend(words.map(|what| not_done(&what, why.clone())));
                    return Ok(said);
                }
            },
        };
        said.extend(plan.said.iter().cloned());
        said.extend(self.in_guest(at, &plan).await?);
        if !cards.resumes {
            said.extend(self.once_more(at, cards, &plan).await?);
        }
        if said.is_empty() {
            let why = "the guest has no address that a rule is about".to_owned();
            said.push(Afterwards { what: "addresses".into(), done: true, why: Some(why) });
        }
        Ok(said)
    }

    /// Asks the guest, once it answers. One that boots may have its interfaces, and their first addresses, only later.
    async fn decide(&self, at: At<'_>, cards: &Cards) -> Result<Result<Plan, String>, FailoverError> {
        let cards = cards.clone();
        let (replica, host) = (at.0, self.hosts.at(at.1)?);
        host.work(move |hypervisor| {
            if !cards.agent {
                return Ok(Err("the guest has no channel for an agent, which would do it".to_owned()));
            }
            let agent = hypervisor.domain_by_uuid(replica)?.guest_agent();
            let within = if cards.resumes { RESUMED_WITHIN } else { cards.rules.up_within() };
            let until = Instant::now() + within;
            while let Err(error) = agent.ping(PING_WITHIN) {
                if Instant::now() > until {
                    return Ok(Err(error.to_string()));
                }
                std::thread::sleep(LOOK_EVERY);
            }
            match agent.is_windows() {
                Ok(false) => {}
                Ok(true) => {
                    return Ok(Err("the guest is Windows; give it its addresses by `guest_hook`".into()));
                }
                Err(error) => return Ok(Err(error.to_string())),
            }
            let until = Instant::now() + if cards.resumes { Duration::ZERO } else { CONFIGURED_WITHIN };
            loop {
                let plan = match agent.interfaces() {
                    Ok(interfaces) => cards.plan(&interfaces, &[]),
                    Err(error) => return Ok(Err(error.to_string())),
                };
                let is_whole = !plan.interfaces.is_empty() && plan.said.is_empty();
                if is_whole || Instant::now() >= until {
                    return Ok(Ok(plan));
                }
                std::thread::sleep(LOOK_EVERY);
            }
        })
        .await
    }

    async fn in_guest(&self, at: At<'_>, plan: &Plan) -> Result<Vec<Afterwards>, FailoverError> {
        let plan = plan.clone();
        let (replica, host) = (at.0, self.hosts.at(at.1)?);
        host.work(move |hypervisor| {
            let agent = hypervisor.domain_by_uuid(replica)?.guest_agent();
            Ok(guest::carry_out(&agent, &plan, Instant::now() + DONE_WITHIN))
        })
        .await
    }

    /// A guest that boots may configure itself only now, and so bring back what was taken away. Gives what was done besides.
    async fn once_more(
        &self,
        at: At<'_>,
        cards: &Cards,
        plan: &Plan,
    ) -> Result<Vec<Afterwards>, FailoverError> {
        let settled: Vec<Address> = plan.interfaces.iter().flat_map(|of| of.add.iter().copied()).collect();
        let (cards, plan) = (cards.clone(), plan.clone());
        let (replica, host) = (at.0, self.hosts.at(at.1)?);
        host.work(move |hypervisor| {
            let agent = hypervisor.domain_by_uuid(replica)?.guest_agent();
            let mut done = Vec::<Afterwards>::new();
            for _ in 0..LOOKS_AGAIN {
                std::thread::sleep(LOOK_AGAIN);
                let Ok(interfaces) = agent.interfaces() else { continue };
                let mut next = cards.plan(&interfaces, &settled);
                next.interfaces.retain(|of| {
                    let now = interfaces.iter().find(|now| now.name == of.name);
                    let has = |address: &Address| now.is_some_and(|now| now.addresses.contains(address));
                    of.remove.iter().any(has) || !of.add.iter().all(has)
                });
                let again = guest::carry_out(&agent, &next, Instant::now() + DONE_WITHIN);
                // What was said of it before holds.
                let known = |step: &Afterwards| {
                    step.done && plan.interfaces.iter().any(|of| guest::words(of) == step.what)
                };
                done.extend(again.into_iter().filter(|step| !known(step)));
            }
            done.dedup();
            Ok(done)
        })
        .await
    }
}

fn not_done(what: &str, why: String) -> Afterwards {
    Afterwards { what: what.into(), done: false, why: Some(why) }
}

/// The agent of a guest that goes on was at work when its point was cut.
const RESUMED_WITHIN: Duration = Duration::from_secs(15);
const PING_WITHIN: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// From the first answer of the agent of a guest that boots.
const CONFIGURED_WITHIN: Duration = Duration::from_secs(30);
const DONE_WITHIN: Duration = Duration::from_secs(60);
const LOOKS_AGAIN: u32 = 3;
const LOOK_AGAIN: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;
