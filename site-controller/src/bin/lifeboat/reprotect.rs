//! `lifeboat reprotect`: what was failed over to this site is protected back to the other one. The command leads; each of its
//! steps is a request that may be made again, so that the same command goes on wherever it, or a controller, died.

use crate::{
    ask::{Ended, Site, confirm, path_segment},
    handover,
    peer::{Meant, Other},
};
use anyhow::Context;
use clap::Args;
use lifeboat::{id::VmId, local_api::Client, units::Generation};
use lifeboat_site_controller::{
    api::types::{GroupRequest, GroupRow, InventoryList},
    console::handovers,
    group::GroupSpec,
    handover::{AcceptReport, Acceptance, Claim},
};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fmt::Write,
    time::{Duration, Instant},
};

/// Protect a group, or a VM, back to the site that it came from.
///
/// The disks that lie there are taken in, so that only what differs travels; the agents that protect the VMs there from now
/// on are let in, although they may have been fenced; a group is made there as it is here. Run it again if it was
/// interrupted.
#[derive(Args)]
pub struct Reprotect {
    /// A group's name, or a VM's name or UUID.
    name: String,
    #[command(flatten)]
    other: Other,
    /// The agent that protects the VMs there, by the name in its certificate; where it is left out, the connected one that has
    /// them running.
    #[arg(long, value_name = "NAME")]
    agent: Option<String>,
    /// Leave the disks that lie there alone: all of them will travel.
    #[arg(long)]
    no_seed: bool,
    /// Only show what it would do.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// What it would do.
#[derive(Serialize)]
struct Plan {
    name: String,
    members: Vec<Step>,
    /// What becomes of the group at the other site.
    group: Option<&'static str>,
}

#[derive(Serialize)]
struct Step {
    vm: VmId,
    name: String,
    /// Protects it from now on.
    agent: String,
    /// Of its failover to here.
    generation: Generation,
    /// That the other site knows.
    theirs: Option<Generation>,
}

/// What it did.
#[derive(Serialize)]
struct Report {
    name: String,
    members: Vec<AcceptReport>,
    group: Option<&'static str>,
}

impl Reprotect {
    pub async fn run(self, site: &Site) -> Ended {
        let meant = Meant::find(site, &self.name, "reprotect").await?;
        let other = self.other.client()?;
        // All of them first: nothing is begun for one that can't be ended for all.
        let mut steps = Vec::new();
        for claim in claims(site, &meant).await? {
            let agent = match &self.agent {
                Some(named) => named.clone(),
                None => agent_of(&other, &claim).await?,
            };
            steps.push((claim, agent));
        }
        if self.dry_run || !self.yes {
            let plan = plan(&other, &meant, &steps).await?;
            if self.dry_run {
                return site.print(&plan, planned);
            }
            confirm(&planned(&plan), "its name", &meant.name)?;
        }
        let mut members = Vec::new();
        for (claim, agent) in steps {
            let vm = claim.vm.to_string();
            let request = Acceptance { vm, claim: Some(claim), agent: Some(agent), no_seed: self.no_seed };
            members.push(handover::accept(&other, site.json, &request).await?);
        }
        // After the hand-overs: an agent that is told of a VM that it was fenced for would pause it.
        let group = match &meant.group {
            Some(spec) => Some(put_group(&other, spec).await.context("making the group at the other site")?),
            None => None,
        };
        site.print(&Report { name: meant.name, members, group }, done)
    }
}

/// That each of the VMs runs here, and was given to nobody since.
pub async fn claims(site: &Site, meant: &Meant) -> anyhow::Result<Vec<Claim>> {
    let mut claims = Vec::new();
    for member in &meant.members {
        let claim = site.client.get(&format!("/v1/vms/{}/claim", member.vm)).await?;
        claims.push(claim);
    }
    Ok(claims)
}

/// The agent that is connected to the other site and has the VM running. One may be just about to connect.
async fn agent_of(other: &Client, claim: &Claim) -> anyhow::Result<String> {
    let until = Instant::now() + CONNECTS_WITHIN;
    loop {
        let list: InventoryList = other.get("/v1/inventory").await?;
        let here = list.vms.into_iter().filter(|row| row.vm == claim.vm && row.running);
        let agents: BTreeSet<String> = here.map(|row| row.agent).collect();
        match (agents.len(), agents.into_iter().next()) {
            (1, Some(only)) => return Ok(only),
            (0, _) if Instant::now() < until => tokio::time::sleep(LOOK).await,
            (0, _) => anyhow::bail!(
                "no agent that has {} running is connected to the other site; start it on the VM's host, or say with \
                 --agent whose it is",
                claim.name
            ),
            (..) => anyhow::bail!(
                "several agents tell the other site that they have {} running; say with --agent whose it is",
                claim.name
            ),
        }
    }
}

async fn plan(other: &Client, meant: &Meant, steps: &[(Claim, String)]) -> anyhow::Result<Plan> {
    let rows = meant.rows(other).await?;
    let step = |(claim, agent): &(Claim, String)| Step {
        vm: claim.vm,
        name: claim.name.clone(),
        agent: agent.clone(),
        generation: claim.generation,
        theirs: rows.get(&claim.vm).map(|row| row.generation),
    };
    let group = match &meant.group {
        Some(spec) => Some(what_of(other, spec).await?.0),
        None => None,
    };
    Ok(Plan { name: meant.name.clone(), members: steps.iter().map(step).collect(), group })
}

/// What is to be done about the group there.
async fn what_of(other: &Client, spec: &GroupSpec) -> anyhow::Result<(&'static str, GroupSpec)> {
    let rows: Vec<GroupRow> = other.get("/v1/groups").await?;
    Ok(match rows.into_iter().find(|row| row.group.spec.name == spec.name) {
        None => (CREATE, with_hosts_of(spec, None)),
        Some(row) => {
            let wanted = with_hosts_of(spec, Some(&row.group.spec));
            let same = row.group.spec == wanted && !row.group.paused;
            (if same { KEEP } else { CHANGE }, wanted)
        }
    })
}

/// Each site has hosts of its own: what the group says of them there stays.
fn with_hosts_of(spec: &GroupSpec, there: Option<&GroupSpec>) -> GroupSpec {
    let mut wanted = spec.clone();
    for steps in wanted.runbook.vm.values_mut() {
        steps.hosts.clear();
    }
    for (vm, steps) in
        there.iter().flat_map(|there| &there.runbook.vm).filter(|(_, steps)| !steps.hosts.is_empty())
    {
        wanted.runbook.vm.entry(vm.clone()).or_default().hosts.clone_from(&steps.hosts);
    }
    wanted.runbook.vm.retain(|vm, _| wanted.vms.contains(vm));
    wanted
}

async fn put_group(other: &Client, spec: &GroupSpec) -> anyhow::Result<&'static str> {
    let (what, spec) = what_of(other, spec).await?;
    let group = format!("/v1/groups/{}", path_segment(&spec.name));
    let request = GroupRequest { spec };
    match what {
        CREATE => drop(other.post::<_, GroupRow>("/v1/groups", &request).await?),
        CHANGE => {
            let row: GroupRow = other.post(&group, &request).await?;
            if row.group.paused {
                let _: GroupRow = other.post(&format!("{group}/resume"), &()).await?;
            }
        }
        _ => {}
    }
    Ok(what)
}

fn planned(plan: &Plan) -> String {
    let mut out = String::new();
    for Step { name, agent, generation, theirs, .. } in &plan.members {
        let theirs = theirs.map_or_else(|| "nothing".into(), |theirs| format!("generation {theirs}"));
        let _ = writeln!(
            out,
            "{name} runs here since its failover of generation {generation}; the other site knows of {theirs}. Agent \
             {agent} will protect it to there; what was left there is taken in as a seed and fenced."
        );
    }
    if let Some(what) = plan.group {
        let _ = writeln!(out, "Group {} there: {what}.", plan.name);
    }
    out
}

fn done(report: &Report) -> String {
    let mut out: String = report.members.iter().map(handovers::accepted).collect();
    if let Some(what) = report.group {
        let _ = writeln!(out, "Group {} there: {what}.", report.name);
    }
    let _ =
        writeln!(out, "The first points are on their way: `lifeboat status` at the other site shows them.");
    out
}

const CONNECTS_WITHIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(500);
const CREATE: &str = "created";
const CHANGE: &str = "changed to what it is here";
const KEEP: &str = "kept as it is";
