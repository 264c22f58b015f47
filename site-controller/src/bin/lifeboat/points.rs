//! `lifeboat points` and `lifeboat prune`: what the journal holds, and what may go.

use crate::ask::{Ended, Site, confirm, path_segment};
use clap::Args;
use lifeboat_site_controller::{
    api::types::{PointList, PrunePreview, PruneReport},
    console::tables,
};

/// List the recovery points of a VM.
#[derive(Args)]
pub struct Points {
    /// Name or UUID.
    vm: String,
}

/// Take away at once the points of a VM that no rule keeps (`keep` in site.toml), and fold what is left.
///
/// The controller does this by itself, in its own time. What is taken away can't be brought back.
#[derive(Args)]
pub struct Prune {
    /// Name or UUID.
    vm: String,
    /// Only show what would go.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl Points {
    pub async fn run(self, site: &Site) -> Ended {
        let path = format!("/v1/vms/{}/points", path_segment(&self.vm));
        let list: PointList = site.client.get(&path).await?;
        site.print(&list, tables::points)
    }
}

impl Prune {
    pub async fn run(self, site: &Site) -> Ended {
        let path = format!("/v1/vms/{}/prune", path_segment(&self.vm));
        if self.dry_run || !self.yes {
            let preview: PrunePreview = site.client.get(&path).await?;
            if self.dry_run {
                return site.print(&preview, tables::prune_preview);
            }
            confirm(&tables::prune_preview(&preview), "the VM's name", &preview.name)?;
        }
        let report: PruneReport = site.client.post(&path, &()).await?;
        site.print(&report, tables::prune)
    }
}
