//! `lifeboat failover`: asks, starts it, and shows how far it is.

use crate::ask::{Ended, Site, confirm};
use clap::Args;
use lifeboat::local_api::{Client, ClientError};
use lifeboat_site_controller::{
    api::types::{FailoverPreview, FailoverRequest, GroupFailoverPreview, GroupFailoverRequest, GroupRow},
    console::{groups, tables, watch::Display},
    failover::{progress::Progress, runbook::LATEST},
};
use serde::Serialize;

/// Bring a group, or a VM, up at this site.
///
/// Run it again if it was interrupted: it goes on from the last step that was completed.
#[derive(Args)]
pub struct Failover {
    /// A group's name, or a VM's name or UUID.
    name: String,
    /// The source is lost, or given up.
    #[arg(long, required_unless_present = "planned", conflicts_with = "planned")]
    emergency: bool,
    /// The source is well: its VMs stand first, nothing is lost, and they are shut off once the replicas run. Whatever goes
    /// wrong before that lets them go on.
    #[arg(long)]
    planned: bool,
    /// Only show what it would do.
    #[arg(long)]
    dry_run: bool,
    /// Which point: `latest`, the beginning of an id, or a time (`2026-01-31T12:00:00Z`, `12:00:00` today, `5m ago`): the
    /// newest point at or before it.
    #[arg(long, default_value = LATEST, conflicts_with = "planned")]
    point: String,
    /// Do not run the site's `fence_command`: the source is known to be off.
    #[arg(long, conflicts_with = "planned")]
    skip_fence_command: bool,
    /// If a VM's replica does not go on with its memory, leave it at that; otherwise it is booted from the point's disks.
    /// Of a group, its runbook says so.
    #[arg(long)]
    no_cold_boot: bool,
    /// Start the replica of a VM that was off; without this it is defined, and left off. Of a group's, start them yourself.
    #[arg(long)]
    start: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl Failover {
    pub async fn run(self, site: &Site) -> Ended {
        if self.planned || self.is_a_group(site).await? {
            return self.of_group(site).await;
        }
        let Self { name: vm, point, skip_fence_command, no_cold_boot, start, .. } = self;
        let request = FailoverRequest { vm, point, skip_fence_command, no_cold_boot, start };
        if !self.yes || self.dry_run {
            let preview: FailoverPreview = site.client.post("/v1/failovers/preview", &request).await?;
            if self.dry_run {
                return site.print(&preview, tables::preview);
            }
            confirm(&tables::preview(&preview), "the VM's name", &preview.name)?;
        }
        match follow(&site.client, "/v1/failovers", &request, site.json).await? {
            Progress::Done { report } => site.print(&*report, tables::failover),
            other => anyhow::bail!("the site controller answered {other:?}"),
        }
    }

    async fn is_a_group(&self, site: &Site) -> anyhow::Result<bool> {
        let groups: Vec<GroupRow> = site.client.get("/v1/groups").await?;
        Ok(groups.iter().any(|row| row.group.spec.name == self.name || row.group.id.to_string() == self.name))
    }

    async fn of_group(self, site: &Site) -> Ended {
        anyhow::ensure!(
            !self.no_cold_boot,
            "--no-cold-boot is for a single VM; of a group write it into its `runbook`"
        );
        anyhow::ensure!(
            !self.start,
            "--start is for an emergency failover of a single VM; start the others with `virsh start`"
        );
        let Self { name, planned, point, skip_fence_command, .. } = self;
        let request = GroupFailoverRequest { name, planned, point, skip_fence_command };
        if !self.yes || self.dry_run {
            let preview: GroupFailoverPreview =
                site.client.post("/v1/group-failovers/preview", &request).await?;
            if self.dry_run {
                return site.print(&preview, groups::failover_preview);
            }
            confirm(&groups::failover_preview(&preview), "its name", &preview.name)?;
        }
        match follow(&site.client, "/v1/group-failovers", &request, site.json).await? {
            Progress::GroupDone { report } => site.print(&*report, groups::failover),
            other => anyhow::bail!("the site controller answered {other:?}"),
        }
    }
}

/// Shows how far it is; returns the last line.
pub async fn follow<R: Serialize>(
    client: &Client,
    path: &str,
    request: &R,
    json: bool,
) -> anyhow::Result<Progress> {
    let mut display = Display::new(json);
    let mut lines = client.post_stream::<_, Progress>(path, request).await?;
    loop {
        let progress = match lines.next().await {
            Ok(Some(progress)) => progress,
            Ok(None) | Err(ClientError::BrokenOff { .. }) => break,
            Err(error) => return Err(error.into()),
        };
        match progress {
            Progress::Step { step } => display.step(&step),
            Progress::Bytes { step, done, total } => display.bytes(&step, done, total),
            done @ (Progress::Done { .. } | Progress::GroupDone { .. } | Progress::DrillDone { .. }) => {
                display.finish();
                return Ok(done);
            }
        }
    }
    anyhow::bail!(
        "the site controller went away in the middle; once it runs again, run the same command again: a failover goes on from \
         the last step that was completed, a drill begins anew"
    )
}
