//! `lifeboat group` and `lifeboat inventory`: which VMs are protected as one. `apply` does the same from a file.

use crate::ask::{Ended, Site, confirm, path_segment};
use clap::{Args, Subcommand, ValueEnum};
use lifeboat::wire::order::{ConsistencyWish, MemoryWish};
use lifeboat_site_controller::{
    api::types::{GroupPointList, GroupRequest, GroupRow, InventoryList},
    console::groups,
    group::{Group as Stored, GroupSpec},
};
use std::process::ExitCode;

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
    /// Its VMs are no longer protected by it. Their points stay; its history is there again if a group of its name is made.
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

pub fn path(name: &str) -> String {
    format!("/v1/groups/{}", path_segment(name))
}
