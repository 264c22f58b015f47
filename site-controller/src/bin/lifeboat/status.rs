//! `lifeboat status`.

use crate::ask::{Ended, Site};
use clap::Args;
use lifeboat_site_controller::{api::types::SiteStatus, console::tables};

/// Show the site and every VM that is protected to it.
#[derive(Args)]
pub struct Status {}

impl Status {
    pub async fn run(self, site: &Site) -> Ended {
        let status: SiteStatus = site.client.get("/v1/status").await?;
        site.print(&status, tables::status)
    }
}
