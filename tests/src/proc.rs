//! A program that runs inside a site: made by [`Site::command`], then run to its end or left running as a
//! [`Proc`]. Owns the child; a dropped `Proc` is killed. Its output goes to one log file in the site's
//! folder. [`Site::command`]: crate::Site::command

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{eventually, tail};

/// A command to be, inside a site. Environment is inherited; the working folder is `/` unless said.
pub struct Cmd {
    program: String,
    log: PathBuf,
    folder: PathBuf,
    words: Command,
    inner: Vec<std::ffi::OsString>,
}

impl Cmd {
    pub(crate) fn new(site_pid: i32, program: &Path, logs: &Path) -> Self {
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let mut words = Command::new("nsenter");
        words.args(["--mount", "--pid", "--net", "--uts", "--ipc", "--target", &site_pid.to_string()]);
        words.stdin(Stdio::null()).process_group(0);
        let log = logs.join(format!("{name}.log"));
        Self { program: name, log, folder: "/".into(), words, inner: vec![program.into()] }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.inner.push(arg.as_ref().to_owned());
        self
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.inner.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.words.env(key, value);
        self
    }

    /// The working folder, as the site sees it.
    pub fn dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = folder.into();
        self
    }

    /// Names the process and its log (`<site>/log/<name>.log`); by default the program's own name.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.program);
        self.log.set_file_name(format!("{name}.log"));
        self
    }

    /// Runs to the end and returns what it printed, whatever its exit code.
    pub fn output(mut self) -> Result<Output> {
        self.compose();
        let out = self.words.output().with_context(|| format!("starting {}", self.program))?;
        Ok(Output {
            command: self.inner.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "),
            status: out.status,
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        })
    }

    /// Runs to the end and returns its standard output; anything but exit code 0 is an error that shows its
    /// output.
    pub fn run(self) -> Result<String> {
        self.output()?.success()
    }

    /// Leaves it running; standard output and error are appended to its log.
    pub fn spawn(mut self) -> Result<Proc> {
        self.compose();
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("opening {}", self.log.display()))?;
        let offset = log.metadata().map_or(0, |data| data.len());
        self.words.stdout(log.try_clone().context("one log for both outputs")?).stderr(log);
        let child = self.words.spawn().with_context(|| format!("starting {}", self.program))?;
        Ok(Proc { name: self.program, child, log: self.log, log_start: offset, pid: None, ended: None })
    }

    fn compose(&mut self) {
        self.words.arg(format!("--wdns={}", self.folder.display())).arg("--").args(&self.inner);
    }
}

/// What a finished command left.
#[derive(Clone, Debug)]
pub struct Output {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            bail!("`{}` ended with {}\n{}{}", self.command, self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}

/// A running program in a site.
pub struct Proc {
    name: String,
    child: Child,
    log: PathBuf,
    log_start: u64,
    pid: Option<Pid>,
    ended: Option<ExitStatus>,
}

impl Proc {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id as the host counts (`nsenter` is its parent and hands its exit on).
    pub fn pid_in_host(&mut self) -> Result<Pid> {
        if let Some(pid) = self.pid {
            return Ok(pid);
        }
        let outer = self.child.id();
        let children = format!("/proc/{outer}/task/{outer}/children");
        let name = self.name.clone();
        let pid = eventually(SOON, &format!("{name} to start"), || {
            if let Some(status) = self.poll()? {
                bail!("{name} has ended: {status}\n{}", tail(&self.log, 20));
            }
            Ok(fs::read_to_string(&children)
                .ok()
                .and_then(|text| text.split_whitespace().next()?.parse().ok()))
        })?;
        let pid = Pid::from_raw(pid);
        self.pid = Some(pid);
        Ok(pid)
    }

    /// Of `nsenter`.
    pub(crate) fn outer(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id()).context("a process id")?))
    }

    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.poll()?.is_some() {
            return Ok(());
        }
        let pid = self.pid_in_host()?;
        let mut targets = vec![pid];
        if matches!(signal, Signal::SIGCONT | Signal::SIGKILL) {
            // nsenter stops itself when its child is stopped: it must go on to hand the child's end on.
            targets.push(self.outer()?);
        }
        for (target, signal) in targets.into_iter().zip([signal, Signal::SIGCONT]) {
            match kill(target, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("{signal} to {} ({pid})", self.name));
                }
            }
        }
        Ok(())
    }

    /// SIGKILL, and it is gone when this returns.
    pub fn kill9(&mut self) -> Result<ExitStatus> {
        if let Err(error) = self.signal(Signal::SIGKILL) {
            let _ = self.child.kill(); // it never came up: nsenter itself is all there is
            self.child.wait().context(error)?;
        }
        self.wait(SOON)
    }

    /// SIGTERM: asks it to stop; `wait` says whether it did.
    pub fn term(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// SIGSTOP: it hangs, as far as anybody can tell.
    pub fn freeze(&mut self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn thaw(&mut self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let (name, log) = (self.name.clone(), self.log.clone());
        eventually(within, &format!("{name} to end"), || self.poll()).with_context(|| tail(&log, 20))
    }

    /// `None` while it runs.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().with_context(|| format!("waiting for {}", self.name))?;
        }
        Ok(self.ended)
    }

    pub fn running(&mut self) -> bool {
        matches!(self.poll(), Ok(None))
    }

    /// Ended by this signal?
    pub fn killed_by(&mut self, signal: Signal) -> bool {
        matches!(self.poll(), Ok(Some(status)) if status.signal() == Some(signal as i32))
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What this process has printed (not what an earlier one of the same name did).
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_start).unwrap_or(0).min(bytes.len());
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Waits for a line that contains `text`; fails at once if the process ends without having printed it.
    pub fn wait_for_log(&mut self, text: &str, within: Duration) -> Result<String> {
        let (name, log) = (self.name.clone(), self.log.clone());
        eventually(within, &format!("{name} to print {text:?}"), || {
            let ended = self.poll()?;
            if let Some(line) = self.log().lines().find(|line| line.contains(text)) {
                return Ok(Some(line.to_owned()));
            }
            match ended {
                Some(status) => bail!("{name} ended with {status} before it printed {text:?}"),
                None => Ok(None),
            }
        })
        .with_context(|| tail(&log, 20))
    }

    /// Resident memory in KiB, and the most it ever was.
    pub fn memory_kib(&mut self) -> Result<(u64, u64)> {
        let pid = self.pid_in_host()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("{} is gone", self.name))?;
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok())
        };
        value("VmRSS:").zip(value("VmHWM:")).with_context(|| format!("{} shows no memory use", self.name))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if self.running() {
            let _ = self.kill9(); // the site's end would do it too
        }
    }
}

/// Whether a process is stopped (SIGSTOP), by whoever did it, itself as well.
pub fn is_frozen(pid: Pid) -> Result<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} has ended"))?;
    Ok(stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
}

const SOON: Duration = Duration::from_secs(10);
