//! `lifeboat drill`, `lifeboat drills`.

use crate::{
    ask::{Ended, Site, path_segment},
    failover::follow,
};
use clap::Args;
use lifeboat_site_controller::{
    api::types::{DrillRequest, GroupRow},
    console::drills,
    drill::DrillRecord,
    failover::{progress::Progress, runbook::LATEST},
};
use std::process::ExitCode;

/// Try a failover out: replicas under other names, on a network of their own, which are removed again.
///
/// Protection goes on meanwhile, and nothing of the VMs is changed.
#[derive(Args)]
pub struct Drill {
    /// A group's name, or a VM's name or UUID.
    name: String,
    /// Which point: `latest`, the beginning of an id, or a time, as for a failover.
    #[arg(long, default_value = LATEST)]
    point: String,
    /// Let the replicas run on, until `--end`.
    #[arg(long, conflicts_with = "end")]
    keep: bool,
    /// Remove what was kept of an earlier one.
    #[arg(long)]
    end: bool,
}

/// List drills and how they went.
#[derive(Args)]
pub struct Drills {
    /// Those of a group, or of a VM.
    name: Option<String>,
}

impl Drill {
    pub async fn run(self, site: &Site) -> Ended {
        if self.end {
            let path = format!("/v1/drills/{}/end", path_segment(&self.name));
            let ended: Vec<DrillRecord> = site.client.post(&path, &serde_json::json!({})).await?;
            return site.print(&ended, |ended| drills::list(ended));
        }
        let request = DrillRequest { name: self.name, point: self.point, keep: self.keep };
        let Progress::DrillDone { id } = follow(&site.client, "/v1/drills", &request, site.json).await?
        else {
            anyhow::bail!("the site controller answered something else");
        };
        let record: DrillRecord = site.client.get(&format!("/v1/drills/{}", path_segment(&id))).await?;
        site.print(&record, drills::one)?;
        Ok(if record.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Drills {
    pub async fn run(self, site: &Site) -> Ended {
        let mut all: Vec<DrillRecord> = site.client.get("/v1/drills").await?;
        if let Some(name) = &self.name {
            // Its drills are the group's, whatever it was called then.
            let groups: Vec<GroupRow> = site.client.get("/v1/groups").await?;
            let group = groups.iter().find(|row| row.group.spec.name == *name).map(|row| row.group.id);
            let of_vm =
                |record: &DrillRecord| record.members.iter().any(|member| member.vm.to_string() == *name);
            all.retain(|record| match group {
                Some(group) => record.group == group,
                None => record.name == *name || of_vm(record),
            });
        }
        site.print(&all, |all| drills::list(all))
    }
}
