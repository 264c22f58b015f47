//! `lifeboat group`, `lifeboat apply` and `lifeboat inventory`: which VMs are protected as one.

use crate::ask::{Ended, Site, confirm, path_segment};
use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use lifeboat::wire::order::{ConsistencyWish, MemoryWish};
use lifeboat_site_controller::{
    api::types::{GroupPointList, GroupRequest, GroupRow, InventoryList},
    console::groups,
    group::{Group as Stored, GroupSpec},
};
use serde::Deserialize;
use std::{path::PathBuf, process::ExitCode};

/// Protect VMs as one: points of all of them at one instant.
#[derive(Args)]
pub struct Group {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a group; its VMs are protected from then on.
    Create {
        name: String,
        /// A VM, by name or UUID; once for each.
        #[arg(long = "vm", required = true)]
        vms: Vec<String>,
        #[command(flatten)]
        wishes: Wishes,
    },
    /// List the groups.
    List,
    /// Show one.
    Show {
        name: String,
    },
    /// List the points that all its members have of one instant.
    Points {
        name: String,
    },
    /// Take VMs in.
    Add {
        name: String,
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Let VMs go: they are no longer protected by the group; their points stay.
    Remove {
        name: String,
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Change what it is protected by.
    Set {
        name: String,
        #[command(flatten)]
        wishes: Wishes,
    },
    Rename {
        name: String,
        to: String,
    },
    /// No points until it is resumed.
    Pause {
        name: String,
    },
    Resume {
        name: String,
    },
    /// Forget the group; the points of its VMs stay.
    Delete {
        name: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Args)]
struct Wishes {
    /// How old the newest point may be: `5s`.
    #[arg(long)]
    rpo: Option<String>,
    /// Which points are kept, as in site.toml: `all for 1h`; once for each rule.
    #[arg(long)]
    keep: Vec<String>,
    #[arg(long)]
    memory: Option<Memory>,
    /// What a point without memory is to be.
    #[arg(long)]
    consistency: Option<Consistency>,
    /// Whether it is failed over by itself in an emergency; needs a witness.
    #[arg(long, value_name = "YES", num_args = 0..=1, default_missing_value = "true")]
    automatic: Option<bool>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Memory {
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
enum Consistency {
    /// As after a power cut.
    Crash,
    /// File systems are frozen for the instant, through the guest agent.
    App,
}

/// Make groups as a file says; run again, it changes only what differs.
///
/// The file is TOML with one `[[group]]` each: `name`, `vms`, `rpo`, `keep`, `memory`, `consistency`, `runbook`, `drill`.
/// Groups that it does not name are left as they are, unless `--prune` is given.
#[derive(Args)]
pub struct Apply {
    #[arg(short, long)]
    file: PathBuf,
    /// Only show what would be changed.
    #[arg(long)]
    diff: bool,
    /// Delete groups that the file does not name; the points of their VMs stay.
    #[arg(long)]
    prune: bool,
    /// Do not ask before a group is deleted.
    #[arg(long)]
    yes: bool,
}

/// List the VMs of the hosts whose agents are connected.
#[derive(Args)]
pub struct Inventory {}

impl Group {
    pub async fn run(self, site: &Site) -> Ended {
        match self.command {
            Command::Create { name, vms, wishes } => {
                let named: Vec<&str> = vms.iter().map(String::as_str).collect();
                let spec = wishes.over(GroupSpec::new(&name, &named));
                let row: GroupRow = site.client.post("/v1/groups", &GroupRequest { spec }).await?;
                site.print(&row, groups::one)
            }
            Command::List => {
                let rows: Vec<GroupRow> = site.client.get("/v1/groups").await?;
                site.print(&rows, |rows| groups::list(rows))
            }
            Command::Show { name } => site.print(&get(site, &name).await?, groups::one),
            Command::Points { name } => {
                let list: GroupPointList = site.client.get(&format!("{}/points", path(&name))).await?;
                site.print(&list, groups::points)
            }
            Command::Add { name, vms } => {
                change(site, &name, |spec| {
                    let new = vms.into_iter().filter(|vm| !spec.vms.contains(vm)).collect::<Vec<_>>();
                    spec.vms.extend(new);
                })
                .await
            }
            Command::Remove { name, vms } => change(site, &name, |spec| spec.let_go(&vms)).await,
            Command::Set { name, wishes } => {
                change(site, &name, |spec| *spec = wishes.over(spec.clone())).await
            }
            Command::Rename { name, to } => change(site, &name, |spec| spec.name = to).await,
            Command::Pause { name } => act(site, &name, "pause").await,
            Command::Resume { name } => act(site, &name, "resume").await,
            Command::Delete { name, yes } => {
                let row = get(site, &name).await?;
                if !yes {
                    confirm(&groups::delete_preview(&row), "the group's name", &row.group.spec.name)?;
                }
                let gone: Stored = site.client.post(&format!("{}/delete", path(&name)), &()).await?;
                site.print(&gone, groups::deleted)
            }
        }
    }
}

impl Wishes {
    fn over(self, mut spec: GroupSpec) -> GroupSpec {
        spec.rpo = self.rpo.unwrap_or(spec.rpo);
        if !self.keep.is_empty() {
            spec.keep = Some(self.keep);
        }
        spec.memory = self.memory.map_or(spec.memory, |memory| match memory {
            Memory::Auto => MemoryWish::Auto,
            Memory::On => MemoryWish::On,
            Memory::Off => MemoryWish::Off,
        });
        spec.consistency = self.consistency.map_or(spec.consistency, |wish| match wish {
            Consistency::Crash => ConsistencyWish::Crash,
            Consistency::App => ConsistencyWish::App,
        });
        spec.automatic = self.automatic.unwrap_or(spec.automatic);
        spec
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    group: Vec<GroupSpec>,
}

impl Apply {
    pub async fn run(self, site: &Site) -> Ended {
        let loaded = lifeboat::config::load::<File>(&self.file).context("reading the groups")?;
        lifeboat::config::refuse(&self.file, &loaded.unknown)?;
        let present: Vec<GroupRow> = site.client.get("/v1/groups").await?;
        let named: Vec<&str> = loaded.value.group.iter().map(|spec| spec.name.as_str()).collect();
        let left_out = |row: &&GroupRow| self.prune && !named.contains(&row.group.spec.name.as_str());
        let going: Vec<GroupRow> = present.iter().filter(left_out).cloned().collect();
        if !self.diff && !self.yes && !going.is_empty() {
            let preview: String = going.iter().map(groups::delete_preview).collect();
            confirm(&preview, "the name of the first of them", &going[0].group.spec.name)?;
        }
        let mut done = Vec::new();
        for spec in loaded.value.group {
            spec.check()?;
            let before = present.iter().map(|row| &row.group.spec).find(|known| known.name == spec.name);
            let what = match before {
                None => "create",
                Some(before) if *before == spec => "keep",
                Some(_) => "change",
            };
            if !self.diff && what != "keep" {
                let url = before.map_or_else(|| "/v1/groups".to_owned(), |before| path(&before.name));
                let _: GroupRow = site.client.post(&url, &GroupRequest { spec: spec.clone() }).await?;
            }
            let lines = diff(before, Some(&spec))?;
            done.push(Applied { group: spec.name, what: what.into(), lines });
        }
        for row in going {
            let spec = row.group.spec;
            if !self.diff {
                let _: Stored = site.client.post(&format!("{}/delete", path(&spec.name)), &()).await?;
            }
            let lines = diff(Some(&spec), None)?;
            done.push(Applied { group: spec.name, what: "delete".into(), lines });
        }
        site.print(&done, |done| shown(done))
    }
}

/// What was, or would be, done with one group.
#[derive(serde::Serialize)]
struct Applied {
    group: String,
    what: String,
    /// Lines that go (`-`) and come (`+`).
    lines: Vec<String>,
}

fn diff(before: Option<&GroupSpec>, after: Option<&GroupSpec>) -> anyhow::Result<Vec<String>> {
    let lines = |spec: &GroupSpec| -> anyhow::Result<Vec<String>> {
        Ok(serde_json::to_string_pretty(spec)?.lines().map(str::to_owned).collect())
    };
    let (old, new) = (before.map_or(Ok(Vec::new()), lines)?, after.map_or(Ok(Vec::new()), lines)?);
    let gone = old.iter().filter(|line| !new.contains(line)).map(|line| format!("-{line}"));
    let come = new.iter().filter(|line| !old.contains(line)).map(|line| format!("+{line}"));
    Ok(gone.chain(come).collect())
}

fn shown(done: &[Applied]) -> String {
    let one = |applied: &Applied| {
        let lines: String = applied.lines.iter().map(|line| format!("    {line}\n")).collect();
        format!("{} {}\n{lines}", applied.what, applied.group)
    };
    done.iter().map(one).collect()
}

impl Inventory {
    pub async fn run(self, site: &Site) -> Ended {
        let list: InventoryList = site.client.get("/v1/inventory").await?;
        site.print(&list, groups::inventory)
    }
}

async fn get(site: &Site, name: &str) -> anyhow::Result<GroupRow> {
    Ok(site.client.get(&path(name)).await?)
}

async fn change(site: &Site, name: &str, change: impl FnOnce(&mut GroupSpec)) -> Ended {
    let mut spec = get(site, name).await?.group.spec;
    change(&mut spec);
    let row: GroupRow = site.client.post(&path(name), &GroupRequest { spec }).await?;
    site.print(&row, groups::one)
}

async fn act(site: &Site, name: &str, what: &str) -> anyhow::Result<ExitCode> {
    let row: GroupRow = site.client.post(&format!("{}/{what}", path(name)), &()).await?;
    site.print(&row, groups::one)
}

fn path(name: &str) -> String {
    format!("/v1/groups/{}", path_segment(name))
}
