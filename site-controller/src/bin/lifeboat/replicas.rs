//! `lifeboat replicas`: the folders that failovers left at the site.

use crate::ask::{Ended, Site, confirm};
use clap::Args;
use lifeboat_site_controller::{api::types::ReplicaList, console::replicas, failover::folders::Needed};

/// List the disks that failovers made at this site, and who needs them; remove those that nobody does.
///
/// Each failover has a folder of its own. Disks that a VM runs from, that one which is off would start from, or that an undo
/// keeps, are never removed.
#[derive(Args)]
pub struct Replicas {
    /// Remove the folders that nobody needs.
    #[arg(long)]
    prune: bool,
    /// With --prune: only show what it would remove.
    #[arg(long, requires = "prune")]
    dry_run: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl Replicas {
    pub async fn run(self, site: &Site) -> Ended {
        let mut list: ReplicaList = site.client.get("/v1/replicas").await?;
        if !self.prune {
            return site.print(&list, replicas::list);
        }
        list.replicas.retain(|row| row.folder.needed == Needed::Nobody);
        if self.dry_run || list.replicas.is_empty() {
            let shown = if list.replicas.is_empty() { replicas::removed } else { replicas::going };
            return site.print(&list, shown);
        }
        if !self.yes {
            confirm(&replicas::going(&list), "yes", "yes")?;
        }
        let removed: ReplicaList = site.client.post("/v1/replicas/prune", &()).await?;
        site.print(&removed, replicas::removed)
    }
}
