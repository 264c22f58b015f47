//! The product in a rig: a site controller at one site, an agent at another, driven as binaries, as an operator would.
//! Used by the end-to-end tests and the demo. Everything read here is what the commands print as JSON.

use crate::{Cmd, Guest, GuestSpec, Output, Proc, Site, binary, eventually, is_frozen, patience, tail};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Where controllers that listen to operators do so.
const API_PORT: u16 = 7444;
const START: Duration = Duration::from_secs(30);
/// On a machine that is as fast as most.
const MAX_PAUSE_S: u32 = 5;

/// A site controller, and the `lifeboat` command beside it.
pub struct Controller {
    site: Site,
    dir: PathBuf,
    process: Option<Proc>,
    pub env: Vec<(String, String)>,
}

impl Controller {
    /// Makes a configuration and an identity at `site`; nothing runs yet.
    pub fn install(site: &Site) -> Result<Self> {
        let dir = site.dir("lb")?;
        let text = format!(
            "name = \"{name}\"\nlisten = \"0.0.0.0:7443\"\ndata_dir = \"{dir}/data\"\nreplica_dir = \"{dir}/replicas\"\n\
             run_dir = \"{dir}/run\"\nreserve = \"1MiB\"\n",
            name = site.name(),
            dir = dir.display()
        );
        fs::write(dir.join("site.toml"), text)?;
        let controller = Self { site: site.clone(), dir, process: None, env: Vec::new() };
        let address = site.address().to_string();
        controller.daemon_command()?.args(["init", "--address", &address]).run()?;
        Ok(controller)
    }

    /// Installed and running.
    pub fn running(site: &Site) -> Result<Self> {
        let mut controller = Self::install(site)?;
        controller.start()?;
        Ok(controller)
    }

    /// The same, and operators may ask it over the network as well.
    pub fn listening(site: &Site) -> Result<Self> {
        let mut controller = Self::install(site)?;
        controller.configure(&format!("[api]\nlisten = \"{}:{API_PORT}\"\n", site.address()))?;
        controller.start()?;
        Ok(controller)
    }

    /// Tells the operators of this site of `other`, with a token for it; what a command is given to name it.
    pub fn peer(&self, other: &Self) -> Result<Vec<String>> {
        let dir = self.site.dir("peers")?;
        let (token, file) = (dir.join("token"), dir.join("peers.toml"));
        fs::write(&token, other.cli(&["token", "create", "peer", "--role", "operator"])?.success()?)?;
        let (name, address) = (other.site.name(), other.site.address());
        let (token, ca) = (token.display(), other.data_dir().join("identity/ca.pem"));
        let text = format!(
            "[[peer]]\nname = \"{name}\"\nurl = \"https://{address}:{API_PORT}\"\ntoken_file = \"{token}\"\nca = \"{}\"\n",
            ca.display()
        );
        fs::write(&file, text)?;
        Ok(["--to", name, "--peers", &file.to_string_lossy()].map(str::to_owned).to_vec())
    }

    /// Adds to its configuration; holds from the next start.
    pub fn configure(&self, more: &str) -> Result<()> {
        let file = self.dir.join("site.toml");
        let text = fs::read_to_string(&file)? + more;
        Ok(fs::write(&file, text)?)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn replica_dir(&self) -> PathBuf {
        self.dir.join("replicas")
    }

    /// The pack that was written last, of those that hold what an agent sent, and of those that points were folded into.
    pub fn newest_packs(&self) -> Result<(PathBuf, Option<PathBuf>)> {
        let mut folders = vec![self.data_dir()];
        let (mut sent, mut folded) = (None, None);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|end| end == "pack") {
                    let of = if folder.ends_with("folds") { &mut folded } else { &mut sent };
                    *of = of.take().max(Some((path.metadata()?.modified()?, path)));
                }
            }
        }
        Ok((sent.context("a pack")?.1, folded.map(|(_, path)| path)))
    }

    /// Where operators ask it, also those of the other site where a path leads there.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/api.sock")
    }

    /// `host:port` for agents.
    pub fn address(&self) -> String {
        format!("{}:7443", self.site.address())
    }

    pub fn token(&self) -> Result<String> {
        Ok(self.daemon_command()?.args(["token"]).run()?.trim().to_owned())
    }

    fn daemon_command(&self) -> Result<Cmd> {
        let config = self.dir.join("site.toml");
        Ok(self.site.command(binary("lifeboat-site-controller")?).arg("--config").arg(config))
    }

    /// Starts the daemon and waits until it answers. `env` is used once.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.daemon_command()?.arg("run").env("LIFEBOAT_LOG", "info").named("controller");
        // As its unit has it.
        command = command.env("MALLOC_ARENA_MAX", "2");
        for (key, value) in std::mem::take(&mut self.env) {
            command = command.env(&key, value);
        }
        let mut process = command.spawn()?;
        eventually(START, "the site controller to answer", || {
            if !process.running() {
                bail!("the site controller ended:\n{}", tail(process.log_path(), 30));
            }
            Ok(self.status().ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    pub fn process(&mut self) -> Result<&mut Proc> {
        self.process.as_mut().context("the site controller does not run")
    }

    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill9()?;
        }
        Ok(())
    }

    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.term()?;
            process.wait(START)?;
        }
        Ok(())
    }

    /// The `lifeboat` command with `arguments`, as it ends.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let socket = self.socket();
        self.site.command(binary("lifeboat")?).arg("--socket").arg(socket).args(arguments).output()
    }

    /// The same, which must succeed, with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.cli(&[arguments, &["--json"]].concat())?.success()?;
        serde_json::from_str(&text).with_context(|| format!("lifeboat {arguments:?} printed: {text}"))
    }

    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// The status row of one VM.
    pub fn vm(&self, name: &str) -> Result<Value> {
        let status = self.status()?;
        let rows = status["vms"].as_array().into_iter().flatten();
        rows.clone()
            .find(|row| row["name"] == name)
            .cloned()
            .with_context(|| format!("no VM {name} in {status}"))
    }

    pub fn points(&self, vm: &str) -> Result<Vec<Value>> {
        Ok(self.json(&["points", vm])?["points"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until the site holds `count` points of the VM.
    pub fn wait_points(&self, vm: &str, count: usize, within: Duration) -> Result<Vec<Value>> {
        eventually(within, &format!("{count} points of {vm}"), || {
            let points = self.points(vm).unwrap_or_default();
            Ok((points.len() >= count).then_some(points))
        })
    }

    /// The points that all members of a group have of one instant.
    pub fn group_points(&self, group: &str) -> Result<Vec<Value>> {
        Ok(self.json(&["group", "points", group])?["points"].as_array().cloned().unwrap_or_default())
    }

    /// Waits for `more` of them than there are now.
    pub fn wait_more_group_points(&self, group: &str, more: usize, within: Duration) -> Result<Vec<Value>> {
        let now = self.group_points(group).map_or(0, |points| points.len());
        eventually(within, &format!("{more} more points of group {group}"), || {
            let points = self.group_points(group).unwrap_or_default();
            Ok((points.len() >= now + more).then_some(points))
        })
    }

    /// Waits for `more` points than there are now.
    pub fn wait_more_points(&self, vm: &str, more: usize, within: Duration) -> Result<Vec<Value>> {
        let now = self.points(vm).map_or(0, |points| points.len());
        self.wait_points(vm, now + more, within)
    }

    pub fn failover(&self, vm: &str, point: &str) -> Result<Value> {
        self.json(&["failover", vm, "--emergency", "--yes", "--point", point])
    }
}

/// What a site held when its source was lost, kept aside: each failover begins from it, as if it were the only one.
pub struct Held {
    folder: PathBuf,
}

impl Held {
    /// Stops the controller; its data are copied into `folder`, which goes with the rig.
    pub fn by(controller: &mut Controller, folder: &Path) -> Result<Self> {
        controller.stop()?;
        let folder = folder.join("held");
        copy(&controller.data_dir(), &folder)?;
        Ok(Self { folder })
    }

    /// The replica of a point, in a world where the site has been asked nothing yet.
    pub fn failover(&self, controller: &mut Controller, vm: &str, point: &str) -> Result<Guest> {
        let data = controller.data_dir();
        fs::remove_dir_all(&data).context("forgetting what the site holds")?;
        copy(&self.folder, &data)?;
        controller.start()?;
        controller.failover(vm, point)?;
        controller.site.guest(vm)
    }

    /// Makes room for the next one.
    pub fn discard(&self, controller: &mut Controller, replica: &Guest) -> Result<()> {
        replica.destroy()?;
        controller.site.virsh(["undefine", replica.name()])?;
        fs::remove_file(replica.console().path()).context("forgetting the replica's console")?;
        controller.stop()
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().context("starting cp")?;
    ensure!(copied.success(), "copying {}: {copied}", from.display());
    Ok(())
}

/// An agent, enrolled at a controller.
pub struct Agent {
    site: Site,
    dir: PathBuf,
    process: Option<Proc>,
    pub env: Vec<(String, String)>,
}

impl Agent {
    /// Enrols at `controller`; `settings` are further lines of `agent.toml` (the `[[vm]]`s, say).
    pub fn install(site: &Site, controller: &Controller, settings: &str) -> Result<Self> {
        Self::install_in("agent", site, controller, settings)
    }

    /// The same in a folder of its own, where a site has more than one.
    pub fn install_in(folder: &str, site: &Site, controller: &Controller, settings: &str) -> Result<Self> {
        let dir = site.dir(folder)?;
        let agent = Self { site: site.clone(), dir, process: None, env: Vec::new() };
        agent.configure(&controller.address(), settings)?;
        let (address, token) = (controller.address(), controller.token()?);
        agent.command()?.args(["enrol", "--site", &address, "--name", site.name(), &token]).run()?;
        Ok(agent)
    }

    /// Installed, protecting `vms` every `interval`, and running.
    pub fn protecting(site: &Site, controller: &Controller, vms: &[&str], interval: &str) -> Result<Self> {
        let vms: String =
            vms.iter().map(|vm| format!("[[vm]]\nname = \"{vm}\"\ninterval = \"{interval}\"\n")).collect();
        let max_pause = MAX_PAUSE_S.saturating_mul(patience()).min(60);
        let settings = format!("[defaults]\nmax_pause = \"{max_pause}s\"\n{vms}");
        let mut agent = Self::install(site, controller, &settings)?;
        agent.start()?;
        Ok(agent)
    }

    pub fn configure(&self, address: &str, settings: &str) -> Result<()> {
        let dir = self.dir.display();
        let text = format!(
            "state_dir = \"{dir}/state\"\nrun_dir = \"{dir}/run\"\n[site]\naddress = \"{address}\"\n{settings}\n"
        );
        Ok(fs::write(self.dir.join("agent.toml"), text)?)
    }

    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    pub fn command(&self) -> Result<Cmd> {
        let config = self.dir.join("agent.toml");
        Ok(self.site.command(binary("lifeboat-agent")?).arg("--config").arg(config))
    }

    /// Starts the daemon. `env` is used once.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.command()?.arg("run").env("LIFEBOAT_LOG", "info").named("agent");
        for (key, value) in std::mem::take(&mut self.env) {
            command = command.env(&key, value);
        }
        self.process = Some(command.spawn()?);
        Ok(())
    }

    /// Has libvirt ask before it starts a guest. It must be there before libvirtd starts, or libvirtd must be told.
    pub fn install_hook(&self) -> Result<()> {
        let said = self.command()?.args(["hook", "install"]).run()?;
        ensure!(said.contains("Told libvirtd"), "{said}");
        let said = self.command()?.args(["hook", "status"]).run()?;
        ensure!(said.contains("installed") && !said.contains("not installed"), "{said}");
        Ok(())
    }

    pub fn process(&mut self) -> Result<&mut Proc> {
        self.process.as_mut().context("the agent does not run")
    }

    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill9()?;
        }
        Ok(())
    }

    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.term()?;
            process.wait(START)?;
        }
        Ok(())
    }

    /// Waits until the agent has frozen itself (`LIFEBOAT_STOP_AT`).
    pub fn wait_frozen(&mut self, within: Duration) -> Result<()> {
        let process = self.process()?;
        let (pid, log) = (process.pid_in_host()?, process.log_path().to_owned());
        eventually(within, "the agent to be frozen", || {
            Ok(is_frozen(pid).with_context(|| tail(&log, 20))?.then_some(()))
        })
    }

    /// Ids of the points that this agent's process, and those before it, were told are durable.
    pub fn acknowledged(&self) -> Result<Vec<String>> {
        let log = fs::read_to_string(self.site.folder().join("log/agent.log")).context("the agent's log")?;
        let told = log.lines().filter(|line| line.contains("point is durable"));
        let ids = told.filter_map(|line| Some(line.split("point=").nth(1)?.split(' ').next()?.to_owned()));
        Ok(ids.collect())
    }

    pub fn status(&self) -> Result<Value> {
        let text = self.command()?.args(["status", "--json"]).run()?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The status of one VM.
    pub fn vm(&self, name: &str) -> Result<Value> {
        let status = self.status()?;
        let rows = status["vms"].as_array().into_iter().flatten();
        rows.clone()
            .find(|row| row["name"] == name)
            .cloned()
            .with_context(|| format!("no VM {name} in {status}"))
    }

    /// Waits until the VM is in `state`.
    pub fn wait_state(&self, vm: &str, state: &str, within: Duration) -> Result<Value> {
        eventually(within, &format!("{vm} to be {state}"), || {
            Ok(self.vm(vm).ok().filter(|row| row["state"] == state))
        })
    }
}

/// Suspends a protected guest as its operator does who looks whether it worked: one that is suspended in a pause of ours
/// is found paused already, nobody hears of it, and it goes on.
pub fn stand_still(guest: &Guest, controller: &Controller, vm: &str, within: Duration) -> Result<()> {
    let tick = || guest.last().map(|report| report.tick);
    eventually(within, &format!("{vm} to stand still"), || {
        guest.suspend()?;
        controller.wait_more_points(vm, 1, within)?;
        let then = tick();
        controller.wait_more_points(vm, 1, within)?;
        Ok((tick() == then).then_some(()))
    })
}

/// A guest that boots, moves and is checked fast: for tests that are not about the size of anything.
pub fn small(name: &str) -> GuestSpec {
    GuestSpec::new(name).memory_mib(136).pattern_mib(8).dirty_kib(128)
}

/// What makes a daemon kill itself where `place` (`name` or `name:N`) says.
pub fn killed_at(place: &str) -> Vec<(String, String)> {
    vec![("LIFEBOAT_KILL_AT".into(), place.into())]
}

/// The id of a point, as `points` lists it.
pub fn id(point: &Value) -> String {
    point["point"].as_str().unwrap_or_default().to_owned()
}

/// What there is of ours in a guest's QEMU that costs it anything: jobs, exports, nodes. Dirty bitmaps may stay.
pub fn left_in_qemu(guest: &Guest) -> Result<Vec<String>> {
    let ask = |command: &str| -> Result<Vec<Value>> {
        let answer: Value = serde_json::from_str(&guest.qmp(&format!("{{\"execute\":\"{command}\"}}"))?)?;
        Ok(answer["return"].as_array().with_context(|| format!("{command}: {answer}"))?.clone())
    };
    let nodes = ask("query-named-block-nodes")?;
    let ours = |name: &str| name.contains("lifeboat") || name.starts_with("lbrake-");
    let nodes = nodes.iter().filter(|node| node["node-name"].as_str().is_some_and(ours));
    let more = [ask("query-block-jobs")?, ask("query-block-exports")?].concat();
    Ok(nodes.map(|node| node["node-name"].to_string()).chain(more.iter().map(Value::to_string)).collect())
}

/// Waits until a replica has ticked past `tick` and has checked all of its memory and disks; returns what it then says.
pub fn replica_unharmed(replica: &Guest, boot: &str, tick: u64, within: Duration) -> Result<crate::Report> {
    replica.wait(within, "the replica to report", |_| true)?;
    let report = replica.wait_full_check(within)?;
    if report.boot != boot || report.tick <= tick || !report.unharmed() {
        bail!("the replica did not go on unharmed from boot {boot}, tick {tick}: {report:?}");
    }
    Ok(report)
}
