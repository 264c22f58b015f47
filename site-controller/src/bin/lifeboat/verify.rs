//! `lifeboat verify`.

use crate::ask::{Ended, Site};
use anyhow::Context;
use clap::Args;
use lifeboat::local_api::Client;
use lifeboat_site_controller::{
    api::types::{VerifyLine, VerifyRequest},
    console::{tables, watch::Display},
    verify::VerifyReport,
};
use std::process::ExitCode;

/// Read and hash everything again that is stored, and say what is damaged.
#[derive(Args)]
pub struct Verify {
    /// Name or UUID; all VMs where it is left out.
    vm: Option<String>,
}

impl Verify {
    pub async fn run(self, site: &Site) -> Ended {
        let report = verify(&site.client, VerifyRequest { vm: self.vm }, site.json).await?;
        let printed = site.print(&report, tables::verify)?;
        Ok(if report.is_clean() { printed } else { ExitCode::from(DAMAGE) })
    }
}

async fn verify(client: &Client, request: VerifyRequest, json: bool) -> anyhow::Result<VerifyReport> {
    let mut display = Display::new(json);
    let mut lines = client.post_stream::<_, VerifyLine>("/v1/verify", &request).await?;
    while let Some(line) = lines.next().await.context("verifying")? {
        match line {
            VerifyLine::Progress { done_bytes, total_bytes } => {
                display.bytes("verifying", done_bytes, total_bytes)
            }
            VerifyLine::Done { report } => {
                display.finish();
                return Ok(report);
            }
        }
    }
    anyhow::bail!("the site controller went away before it was done; run it again")
}

/// The exit code that says so.
const DAMAGE: u8 = 3;
