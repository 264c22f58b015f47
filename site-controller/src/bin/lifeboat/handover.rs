//! `lifeboat claim` and `lifeboat accept`: a VM that ran at two sites is protected from where it runs now to the other one.

use crate::ask::{Ended, Site, confirm, path_segment};
use anyhow::Context;
use clap::Args;
use lifeboat::local_api::Client;
use lifeboat_site_controller::{
    console::{handovers, watch::Display},
    handover::{AcceptLine, AcceptReport, Acceptance, Claim},
};
use std::{fs, io::Read, path::PathBuf};

/// Say that a VM that was failed over to this site runs here, for `lifeboat accept` at the other site.
#[derive(Args)]
pub struct ClaimIt {
    /// Name or UUID.
    vm: String,
}

/// Let a VM be protected to this site from where it runs now, although it ran here or was fenced here before.
///
/// The disks that lie here are taken in first, so that only what differs travels; then the VM is the named agent's, and
/// this site's failover is closed. Refused while the VM runs here. Run it again if it was interrupted.
#[derive(Args)]
pub struct Accept {
    /// Name or UUID.
    vm: String,
    /// What `lifeboat claim VM --json` printed at the site where the VM runs; `-` reads it from stdin. Without it, it is your
    /// word that the copy that this agent protects is the right one.
    #[arg(long, value_name = "FILE")]
    claim: Option<PathBuf>,
    /// The agent that protects the VM from now on, by the name in its certificate; where it is left out, the only one that
    /// asks for it.
    #[arg(long, value_name = "NAME")]
    agent: Option<String>,
    /// Leave the disks that lie here alone: all of them will travel.
    #[arg(long)]
    no_seed: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl ClaimIt {
    pub async fn run(self, site: &Site) -> Ended {
        let claim: Claim = site.client.get(&format!("/v1/vms/{}/claim", path_segment(&self.vm))).await?;
        site.print(&claim, handovers::claim)
    }
}

impl Accept {
    pub async fn run(self, site: &Site) -> Ended {
        let claim = self.claim.as_deref().map(read).transpose()?;
        let Self { vm, agent, no_seed, yes, .. } = self;
        let request = Acceptance { vm: vm.clone(), claim, agent, no_seed };
        if request.claim.is_none() && !yes {
            confirm(&handovers::unclaimed(&request), "the VM's name", &vm)?;
        }
        let report = accept(&site.client, site.json, &request).await?;
        site.print(&report, handovers::accepted)
    }
}

/// Has a controller take the hand-over, and shows how far it is.
pub async fn accept(client: &Client, json: bool, request: &Acceptance) -> anyhow::Result<AcceptReport> {
    let mut display = Display::new(json);
    let mut lines = client.post_stream::<_, AcceptLine>("/v1/handovers", request).await?;
    while let Some(line) = lines.next().await? {
        match line {
            AcceptLine::Step { step } => display.step(&step),
            AcceptLine::Seeding(at) => display.bytes(&at.disk, at.done_bytes, at.total_bytes),
            AcceptLine::Done { report } => {
                display.finish();
                return Ok(report);
            }
        }
    }
    anyhow::bail!(
        "the site controller went away in the middle; once it runs again, run the same command again"
    )
}

fn read(path: &std::path::Path) -> anyhow::Result<Claim> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().take(CLAIM_MAX).read_to_string(&mut text)
    } else {
        fs::File::open(path).and_then(|file| file.take(CLAIM_MAX).read_to_string(&mut text))
    };
    read.with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} holds no claim", path.display()))
}

const CLAIM_MAX: u64 = 64 << 10;
