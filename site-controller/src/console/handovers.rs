//! Claims and hand-overs as text for people. Pure.

use super::seeds;
use crate::handover::{AcceptReport, Acceptance, Claim};

pub fn claim(claim: &Claim) -> String {
    let Claim { site, name, generation, .. } = claim;
    format!(
        "{name} runs at {site} since its failover of generation {generation}. At the other site run\n  lifeboat accept {name} \
         --claim FILE\nwith what this command prints with --json.\n"
    )
}

pub fn unclaimed(request: &Acceptance) -> String {
    let agent = request.agent.as_deref().unwrap_or("the agent that asks for it");
    format!(
        "{} will be the VM that {agent} protects; whatever ran of it here is closed. No site has claimed it: make sure that \
         this is the right copy, and that no other runs.\n",
        request.vm
    )
}

pub fn accepted(report: &AcceptReport) -> String {
    let who = match &report.agent {
        Some(agent) => format!("agent {agent}"),
        None => "whichever agent is first".to_owned(),
    };
    let mut out = report.seed.as_ref().map(seeds::seed).unwrap_or_default();
    out.push_str(&format!("{}: {who} goes on with it under generation {}\n", report.name, report.generation));
    out
}
