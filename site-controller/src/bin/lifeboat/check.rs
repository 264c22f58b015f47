//! `lifeboat check`.

use crate::ask::{Ended, Site, path_segment};
use clap::Args;
use lifeboat_site_controller::{
    console::readiness,
    readiness::{Readiness, Verdict},
};
use std::process::ExitCode;

/// Exit code where a failover would work, and something is not as it should be.
const DEGRADED: u8 = 4;
/// Exit code where a failover would not work.
const NOT_READY: u8 = 5;

/// Say whether a failover would work now, and why not.
#[derive(Args)]
pub struct Check {
    /// A group or a VM; all of them where it is missing.
    name: Option<String>,
}

impl Check {
    pub async fn run(self, site: &Site) -> Ended {
        let found: Vec<Readiness> = match &self.name {
            Some(name) => vec![site.client.get(&format!("/v1/readiness/{}", path_segment(name))).await?],
            None => site.client.get("/v1/readiness").await?,
        };
        site.print(&found, |found| readiness::all(found))?;
        Ok(match found.iter().map(|readiness| readiness.verdict).max() {
            None | Some(Verdict::Ready) => ExitCode::SUCCESS,
            Some(Verdict::Degraded) => ExitCode::from(DEGRADED),
            Some(Verdict::NotReady) => ExitCode::from(NOT_READY),
        })
    }
}
