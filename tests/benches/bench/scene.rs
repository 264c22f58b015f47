//! Two sites, a shaped link, one guest, and the products between them: what the rows about guests are measured on.
//! Owns the rig of one scene; everything in it ends with it. Called by `pauses`, `rpo`, `seed` and `work`.

use crate::measure::percentile;
use anyhow::{Context, Result, bail};
use rig::{
    Guest, GuestSpec, Rig, Shape, Site, eventually,
    product::{Agent, Controller},
};
use serde_json::Value;
use std::{fs, process::Command, time::Duration};

pub struct Scene {
    // Dropped in this order: the daemons before the sites they run in.
    pub agent: Option<Agent>,
    pub controller: Controller,
    pub guest: Guest,
    pub source: Site,
    name: String,
    rig: Rig,
}

impl Scene {
    /// Sites, link and guest; nothing protects it yet.
    pub fn witness(name: &'static str, mbit: u64, spec: &GuestSpec) -> Result<Self> {
        let scene = Self::furnished(name, mbit, spec, |_| Ok(()))?;
        scene.guest.wait_for_tick(3, PATIENCE)?;
        Ok(scene)
    }

    /// The guest that does real work, made by `tests/guest/workload.sh`; `kind` is `database`, `compile` or `none`.
    pub fn at_work(name: &'static str, mbit: u64, kind: &str) -> Result<Self> {
        let made = Command::new("tests/guest/workload.sh").current_dir(workspace()).status();
        if !made.context("starting tests/guest/workload.sh")?.success() {
            bail!("tests/guest/workload.sh could not make the guest");
        }
        let spec = GuestSpec::new(GUEST)
            .memory_mib(WORK_MEMORY_MIB)
            .disk(rig::DiskFormat::Raw, 2048)
            .argument(&format!("lb.work={kind}"));
        let rig_folder = rig::target_dir()?.join("rig");
        let scene = Self::furnished(name, mbit, &spec, |site| {
            let disk = site.host_path(spec.disk_path(0))?;
            let made = rig_folder.join("workload.raw");
            run(Command::new("cp").arg("--sparse=always").arg(made).arg(&disk))?;
            let initrd = site.host_path("/var/lib/libvirt/boot/initrd")?;
            fs::copy(rig_folder.join("workload-initrd"), initrd).context("taking the guest's initrd")?;
            Ok(())
        })?;
        if kind != "none" {
            eventually(PATIENCE, "the guest to work", || Ok((scene.work_done() > 0).then_some(())))?;
        }
        Ok(scene)
    }

    pub fn furnished(
        name: &'static str,
        mbit: u64,
        spec: &GuestSpec,
        furnish: impl FnOnce(&Site) -> Result<()>,
    ) -> Result<Self> {
        let rig = Rig::new(&format!("bench-{name}"))?;
        let (source, site) = (rig.site("A")?, rig.site("B")?);
        rig.link(&source, &site, Shape::mbit(mbit))?;
        furnish(&source)?;
        let controller = Controller::running(&site)?;
        let guest = source.define_and_start(spec)?;
        Ok(Self { agent: None, controller, guest, source, name: spec.name.clone(), rig })
    }

    /// Protects the guest with a point each `interval`; further lines of `[[vm]]` are `more`.
    pub fn protect(&mut self, interval: &str, more: &str) -> Result<()> {
        let settings = format!(
            "[[vm]]\nname = \"{}\"\ninterval = \"{interval}\"\nmax_pause = \"5s\"\n{more}\n",
            self.name
        );
        match &mut self.agent {
            Some(agent) => {
                agent.configure(&self.controller.address(), &settings)?;
                agent.env.push((LOG.0.to_owned(), LOG.1.to_owned()));
                agent.start()?;
            }
            None => {
                let mut agent = Agent::install(&self.source, &self.controller, &settings)?;
                agent.env.push((LOG.0.to_owned(), LOG.1.to_owned()));
                agent.start()?;
                self.agent = Some(agent);
            }
        }
        Ok(())
    }

    pub fn unprotect(&mut self) -> Result<()> {
        self.agent.as_mut().map_or(Ok(()), Agent::stop)
    }

    /// Waits for `count` points beyond those there are, and returns the newest `count`.
    pub fn more_points(&self, count: usize, within: Duration) -> Result<Vec<Value>> {
        let points = self.controller.wait_more_points(&self.name, count, within)?;
        Ok(points[points.len().saturating_sub(count)..].to_vec())
    }

    /// What the pauses so far were spent on, in milliseconds: each step's name with all that it took.
    pub fn pause_steps(&mut self) -> Result<Vec<(String, Vec<f64>)>> {
        let log = self.agent.as_mut().context("nothing protects it")?.process()?.log();
        let mut steps: Vec<(String, Vec<f64>)> = Vec::new();
        for line in log.lines().filter_map(|line| line.split_once("paused for ")) {
            for (step, us) in line.1.split(',').filter_map(step) {
                match steps.iter_mut().find(|(name, _)| *name == step) {
                    Some((_, all)) => all.push(us / 1e3),
                    None => steps.push((step, vec![us / 1e3])),
                }
            }
        }
        Ok(steps)
    }

    /// Which engine ran, on what, for a row's note.
    pub fn says(&self) -> String {
        let engine = self.agent.as_ref().and_then(|agent| agent.vm(&self.name).ok());
        let engine = engine.and_then(|vm| vm["memory"].as_str().map(str::to_owned)).unwrap_or_default();
        format!("{}; {engine}", self.rig.accel())
    }

    /// Transactions or files that a guest at work has told so far.
    pub fn work_done(&self) -> u64 {
        let told = self.source.host_path(GuestSpec::console_path(&self.name)).ok();
        let told = told.and_then(|path| fs::read(path).ok()).unwrap_or_default();
        let told = String::from_utf8_lossy(&told).into_owned();
        let last = told.lines().rev().find_map(|line| line.trim().strip_prefix("work=")?.parse().ok());
        last.unwrap_or_default()
    }
}

/// `stop 812 us`, with what may follow the last one.
fn step(told: &str) -> Option<(String, f64)> {
    let mut words = told.split_whitespace();
    let (name, us) = (words.next()?, words.next()?.parse().ok()?);
    (words.next()? == "us").then(|| (name.to_owned(), us))
}

pub fn number(point: &Value, key: &str) -> u64 {
    point[key].as_u64().unwrap_or_default()
}

pub fn changed(point: &Value) -> u64 {
    number(point, "memory_changed_bytes") + number(point, "disk_changed_bytes")
}

/// The RPO at its worst between each two points: just before the later one became durable, in seconds.
pub fn rpo_peaks(points: &[Value]) -> Vec<f64> {
    let peak = |pair: &[Value]| {
        number(&pair[1], "committed_at").saturating_sub(number(&pair[0], "cut_at")) as f64 / 1e3
    };
    points.windows(2).map(peak).collect()
}

pub fn p99(values: &[f64]) -> f64 {
    percentile(values, 0.99)
}

pub fn run(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("starting {command:?}"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

fn workspace() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The agent tells what each pause was spent on.
const LOG: (&str, &str) = ("LIFEBOAT_LOG", "info,lifeboat_agent::capture::guest=debug");
pub const GUEST: &str = "web";
pub const PATIENCE: Duration = Duration::from_secs(300);
const WORK_MEMORY_MIB: u64 = 512;
