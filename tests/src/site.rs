//! A machine of its own on this machine: namespaces, a hostname, a libvirtd, disks, and a power switch.
//! Promises that a power cut kills everything inside at once and leaves what was on its disks, and that a
//! lost rig loses its sites. Nothing in a site sees another site but through a `Link`. Calls `rig-site`,
//! `proc`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::accel::Accel;
use crate::older_qemu;
use crate::owners;
use crate::paths::{Assets, binary};
use crate::proc::{Cmd, Proc};
use crate::rig::{POWER, Process};
use crate::wait::{eventually, tail};

/// A handle; clones are the same site.
#[derive(Clone)]
pub struct Site(Arc<Inner>);

struct Inner {
    name: String,
    number: u8,
    folder: PathBuf,
    accel: Accel,
    power: Mutex<Option<Power>>,
}

/// Whoever holds this holds the site's power; `rig-site` lives until its standard input is closed.
struct Power {
    supervisor: Child,
    pid: i32,
    libvirtd: Option<Proc>,
}

impl Site {
    pub(crate) fn build(
        name: &str,
        number: u8,
        folder: &Path,
        accel: Accel,
        assets: &Assets,
    ) -> Result<Self> {
        ensure!(
            !name.is_empty() && name.len() <= 8,
            "a site's name has 1 to 8 letters (it names an interface): {name:?}"
        );
        for sub in ["run", "etc", "lib/images", "lib/boot", "log/libvirt/qemu", "cache", "dev", "srv"] {
            fs::create_dir_all(folder.join(sub))
                .with_context(|| format!("making {}/{sub}", folder.display()))?;
        }
        let put = |path: &str, text: &str| {
            fs::write(folder.join(path), text).with_context(|| format!("writing {}/{path}", folder.display()))
        };
        put("hosts", &format!("127.0.0.1 localhost\n127.0.1.1 {}\n", hostname(name)))?;
        put("etc/qemu.conf", QEMU_CONF)?;
        let id = uuid::Uuid::new_v4();
        put("etc/libvirtd.conf", &format!("host_uuid = \"{id}\"\n{LIBVIRTD_CONF}"))?;
        // Each site has its copy: libvirt hands the files it opens to QEMU's user.
        let with_agent = assets.agent_initrd.iter().map(|asset| (asset, "agent-initrd"));
        for (asset, file) in
            [(&assets.kernel, "vmlinuz"), (&assets.initrd, "initrd")].into_iter().chain(with_agent)
        {
            fs::copy(asset, folder.join("lib/boot").join(file))
                .with_context(|| format!("copying {}", asset.display()))?;
        }
        let (name, folder) = (name.to_owned(), folder.to_owned());
        Ok(Self(Arc::new(Inner { name, number, folder, accel, power: Mutex::default() })))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its address on every link.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.0.number)
    }

    pub fn accel(&self) -> Accel {
        self.0.accel
    }

    /// The site's own folder on disk, seen under the same path by the host and inside. Survives power cuts.
    pub fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// For the product's files: a folder in the site's own folder, made if need be.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder().join("srv").join(name);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }

    /// Where the host finds a path of the site's, power on or off (own folders), or on (everything else).
    pub fn host_path(&self, inside: impl AsRef<Path>) -> Result<PathBuf> {
        let inside = inside.as_ref();
        for (own, place) in [
            ("lib", "/var/lib/libvirt"),
            ("etc", "/etc/libvirt"),
            ("log/libvirt", "/var/log/libvirt"),
            ("run", "/run"),
        ] {
            if let Ok(rest) = inside.strip_prefix(place) {
                return Ok(self.folder().join(own).join(rest));
            }
        }
        let root = PathBuf::from(format!("/proc/{}/root", self.pid()?));
        Ok(root.join(inside.strip_prefix("/").unwrap_or(inside)))
    }

    /// PID 1 of the site as the host counts; an error when the power is off.
    pub fn pid(&self) -> Result<i32> {
        match &*self.power() {
            Some(power) => Ok(power.pid),
            None => bail!("site {} has no power", self.name()),
        }
    }

    pub fn is_up(&self) -> bool {
        self.power().is_some()
    }

    /// Power on, libvirtd up. What was on its disks is there again; processes, mounts and interfaces are not.
    pub fn power_on(&self) -> Result<()> {
        ensure!(!self.is_up(), "site {} has power already", self.name());
        fs::remove_dir_all(self.folder().join("run"))
            .and_then(|()| fs::create_dir(self.folder().join("run")))
            .context("emptying /run")?;
        for kept in ["lib", "log", "srv"] {
            owners::forget(&self.folder().join(kept))?;
        }
        let mut rig_site = Command::new(binary("rig-site")?);
        rig_site.arg(self.folder()).arg(hostname(self.name()));
        if self.accel() == Accel::Kvm {
            rig_site.arg("kvm");
        }
        let mut supervisor = rig_site
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(
                fs::File::create(self.folder().join("log/rig-site.log")).context("opening the site's log")?,
            )
            .process_group(0)
            .spawn()
            .context("starting rig-site")?;
        if let Some(process) = Process::of(supervisor.id()) {
            process.note(&self.folder().join(POWER))?;
        }
        let output = supervisor.stdout.take().context("rig-site has an output")?;
        // Two lines, in any order: one is the parent's, one the child's.
        let said: Vec<String> = BufReader::new(output).lines().map_while(Result::ok).take(2).collect();
        let pid = said.iter().find_map(|line| line.strip_prefix("pid ")?.parse::<i32>().ok());
        let up = said.iter().any(|line| line == "up");
        let (Some(pid), true) = (pid, up) else {
            let _ = supervisor.kill();
            let _ = supervisor.wait();
            bail!(
                "site {} does not come up\n{}",
                self.name(),
                tail(&self.folder().join("log/rig-site.log"), 5)
            );
        };
        *self.power() = Some(Power { supervisor, pid, libvirtd: None });
        self.start_libvirtd()
    }

    /// Everything in the site is gone when this returns: libvirtd, guests, whatever ran. Nothing is told
    /// beforehand.
    pub fn power_cut(&self) {
        drop(self.power().take());
    }

    pub fn start_libvirtd(&self) -> Result<()> {
        let mut libvirtd = self.command("libvirtd").spawn()?;
        eventually(LIBVIRTD_TIME, &format!("libvirtd of site {}", self.name()), || {
            if let Some(status) = libvirtd.poll()? {
                bail!("libvirtd ended with {status}");
            }
            Ok(self.command("virsh").args(["-c", URI, "version"]).output()?.status.success().then_some(()))
        })
        .with_context(|| tail(libvirtd.log_path(), 10))
        .with_context(|| tail(&self.folder().join("log/libvirt/libvirtd.log"), 10))?;
        if let Some(power) = &mut *self.power() {
            power.libvirtd = Some(libvirtd);
        }
        Ok(())
    }

    /// libvirtd hangs, or goes on; guests run on.
    pub fn freeze_libvirtd(&self, frozen: bool) -> Result<()> {
        let mut power = self.power();
        let libvirtd = power.as_mut().and_then(|power| power.libvirtd.as_mut());
        let libvirtd = libvirtd.with_context(|| format!("no libvirtd runs in site {}", self.name()))?;
        if frozen { libvirtd.freeze() } else { libvirtd.thaw() }
    }

    /// Stops libvirtd (guests run on); `Signal::SIGKILL` is a crash of it.
    pub fn stop_libvirtd(&self, signal: Signal) -> Result<()> {
        let libvirtd = self.power().as_mut().and_then(|power| power.libvirtd.take());
        let mut libvirtd = libvirtd.with_context(|| format!("no libvirtd runs in site {}", self.name()))?;
        libvirtd.signal(signal)?;
        libvirtd.wait(LIBVIRTD_TIME)?;
        Ok(())
    }

    /// It crashes, and is started again.
    pub fn crash_libvirtd(&self) -> Result<()> {
        self.stop_libvirtd(Signal::SIGKILL)?;
        self.start_libvirtd()
    }

    pub fn restart_libvirtd(&self) -> Result<()> {
        self.stop_libvirtd(Signal::SIGTERM)?;
        self.start_libvirtd()
    }

    /// From now on its libvirt says that its QEMU is [`crate::older_qemu::SAID`].
    pub fn pretend_older_qemu(&self) -> Result<()> {
        self.stop_libvirtd(Signal::SIGTERM)?;
        older_qemu::pretend(&self.folder().join("cache"))?;
        self.start_libvirtd()
    }

    /// Stops every process of the site at once, as a host that is suspended stops, seen from outside; or has them go on.
    pub fn suspend_all(&self, suspended: bool) -> Result<()> {
        // All but PID 1, which does nothing, and the shell itself.
        let signal = if suspended { "STOP" } else { "CONT" };
        self.run(["sh", "-c", &format!("kill -{signal} -1")])?;
        match &mut self.power().as_mut().and_then(|power| power.libvirtd.as_mut()) {
            // What started it stands with it.
            Some(libvirtd) if !suspended => libvirtd.thaw(),
            _ => Ok(()),
        }
    }

    /// Has libvirt make guests of huge pages; a power cut ends it.
    pub fn offer_huge_pages(&self) -> Result<()> {
        self.run(["mkdir", "-p", HUGE_PAGES])?;
        self.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", HUGE_PAGES])?;
        // It looks once, when it starts.
        self.restart_libvirtd()
    }

    /// A command to run inside; panics never, fails when the power is off at the time it starts.
    pub fn command(&self, program: impl AsRef<Path>) -> Cmd {
        let pid = self.pid().unwrap_or(NO_PID);
        Cmd::new(pid, program.as_ref(), &self.folder().join("log"))
    }

    /// Runs a command line to its end; its standard output, or an error that shows everything.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        let mut words = words.into_iter();
        let program = words.next().context("a command has a program")?;
        self.command(program.as_ref()).args(words).run()
    }

    /// Leaves a command line running; its log is `<site>/log/<program>.log`. See [`Site::command`] for more
    /// say.
    pub fn spawn<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Proc> {
        let mut words = words.into_iter();
        let program = words.next().context("a command has a program")?;
        self.command(program.as_ref()).args(words).spawn()
    }

    pub fn virsh<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        self.virsh_at(URI, words)
    }

    /// Of another libvirtd than the site's own.
    pub(crate) fn virsh_at<S: AsRef<std::ffi::OsStr>>(
        &self,
        uri: &str,
        words: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        self.command("virsh").args(["-q", "-c", uri]).args(words).run()
    }

    /// Puts a small file system over a folder: `bytes` is all it can hold. Empty again after a power cut.
    pub fn limit_store(&self, folder: &Path, bytes: u64) -> Result<()> {
        let options = format!("size={bytes},mode=755");
        self.run(["mount", "-t", "tmpfs", "-o", &options, "limited", &folder.to_string_lossy()])?;
        Ok(())
    }

    /// Gives a limited folder another size.
    pub fn resize_store(&self, folder: &Path, bytes: u64) -> Result<()> {
        self.run(["mount", "-o", &format!("remount,size={bytes}"), &folder.to_string_lossy()])?;
        Ok(())
    }

    /// Takes all the room that is left in a limited folder; [`Site::unfill`] gives it back.
    pub fn fill(&self, folder: &Path) -> Result<()> {
        let target = format!("of={}", folder.join(FILLER).display());
        let out = self.command("dd").args(["if=/dev/zero", &target, "bs=64K"]).output()?;
        ensure!(out.stderr.contains("No space left"), "{} was not filled: {}", folder.display(), out.stderr);
        Ok(())
    }

    pub fn unfill(&self, folder: &Path) -> Result<()> {
        self.run(["rm", "-f", &folder.join(FILLER).to_string_lossy()])?;
        Ok(())
    }

    /// Runs `work` in the site's network: sockets it makes there stay there, wherever they are used later.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let space =
            fs::File::open(format!("/proc/{}/ns/net", self.pid()?)).context("opening the site's network")?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| setns(space, CloneFlags::CLONE_NEWNET).map(|()| work()));
            match worker.join() {
                Ok(done) => done.context("entering the site's network"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn power(&self) -> MutexGuard<'_, Option<Power>> {
        self.0.power.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL); // not there any more: as good
        let _ = self.supervisor.wait(); // it ends when PID 1 has, and PID 1 when all others have
    }
}

fn hostname(site: &str) -> String {
    format!("site-{}", site.to_lowercase())
}

/// Runs a program of the host in the network of a site.
pub(crate) fn in_net_of(pid: i32, words: &[&str]) -> Result<()> {
    let out =
        Command::new("nsenter").args(["--net", "--target", &pid.to_string(), "--"]).args(words).output();
    let out = out.context("starting nsenter")?;
    ensure!(out.status.success(), "`{}`: {}", words.join(" "), String::from_utf8_lossy(&out.stderr));
    Ok(())
}

pub(crate) const URI: &str = "qemu:///system";
const HUGE_PAGES: &str = "/dev/hugepages";
pub(crate) const LIBVIRTD_TIME: Duration = Duration::from_secs(60);
const FILLER: &str = ".filler";
/// No process has it, so that a command for a site without power fails when it starts.
const NO_PID: i32 = i32::MAX;

/// No cgroups, mount namespaces or virtlogd: there is no systemd in a site. The rest is as Debian has it.
pub(crate) const QEMU_CONF: &str = r#"user = "libvirt-qemu"
group = "libvirt-qemu"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = [ ]
namespaces = [ ]
"#;

pub(crate) const LIBVIRTD_CONF: &str = r#"auth_unix_rw = "none"
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"#;
