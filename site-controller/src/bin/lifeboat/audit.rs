//! `lifeboat audit`: who changed what.

use crate::ask::{Ended, Site, path_segment};
use clap::Args;
use lifeboat_site_controller::{api::types::AuditList, console::audit};

/// List the calls that changed something, or were to: who made them, from where, and how they ended.
#[derive(Args)]
pub struct Audit {
    /// Those since then: `2h ago`, `12:00:00` today, `2026-01-31T12:00:00Z`.
    #[arg(long)]
    since: Option<String>,
    /// The newest so many.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
}

impl Audit {
    pub async fn run(self, site: &Site) -> Ended {
        let since = self.since.map(|since| format!("&since={}", path_segment(&since))).unwrap_or_default();
        let list: AuditList = site.client.get(&format!("/v1/audit?limit={}{since}", self.limit)).await?;
        site.print(&list, audit::calls)
    }
}
