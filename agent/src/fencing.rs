//! The commands of `lifeboat-agent` about fenced copies, and about libvirt's hook: asks, carries out, says what was done.
//! Part of the program, not of the library: called by `main` only.

use anyhow::Context;
use lifeboat::{
    clock::{Clock, SystemClock},
    hypervisor::libvirt::Hypervisor,
};
use lifeboat_agent::{
    config::AgentConfig,
    fence::{
        hook::{Hook, Installed},
        orders::{Diverged, Orders},
    },
};
use std::{
    io::{self, IsTerminal},
    path::Path,
};

pub fn allow(config: &AgentConfig, vm: &str, yes: bool, by: &str) -> anyhow::Result<()> {
    let orders = orders(config)?;
    let id = orders.vm(vm)?;
    let warning = format!(
        "This host's copy of `{vm}` will be let run although the site has not said that it may. If a replica of it runs at \
         the site, or another copy anywhere, there will be two.\n"
    );
    confirm(yes, &warning, vm)?;
    orders.allow(id, by, SystemClock.now())?;
    println!(
        "{vm}: this copy may run. One that is paused goes on with `virsh resume`, one that is off with `virsh start`."
    );
    if orders.list()?.iter().any(|row| row.vm == id && !row.kept.is_empty()) {
        println!("What is kept of it goes on with `lifeboat-agent diverged restore {vm}`.");
    }
    Ok(())
}

pub fn resume_held(config: &AgentConfig, vm: &str, yes: bool, by: &str) -> anyhow::Result<()> {
    let orders = orders(config)?;
    let id = orders.held(vm)?;
    let warning = format!(
        "`{vm}` stands for a planned failover. The site was told so, and may start its replica at any moment, or have done \
         so: if you let this copy go on, there may be two. Do this only if the site is lost for good and no replica runs.\n"
    );
    confirm(yes, &warning, vm)?;
    let hypervisor = Hypervisor::connect(&config.libvirt)?;
    if orders.resume_held(&hypervisor, id, by, SystemClock.now())? {
        println!("{vm}: it goes on");
    } else {
        println!("{vm}: it is off; it may be started: `virsh start {vm}`");
    }
    Ok(())
}

pub fn list(config: &AgentConfig, json: bool) -> anyhow::Result<()> {
    let rows = orders(config)?.list()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else if rows.is_empty() {
        println!("No copy on this host was failed over.");
    } else {
        rows.iter().for_each(|row| print!("{}", text(row)));
    }
    Ok(())
}

pub fn show(config: &AgentConfig, vm: &str, json: bool) -> anyhow::Result<()> {
    let row = orders(config)?.find(vm)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&row)?);
        return Ok(());
    }
    print!("{}", text(&row));
    println!("To look into a disk without changing it: `guestmount --ro -a DISK -i /mnt`, or copy it first.");
    println!("To give all of this up: `lifeboat-agent diverged discard {vm}`.");
    println!(
        "To have it run again, if no other copy does: `lifeboat-agent allow {vm}`, `lifeboat-agent diverged restore {vm}`."
    );
    Ok(())
}

pub fn discard(config: &AgentConfig, vm: &str, yes: bool) -> anyhow::Result<()> {
    let orders = orders(config)?;
    let row = orders.find(vm)?;
    let warning =
        format!("{}What only this copy's memory knows will be lost for good. Its disks stay.\n", text(&row));
    confirm(yes, &warning, &row.name)?;
    orders.discard(&Hypervisor::connect(&config.libvirt)?, &row)?;
    println!("{}: given up; its disks are where they were", row.name);
    Ok(())
}

pub fn restore(config: &AgentConfig, vm: &str) -> anyhow::Result<()> {
    let orders = orders(config)?;
    let row = orders.find(vm)?;
    orders.restore(&Hypervisor::connect(&config.libvirt)?, &row)?;
    println!("{}: it goes on from where it was put away", row.name);
    Ok(())
}

pub fn install_hook(config: &AgentConfig, dir: &Path) -> anyhow::Result<()> {
    let hook = hook(config, dir);
    let told = hook.install().with_context(|| format!("installing {}", hook.file().display()))?;
    println!("{}: installed", hook.file().display());
    said(&told);
    Ok(())
}

pub fn remove_hook(config: &AgentConfig, dir: &Path) -> anyhow::Result<()> {
    let hook = hook(config, dir);
    let told = hook.remove().with_context(|| format!("removing {}", hook.file().display()))?;
    println!("{}: removed", hook.file().display());
    said(&told);
    Ok(())
}

pub fn show_hook(config: &AgentConfig, dir: &Path) -> anyhow::Result<()> {
    let hook = hook(config, dir);
    let words = match hook.status().with_context(|| format!("reading {}", hook.file().display()))? {
        Installed::Yes => "installed",
        Installed::No => "not installed; `lifeboat-agent hook install` does that",
        Installed::Differs => {
            "another release's, or for other folders; `lifeboat-agent hook install` replaces it"
        }
    };
    println!("{}: {words}", hook.file().display());
    Ok(())
}

fn said(told: &[String]) {
    if told.is_empty() {
        println!("No libvirt daemon was found running: it looks for hooks when it starts.");
    } else {
        println!("Told {} to look for hooks again.", told.join(" and "));
    }
}

fn hook(config: &AgentConfig, dir: &Path) -> Hook {
    Hook::new(dir, &config.state_dir, &config.run_dir)
}

fn orders(config: &AgentConfig) -> anyhow::Result<Orders> {
    Ok(Orders::open(&config.state_dir, &config.run_dir)?)
}

fn text(row: &Diverged) -> String {
    let fenced = match (row.fenced_by, row.fenced_at) {
        (Some(by), Some(at)) => format!("failed over to the site (generation {by}), seen at {at}"),
        _ => "not fenced any more".to_owned(),
    };
    let mut out = format!("{} ({}): {fenced}\n", row.name, row.vm);
    if row.kept.is_empty() {
        out += "  nothing is put away: if it is paused, its memory knows what it did since\n";
    }
    for kept in &row.kept {
        let memory = kept
            .memory_bytes
            .map_or_else(|| "no whole memory".into(), |bytes| format!("{} MiB", bytes >> 20));
        out += &format!("  put away at {} in {}: {memory}\n", kept.at, kept.folder.display());
        for disk in &kept.disks {
            out += &format!("    disk {}: {}\n", disk.target, disk.source);
        }
    }
    out
}

fn confirm(yes: bool, warning: &str, name: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    eprint!("{warning}");
    anyhow::ensure!(
        io::stdin().is_terminal(),
        "not confirmed: there is no terminal to ask on; give --yes if you are sure"
    );
    eprint!("Type the VM's name to go on: ");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    anyhow::ensure!(line.trim() == name, "not confirmed; nothing was changed");
    Ok(())
}
