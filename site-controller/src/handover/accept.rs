//! What the site does that the VM is to be protected to: takes in what it has of the VM, names the agent, fences everybody
//! else, and closes its failover.
//!
//! The order: the seed, under the old generation; the new owner's record, which holds only together with the generation it
//! names; the generation, from which on the agent is let in; the journal. A controller that dies anywhere leaves either
//! nothing but a seed, or a hand-over to that agent that the same command finishes.

use super::{AcceptLine, AcceptReport, Acceptance, HandoverError, Handovers};
use crate::{
    catalog::CatalogError,
    failover::journal::Phase,
    seed::{SeedProgress, SeedReport},
};
use lifeboat::{fault, format::owner::Owner, id::VmId, units::Generation};

impl Handovers {
    /// Hands the VM to an agent of the site that claims it, or, without a claim, to the one that the operator names.
    pub async fn accept(
        &self,
        request: Acceptance,
        mut tell: impl FnMut(AcceptLine) + Send,
    ) -> Result<AcceptReport, HandoverError> {
        let (vm, name) = self.meant(&request).await?;
        let runbook = &self.runbook;
        let _alone = runbook.claim(vm)?;
        let journal = runbook.journal.load(vm)?;
        if journal.as_ref().is_some_and(|record| record.phase != Phase::Running) {
            return Err(HandoverError::Unfinished { name });
        }
        let ours = runbook.store.generation(vm).await;
        let fenced = journal.is_some_and(|record| record.generation == ours);
        self.seeder.check_off(vm).await?;
        let slots = &runbook.intake.slots;
        let owner = slots.owner(vm).await?;
        if let Some(report) = self.finish(&request, vm, &name, ours, owner.as_ref())? {
            return Ok(report);
        }
        let agent = self.agent(&request, vm, &name, owner.as_ref())?;
        let held = slots.reserve_for(vm, HANDING_OVER, agent.as_deref(), fenced).await;
        let held = held.map_err(HandoverError::Held)?;
        let owner = held.owner().await?;
        let theirs = request.claim.as_ref().map(|claim| claim.generation);
        let generation = next(ours, theirs, owner.as_ref(), agent.as_deref());
        let generation = generation.ok_or_else(|| outdated(&request, &name, ours))?;

        // Of one whose points are taken already the site has more than what lies here.
        let has_it = |agent: &str| !fenced && slots.runs_at(vm, agent);
        let theirs_already = owner.as_ref().and_then(Owner::writer).is_some_and(has_it);
        let unseeded = request.no_seed || theirs_already;
        let seed = if unseeded { None } else { self.seed(vm, &name, &mut tell).await? };
        fault::point("accept.seeded");
        if let Some(agent) = &agent {
            tell(step(format!("handing the VM over to agent {agent}")));
            held.hand_to(agent, generation).await?;
            fault::point("accept.named");
        }
        let generation = runbook.store.raise_to(vm, generation).await?;
        fault::point("accept.raised");
        runbook.journal.close(vm)?;
        fault::point("accept.closed");
        let site = request.claim.map(|claim| claim.site);
        tracing::info!(%vm, name, agent, %generation, site, "the VM was handed over");
        if let Some(agent) = &agent {
            held.hand_over(agent, generation).await;
        }
        Ok(AcceptReport { vm, name, agent, generation, seed })
    }

    /// Where the agent has the VM already, of this very hand-over: what is left is to close the failover.
    fn finish(
        &self,
        request: &Acceptance,
        vm: VmId,
        name: &str,
        ours: Generation,
        owner: Option<&Owner>,
    ) -> Result<Option<AcceptReport>, HandoverError> {
        let Some(Owner::HandedTo { agent, generation }) = owner else { return Ok(None) };
        let asked = request.agent.as_ref().is_none_or(|asked| asked == agent)
            && request.claim.as_ref().is_none_or(|claim| claim.generation < *generation);
        if !asked || *generation != ours {
            return Ok(None);
        }
        self.runbook.journal.close(vm)?;
        fault::point("accept.closed");
        let (name, agent) = (name.to_owned(), Some(agent.clone()));
        Ok(Some(AcceptReport { vm, name, agent, generation: ours, seed: None }))
    }

    async fn meant(&self, request: &Acceptance) -> Result<(VmId, String), HandoverError> {
        if let Some(claim) = &request.claim {
            return Ok((claim.vm, claim.name.clone()));
        }
        match self.runbook.catalog.find_vm(&request.vm).await {
            Ok(found) => Ok((found.vm, found.name)),
            Err(error @ CatalogError::NoVm { .. }) => {
                let mut seen = self.runbook.intake.board.all().into_iter();
                let meant = seen.find(|(vm, seen)| seen.name == request.vm || vm.to_string() == request.vm);
                meant.map(|(vm, seen)| (vm, seen.name)).ok_or_else(|| error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whose points are to be taken: the agent that was named, or the only one that asks, or that has it running.
    fn agent(
        &self,
        request: &Acceptance,
        vm: VmId,
        name: &str,
        owner: Option<&Owner>,
    ) -> Result<Option<String>, HandoverError> {
        if let Some(agent) = &request.agent {
            return Ok(Some(agent.clone()));
        }
        let mut known = self.runbook.intake.slots.watchers(vm);
        if known.is_empty() {
            // One whose group is not made here yet asks for nothing, and tells what its host has.
            let hosts = self.runbook.intake.switchboard.all().into_iter();
            known = hosts.filter(|host| host.vm.vm == vm && host.vm.running).map(|host| host.agent).collect();
        }
        let known: Vec<String> = known.into_iter().take(8).collect();
        match known.as_slice() {
            [only] => Ok(Some(only.clone())),
            [] if owner.is_none() => Ok(None),
            [] => Err(HandoverError::WhichAgent(format!(
                "no agent that is connected asks for {name}; say with --agent whose it is, or start the agent of the host \
                 where it runs"
            ))),
            several => Err(HandoverError::WhichAgent(format!(
                "several agents ask for {name} ({}); say with --agent whose it is",
                several.join(", ")
            ))),
        }
    }

    /// Takes in the disks that lie here, if libvirt knows of any.
    async fn seed(
        &self,
        vm: VmId,
        name: &str,
        tell: &mut (impl FnMut(AcceptLine) + Send),
    ) -> Result<Option<SeedReport>, HandoverError> {
        let Some(order) = self.seeder.own_disks(vm, name).await? else {
            tell(step("no disks of it lie here: the first point carries all of them".into()));
            return Ok(None);
        };
        tell(step("taking in the disks that lie here".into()));
        let progress = |at: SeedProgress| tell(AcceptLine::Seeding(at));
        Ok(Some(self.seeder.seed_reserved(&order, progress).await?))
    }
}

const HANDING_OVER: &str = "the VM is just being handed over at this site";

/// The generation under which the VM goes on, given this site's and that of the claim; `None` if something here came after
/// what is claimed.
fn next(
    ours: Generation,
    theirs: Option<Generation>,
    owner: Option<&Owner>,
    agent: Option<&str>,
) -> Option<Generation> {
    // The same hand-over, begun before and perhaps not finished.
    if let Some(Owner::HandedTo { agent: named, generation }) = owner
        && Some(named.as_str()) == agent
        && *generation >= ours
        && theirs.is_none_or(|theirs| theirs < *generation)
    {
        return Some(*generation);
    }
    match theirs {
        Some(theirs) if ours > theirs => None,
        Some(theirs) => Some(theirs.next()),
        None => Some(ours.next()),
    }
}

fn outdated(request: &Acceptance, name: &str, ours: Generation) -> HandoverError {
    let (site, theirs) = match &request.claim {
        Some(claim) => (claim.site.clone(), claim.generation),
        None => (String::new(), ours),
    };
    HandoverError::Outdated { site, name: name.to_owned(), theirs, ours }
}

fn step(step: String) -> AcceptLine {
    AcceptLine::Step { step }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: fn(u64) -> Generation = Generation;

    #[test]
    fn of_two_sites_that_had_the_vm_only_the_later_ones_claim_counts() {
        let named = |agent: &str, no| Owner::HandedTo { agent: agent.into(), generation: G(no) };
        let (a, b) = (Owner::Agent("a".into()), named("b", 3));
        for (ours, theirs, owner, agent, next_one) in [
            // The first time: the other site was failed over to, this one knows of nothing.
            (1, Some(2), None, Some("b"), Some(3)),
            (1, Some(2), Some(&a), Some("b"), Some(3)),
            // It went home (4), and is to be protected to the site that had it before (2).
            (2, Some(4), Some(&a), Some("a"), Some(5)),
            // That site was failed over to once more (6), and the home that was lost comes back with its claim of 4.
            (6, Some(4), Some(&a), Some("a"), None),
            // Begun before and perhaps not finished: the generation may be raised by then or not.
            (2, Some(2), Some(&b), Some("b"), Some(3)),
            (3, Some(2), Some(&b), Some("b"), Some(3)),
            (2, None, Some(&b), Some("b"), Some(3)),
            // Another agent, with a claim that this hand-over came after.
            (3, Some(2), Some(&b), Some("c"), None),
            // An operator's word is above all that is known here.
            (6, None, Some(&a), Some("a"), Some(7)),
            (1, None, None, None, Some(2)),
        ] {
            let got = next(G(ours), theirs.map(G), owner, agent);
            assert_eq!(got, next_one.map(G), "{ours} {theirs:?} {owner:?} {agent:?}");
        }
    }
}
