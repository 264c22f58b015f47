//! `lifeboat undo`: asks, starts it, and shows how far it is.

use crate::{
    ask::{Ended, Site, confirm},
    failover::follow,
};
use clap::Args;
use lifeboat_site_controller::{
    api::types::{UndoPreview, UndoRequest},
    console::{groups, tables},
    failover::progress::Progress,
};

/// Take a completed failover to another point.
///
/// Within the window after it (`undo_window` of a group's runbook; an hour for a VM in none). The other point is
/// restored first: if it is damaged, nothing is changed. Then the replicas are stopped, their disks set aside for as
/// long again, and the VMs go on from the other point. Run it again if it was interrupted.
#[derive(Args)]
pub struct Undo {
    /// A group's name, or a VM's name or UUID.
    name: String,
    /// Which point: `latest`, the beginning of an id, or a time (`5m ago`).
    #[arg(long)]
    point: String,
    /// Only show what it would do.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl Undo {
    pub async fn run(self, site: &Site) -> Ended {
        let request = UndoRequest { name: self.name, point: self.point };
        if !self.yes || self.dry_run {
            let preview: UndoPreview = site.client.post("/v1/undos/preview", &request).await?;
            if self.dry_run {
                return site.print(&preview, tables::undo_preview);
            }
            confirm(&tables::undo_preview(&preview), "its name", &preview.name)?;
        }
        match follow(&site.client, "/v1/undos", &request, site.json).await? {
            Progress::Done { report } => site.print(&*report, tables::failover),
            Progress::GroupDone { report } => site.print(&*report, groups::failover),
            other => anyhow::bail!("the site controller answered {other:?}"),
        }
    }
}
