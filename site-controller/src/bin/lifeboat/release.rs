//! `lifeboat release`: a VM's history is given to whoever has the guest.

use crate::ask::{Ended, Site, confirm, path_segment};
use clap::Args;
use lifeboat_site_controller::{
    api::types::{Released, SiteStatus, VmRow},
    console::tables,
};

/// Let another host's agent go on with a VM's history, where nothing shows that the guest moved there.
///
/// Needed after a guest was started elsewhere other than by a live migration: its host is lost, say. Make sure that no
/// other copy of it runs.
#[derive(Args)]
pub struct Release {
    /// Name or UUID.
    vm: String,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

impl Release {
    pub async fn run(self, site: &Site) -> Ended {
        let vm = self.vm;
        if !self.yes {
            let status: SiteStatus = site.client.get("/v1/status").await?;
            let is_meant = |row: &&VmRow| row.name == vm || row.vm.to_string() == vm;
            // One that is not known is refused by the site in its own words.
            if let Some(row) = status.vms.iter().find(is_meant) {
                confirm(&tables::release_preview(row), "the VM's name", &row.name)?;
            }
        }
        let path = format!("/v1/vms/{}/release", path_segment(&vm));
        let released: Released = site.client.post(&path, &()).await?;
        site.print(&released, tables::released)
    }
}
