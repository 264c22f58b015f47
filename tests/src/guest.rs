//! A guest in a site: started, watched, saved, dumped. Works for a replica as well: a guest is a domain
//! name at a site. Calls `site` (virsh) and `console`. Called by the tests.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::console::{Console, Report};
use crate::site::{Site, URI};
use crate::spec::GuestSpec;
use crate::wait::{eventually, tail};

#[derive(Clone)]
pub struct Guest {
    site: Site,
    name: String,
    console: Console,
    /// Of the libvirtd that has it.
    uri: String,
}

impl Site {
    /// Makes the disks that are missing, defines the domain and starts it.
    pub fn define_and_start(&self, spec: &GuestSpec) -> Result<Guest> {
        let guest = self.define(spec)?;
        guest.start()?;
        Ok(guest)
    }

    /// Makes the disks that are missing and defines the domain.
    pub fn define(&self, spec: &GuestSpec) -> Result<Guest> {
        let agent = "/var/lib/libvirt/boot/agent-initrd";
        ensure!(!spec.agent || self.host_path(agent)?.exists(), "no guest with an agent: run tests/setup.sh");
        for (at, disk) in spec.disks.iter().enumerate() {
            let path = spec.disk_path(at);
            if !self.host_path(&path)?.exists() {
                self.run([
                    "qemu-img",
                    "create",
                    "-q",
                    "-f",
                    &disk.format.to_string(),
                    &path,
                    &format!("{}M", disk.size_mib),
                ])?;
                if spec.files == Some(at) {
                    self.run(["mke2fs", "-q", "-F", "-t", "ext4", &path])?;
                }
            }
        }
        let draft = self.dir("domains")?.join(format!("{}.xml", spec.name));
        fs::write(&draft, spec.xml(self.accel())).with_context(|| format!("writing {}", draft.display()))?;
        self.virsh(["define", &draft.to_string_lossy()])?;
        self.guest(&spec.name)
    }

    /// A handle on a domain of this site by name, there or not yet: a replica, for example.
    pub fn guest(&self, name: &str) -> Result<Guest> {
        let console = Console::at(self.host_path(GuestSpec::console_path(name))?);
        Ok(Guest { site: self.clone(), name: name.to_owned(), console, uri: URI.to_owned() })
    }
}

impl Guest {
    /// One that a second host of the site has.
    pub(crate) fn at_second(site: &Site, name: &str, console: PathBuf, uri: String) -> Self {
        Self { site: site.clone(), name: name.to_owned(), console: Console::at(console), uri }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn site(&self) -> &Site {
        &self.site
    }

    pub fn console(&self) -> &Console {
        &self.console
    }

    pub fn start(&self) -> Result<()> {
        self.virsh("start", &[])?;
        Ok(())
    }

    /// As `virsh domstate` says it: `running`, `paused`, `shut off`, …
    pub fn state(&self) -> Result<String> {
        Ok(self.virsh("domstate", &[])?.trim().to_owned())
    }

    pub fn suspend(&self) -> Result<()> {
        self.virsh("suspend", &[])?;
        Ok(())
    }

    pub fn resume(&self) -> Result<()> {
        self.virsh("resume", &[])?;
        Ok(())
    }

    /// The guest's power off, at once.
    pub fn destroy(&self) -> Result<()> {
        self.virsh("destroy", &[])?;
        Ok(())
    }

    /// Saves memory to libvirt's own place and stops the guest; `start` continues it.
    pub fn managed_save(&self) -> Result<()> {
        self.virsh("managedsave", &[])?;
        Ok(())
    }

    pub fn last(&self) -> Option<Report> {
        self.console.last()
    }

    /// The newest report once its tick is at least `tick`.
    pub fn wait_for_tick(&self, tick: u64, within: Duration) -> Result<Report> {
        self.wait(within, &format!("guest {} to reach tick {tick}", self.name), |report| report.tick >= tick)
    }

    pub fn wait(&self, within: Duration, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<Report> {
        self.console.wait(within, what, wanted).with_context(|| self.why())
    }

    /// Waits until all memory and every disk has been checked from start to end at least once from now on.
    pub fn wait_full_check(&self, within: Duration) -> Result<Report> {
        let now = self.last().context("the guest has not reported yet")?;
        // The sweep that is under way began earlier: two more ends are one whole sweep.
        self.wait(within, &format!("guest {} to check everything", self.name), |report| {
            report.tick > now.tick
                && report.mem_sweeps >= now.mem_sweeps + 2
                && (report.disks == 0 || report.disk_sweeps >= now.disk_sweeps + 2)
        })
    }

    /// The guest's memory from address 0 on, as QEMU's `pmemsave` reads it, as a file on the host. Suspend
    /// it first for an image of one instant. The VGA window (640-768 KiB) is not RAM; above it are shadowed
    /// ROMs.
    pub fn dump_ram(&self, bytes: u64) -> Result<PathBuf> {
        let inside = format!("/var/lib/libvirt/qemu/{}.ram", self.name);
        let command = format!(
            r#"{{"execute":"pmemsave","arguments":{{"val":0,"size":{bytes},"filename":"{inside}"}}}}"#
        );
        let answer = self.qmp(&command)?;
        ensure!(answer.contains("\"return\""), "QEMU refused to dump memory: {answer}");
        self.site.host_path(inside)
    }

    /// The same, read from QEMU's process where QEMU says that it is: many times faster where all is emulated. Only
    /// for so much memory as lies in one piece from address 0 on (3 GiB at the most).
    pub fn read_ram(&self, bytes: u64) -> Result<Vec<u8>> {
        let answer = self.virsh("qemu-monitor-command", &["--hmp", "gpa2hva 0x0"])?;
        let address =
            answer.trim().rsplit_once(" is 0x").map(|(_, address)| u64::from_str_radix(address, 16));
        let address = address.and_then(Result::ok).with_context(|| format!("where memory is: {answer}"))?;
        let mut memory = vec![0; usize::try_from(bytes)?];
        let process = File::open(format!("/proc/{}/mem", self.qemu_pid()?))?;
        process.read_exact_at(&mut memory, address).context("reading QEMU's memory")?;
        Ok(memory)
    }

    /// One QMP command, QEMU's answer.
    pub fn qmp(&self, command: &str) -> Result<String> {
        self.virsh("qemu-monitor-command", &[command])
    }

    /// One question to the guest's agent; its answer. A guest may stand in a cut, or its file systems be frozen for one: it
    /// is asked again then.
    pub fn ask_agent(&self, question: &Value) -> Result<Value> {
        let question = question.to_string();
        let what = format!("{} to go on, so that its agent can be asked", self.name);
        let answer = eventually(STANDS_AT_MOST, &what, || {
            match self.virsh("qemu-agent-command", &["--timeout", AGENT_PATIENCE_S, &question]) {
                Err(error) if IN_A_CUT.iter().any(|words| format!("{error:#}").contains(words)) => Ok(None),
                answer => answer.map(Some),
            }
        })?;
        let answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("the agent said {answer}"))?;
        answer.get("return").cloned().with_context(|| format!("the agent refused: {answer}"))
    }

    /// Has the guest's shell run this, and does not wait for its end.
    pub fn run_inside(&self, script: &str) -> Result<()> {
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", script] });
        self.ask_agent(&json!({ "execute": "guest-exec", "arguments": arguments })).map(drop)
    }

    /// Waits until the agent in it answers.
    pub fn wait_for_agent(&self, within: Duration) -> Result<()> {
        let ping = json!({ "execute": "guest-ping" });
        eventually(within, &format!("the agent in {} to answer", self.name), || {
            Ok(self.ask_agent(&ping).ok())
        })?;
        Ok(())
    }

    /// QEMU's process id as the host counts.
    pub fn qemu_pid(&self) -> Result<i32> {
        let file = self.site.host_path(format!("/run/libvirt/qemu/{}.pid", self.name))?;
        let inside = fs::read_to_string(&file).with_context(|| format!("{} does not run", self.name))?;
        let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = space(&self.site.pid()?.to_string());
        let found = fs::read_dir("/proc").context("listing processes")?.flatten().find_map(|entry| {
            let pid = entry.file_name().into_string().ok()?;
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let counted =
                status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?;
            (counted == inside.trim() && space(&pid) == ours).then(|| pid.parse().ok())?
        });
        found.with_context(|| {
            format!("QEMU of {} (pid {} in the site) is not there", self.name, inside.trim())
        })
    }

    pub fn wait_for_state(&self, state: &str, within: Duration) -> Result<()> {
        eventually(within, &format!("guest {} to be {state}", self.name), || {
            Ok((self.state()? == state).then_some(()))
        })
        .with_context(|| self.why())
    }

    fn virsh(&self, verb: &str, rest: &[&str]) -> Result<String> {
        self.site
            .virsh_at(&self.uri, [&[verb, self.name.as_str()], rest].concat())
            .with_context(|| self.why())
    }

    fn why(&self) -> String {
        let log = self.site.folder().join(format!("log/libvirt/qemu/{}.log", self.name));
        format!("guest {} at site {}\n{}", self.name, self.site.name(), tail(&log, 6))
    }
}

const STANDS_AT_MOST: Duration = Duration::from_secs(30);
const AGENT_PATIENCE_S: &str = "20";
/// What libvirt says of a guest that stands, and the agent of one whose file systems are frozen.
const IN_A_CUT: [&str; 2] = ["domain is not running", "the agent is in frozen state"];
