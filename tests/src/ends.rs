//! Two ends, each a site with a controller of its own and a host whose agent protects to the other end's: what goes to the
//! other site and home again. On both hosts libvirt asks the agent's hook before it starts anything, and nobody types `allow`.
//! Called by the end-to-end tests.

use crate::{
    Guest, GuestSpec, Link, Output, Rig, Site, eventually,
    product::{Agent, Controller, replica_unharmed},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{fs, io::Read, time::Duration};

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(240);

/// The steps of being protected back, at the controller of the site that the VM came from.
pub const REPROTECT: [&str; 8] = [
    "seed.begun",
    "seed.region:5",
    "seed.read",
    "seed.committed",
    "accept.seeded",
    "accept.named",
    "accept.raised",
    "accept.closed",
];

/// One end: a site with its own controller, and a host whose agent protects to the other end's.
pub struct End {
    pub site: Site,
    pub controller: Controller,
    pub agent: Agent,
    /// How the other end names this one.
    pub to: Vec<String>,
}

pub struct World {
    pub home: End,
    pub away: End,
    pub link: Link,
    pub rig: Rig,
}

impl World {
    /// The guests run at home, and what is in `settings` is protected by both agents.
    pub fn new(name: &str, guests: &[GuestSpec], settings: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, link) = rig.pair()?;
        let (at_a, at_b) = (Controller::listening(&a)?, Controller::listening(&b)?);
        let settings = format!("[defaults]\nmax_pause = \"20s\"\n{settings}");
        for spec in guests {
            for (at, disk) in spec.disks.iter().enumerate() {
                // Bytes that do not pack: what travels shows on the line.
                let path = a.host_path(spec.disk_path(at))?;
                fs::create_dir_all(path.parent().context("a disk lies in a folder")?)?;
                let mut bytes = vec![0; usize::try_from(disk.size_mib << 20)?];
                fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
                fs::write(path, bytes)?;
            }
            a.define_and_start(spec)?.wait_for_tick(2, BOOT)?;
        }
        let agent = |site: &Site, controller: &Controller| -> Result<Agent> {
            let mut agent = Agent::install(site, controller, &settings)?;
            agent.install_hook()?;
            agent.start()?;
            Ok(agent)
        };
        let (of_a, of_b) = (agent(&a, &at_b)?, agent(&b, &at_a)?);
        let (to_a, to_b) = (at_b.peer(&at_a)?, at_a.peer(&at_b)?);
        let home = End { site: a, controller: at_a, agent: of_a, to: to_a };
        let away = End { site: b, controller: at_b, agent: of_b, to: to_b };
        Ok(Self { home, away, link, rig })
    }
}

impl End {
    /// A command about a VM or group that runs here and is to go, or be protected, to the other end.
    pub fn tries(&self, what: &str, name: &str, other: &End, more: &[&str]) -> Result<Output> {
        let to: Vec<&str> = other.to.iter().map(String::as_str).collect();
        self.controller.cli(&[&[what, name], to.as_slice(), more].concat())
    }

    pub fn does(&self, what: &str, name: &str, other: &End) -> Result<Value> {
        let said = self.tries(what, name, other, &["--yes", "--json"])?.success()?;
        serde_json::from_str(&said).with_context(|| format!("{what} printed: {said}"))
    }

    pub fn runs(&self, vm: &str) -> Result<bool> {
        let running = self.site.virsh(["list", "--name", "--state-running"])?;
        Ok(running.lines().any(|name| name.trim() == vm))
    }

    /// What the guests said here before is forgotten.
    pub fn expect(&self, vms: &[&str]) -> Result<()> {
        for vm in vms {
            let console = self.site.host_path(GuestSpec::console_path(vm))?;
            if console.exists() {
                fs::remove_file(console)?;
            }
        }
        Ok(())
    }

    /// They run here, went on where they stood at the other end, are who they were, and stay off there.
    pub fn has(&self, vms: &[&str], boots: &[String], other: &End) -> Result<()> {
        for (vm, boot) in vms.iter().zip(boots) {
            let last = other.site.guest(vm)?.last().context("it said nothing where it was")?;
            let guest: Guest = self.site.guest(vm)?;
            guest.wait(SOON, "it to report", |_| true)?;
            let first = guest.console().reports().remove(0);
            ensure!(first.tick >= last.tick && first.tick <= last.tick + 2, "{vm}: {first:?} after {last:?}");
            replica_unharmed(&guest, boot, first.tick, SOON)?;
            ensure!(other.site.guest(vm)?.state()? == "shut off", "{vm} is left at both ends");
            let start =
                other.site.command("virsh").args(["-q", "-c", "qemu:///system", "start", vm]).output()?;
            ensure!(!start.status.success() && start.stderr.contains("failed over"), "{vm}: {start:?}");
        }
        Ok(())
    }

    /// The first point that an agent sent of a VM since its hand-over.
    pub fn first_point(&self, handed: &Value) -> Result<Value> {
        let (name, generation) = (handed["name"].as_str().unwrap_or_default(), &handed["generation"]);
        eventually(SOON, &format!("a point of {name} of generation {generation}"), || {
            let points = self.controller.points(name).unwrap_or_default();
            let new = |point: &Value| point["generation"] == *generation && point["seed"] == false;
            Ok(points.into_iter().find(new))
        })
    }
}
