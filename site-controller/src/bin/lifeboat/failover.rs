//! `lifeboat failover`: asks, starts it, and shows how far it is.

use crate::ask::{Ended, Site, confirm};
use clap::Args;
use lifeboat::local_api::{Client, ClientError};
use lifeboat_site_controller::{
    api::types::{FailoverPreview, FailoverRequest},
    console::{tables, watch::Display},
    failover::{
        progress::{FailoverReport, Progress},
        runbook::LATEST,
    },
};

/// Bring a VM back at this site from a recovery point.
///
/// Run it again if it was interrupted: it goes on from the last step that was completed.
#[derive(Args)]
pub struct Failover {
    /// Name or UUID.
    vm: String,
    /// The source is lost (the only kind of failover in this release).
    #[arg(long, required = true)]
    emergency: bool,
    /// Which point: `latest`, the beginning of an id, or a time (`2026-01-31T12:00:00Z`, `12:00:00` today, `5m ago`): the
    /// newest point at or before it.
    #[arg(long, default_value = LATEST)]
    point: String,
    /// If the replica does not go on with its memory, leave it at that; otherwise it is booted from the point's disks.
    #[arg(long)]
    no_cold_boot: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl Failover {
    pub async fn run(self, site: &Site) -> Ended {
        let request = FailoverRequest { vm: self.vm, point: self.point, no_cold_boot: self.no_cold_boot };
        if !self.yes {
            let preview: FailoverPreview = site.client.post("/v1/failovers/preview", &request).await?;
            confirm(&tables::preview(&preview), "the VM's name", &preview.name)?;
        }
        let report = fail_over(&site.client, request, site.json).await?;
        site.print(&report, tables::failover)
    }
}

async fn fail_over(client: &Client, request: FailoverRequest, json: bool) -> anyhow::Result<FailoverReport> {
    let mut display = Display::new(json);
    let mut lines = client.post_stream::<_, Progress>("/v1/failovers", &request).await?;
    loop {
        let progress = match lines.next().await {
            Ok(Some(progress)) => progress,
            Ok(None) | Err(ClientError::BrokenOff { .. }) => break,
            Err(error) => return Err(error.into()),
        };
        match progress {
            Progress::Step { step } => display.step(&step),
            Progress::Bytes { step, done, total } => display.bytes(&step, done, total),
            Progress::Done { report } => {
                display.finish();
                return Ok(report);
            }
        }
    }
    anyhow::bail!(
        "the site controller went away in the middle of the failover; once it runs again, run the same command again: it \
         goes on from the last step that was completed"
    )
}
