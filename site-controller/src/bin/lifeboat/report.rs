//! `lifeboat report`: asks for it, shows it in short, and writes it down.

use crate::ask::{Ended, Site, path_segment};
use anyhow::Context;
use clap::Args;
use lifeboat::durable;
use lifeboat_site_controller::{
    console::report,
    report::{Report as Found, html},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Report points, the RPO attained, drills, failovers and readiness: for an auditor.
///
/// It tells what the points, journals and records that are kept show, and says what is not known. `--out` writes it as a
/// page of HTML that needs nothing else, and as JSON.
#[derive(Args)]
pub struct Report {
    /// A group, with its VMs, or a VM; all of them where it is missing.
    name: Option<String>,
    /// How far back: `30d`, or a time.
    #[arg(long, default_value = "30d")]
    since: String,
    /// Write `lifeboat-report.html` and `lifeboat-report.json` into this folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Report {
    pub async fn run(self, site: &Site) -> Ended {
        let name = self.name.map(|name| format!("&name={}", path_segment(&name))).unwrap_or_default();
        let path = format!("/v1/report?since={}{name}", path_segment(&self.since));
        let found: Found = site.client.get(&path).await?;
        if let Some(dir) = &self.out {
            let files = write(&found, dir)?;
            if !site.json {
                let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
                eprintln!("Written: {}", names.join(", "));
            }
        }
        site.print(&found, report::summary)
    }
}

/// Each file whole, or not at all; readable for whoever the folder is.
fn write(found: &Found, dir: &Path) -> anyhow::Result<[PathBuf; 2]> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let files = ["lifeboat-report.html", "lifeboat-report.json"].map(|name| dir.join(name));
    let texts = [html::page(found), serde_json::to_string_pretty(found)? + "\n"];
    for (file, text) in files.iter().zip(texts) {
        let written = durable::replace(file, text.as_bytes(), 0o644);
        written.with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(files)
}
