//! `lifeboat seed`: disks that are at this site already are taken in, so that they need not travel.

use crate::ask::{Ended, Site};
use anyhow::Context;
use clap::Args;
use lifeboat_site_controller::{
    api::types::{SeedLine, SeedRequest},
    console::{seeds, watch::Display},
    seed::{SeedReport, disks::DiskFile},
};
use std::path::PathBuf;

/// Take in a VM's disks that are at this site already, so that an agent sends only what differs from them.
///
/// The VM must be off here, and no agent may protect it to this site meanwhile. The files are only read. Without --disk or
/// --seed the disks are those of the domain that libvirt has here.
#[derive(Args)]
pub struct Seed {
    /// Name or UUID; of a VM that this site has never heard of, the UUID.
    vm: String,
    /// One disk: `vda=/path`, or `vda=qcow2:/path` where the file's name does not end in its format. Give it for each.
    #[arg(long = "disk", value_name = "TARGET=FILE", value_parser = DiskFile::parse, conflicts_with = "seed")]
    disks: Vec<DiskFile>,
    /// A folder with a shipped copy: `vda.raw`, `vdb.qcow2` …
    #[arg(long, value_name = "DIR")]
    seed: Option<PathBuf>,
    /// The domain here, where it is not called like the VM.
    #[arg(long)]
    domain: Option<String>,
    /// What to call a VM that this site has never heard of.
    #[arg(long)]
    name: Option<String>,
}

impl Seed {
    pub async fn run(self, site: &Site) -> Ended {
        let dir = self.seed.map(std::path::absolute).transpose().context("the folder's whole path")?;
        let request =
            SeedRequest { vm: self.vm, name: self.name, disks: self.disks, dir, domain: self.domain };
        let report = seed(site, request).await?;
        site.print(&report, seeds::seed)
    }
}

async fn seed(site: &Site, request: SeedRequest) -> anyhow::Result<SeedReport> {
    let mut display = Display::new(site.json);
    let mut lines = site.client.post_stream::<_, SeedLine>("/v1/seeds", &request).await?;
    while let Some(line) = lines.next().await? {
        match line {
            SeedLine::Progress(at) => display.bytes(&at.disk, at.done_bytes, at.total_bytes),
            SeedLine::Done { report } => {
                display.finish();
                return Ok(report);
            }
        }
    }
    anyhow::bail!("the site controller went away before it was done, and nothing is kept of it; run it again")
}
