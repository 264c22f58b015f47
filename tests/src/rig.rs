//! One test's world: its folder, its sites, and the promise that nothing of it is left behind.
//! A rig that died without a chance to clean up is cleaned up by the next one, by the process ids it wrote
//! down. Calls `site`; called by tests and the demo.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid};

use crate::accel::Accel;
use crate::link::{Link, Shape};
use crate::paths::{Assets, target_dir};
use crate::site::Site;
use crate::wait::eventually;

pub struct Rig {
    name: String,
    folder: PathBuf,
    assets: Assets,
    accel: Accel,
    sites: Mutex<Vec<Site>>,
}

impl Rig {
    /// A new world. `name` names the logs it leaves in `<target>/rig/logs/<name>`.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(geteuid().is_root(), "the rig needs root: it makes namespaces and starts libvirtd in them");
        let assets = Assets::find()?;
        let accel = Accel::detect(&assets)?;
        let folder = claim_folder()?;
        eprintln!("rig: guests run under {accel}");
        Ok(Self { name: name.to_owned(), folder, assets, accel, sites: Mutex::default() })
    }

    /// A machine with power on and libvirtd running. Names must differ; at most 250 sites.
    pub fn site(&self, name: &str) -> Result<Site> {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(sites.iter().all(|site| site.name() != name), "there is a site {name} already");
        let number = u8::try_from(sites.len() + 1).context("too many sites")?;
        let site = Site::build(name, number, &self.folder.join(name), self.accel, &self.assets)?;
        sites.push(site.clone());
        site.power_on()?;
        Ok(site)
    }

    /// The WAN between two sites.
    pub fn link(&self, a: &Site, b: &Site, shape: Shape) -> Result<Link> {
        Link::new(a, b, shape)
    }

    /// Two sites, A and B, and an unshaped link: what most tests begin with.
    pub fn pair(&self) -> Result<(Site, Site, Link)> {
        let (a, b) = (self.site("A")?, self.site("B")?);
        let link = self.link(&a, &b, Shape::default())?;
        Ok((a, b, link))
    }

    pub fn accel(&self) -> Accel {
        self.accel
    }

    pub fn assets(&self) -> &Assets {
        &self.assets
    }

    /// A folder on disk that goes with the rig, seen under the same path by the host and by every site.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the logs go when the rig does.
    pub fn logs(&self) -> Result<PathBuf> {
        Ok(target_dir()?.join("rig/logs").join(&self.name))
    }

    /// Takes everything down, as a drop does: for a program that is told to stop while others use the rig. Once is
    /// enough; whoever still uses it gets errors.
    pub fn end(&self) {
        let sites = std::mem::take(&mut *self.sites.lock().unwrap_or_else(PoisonError::into_inner));
        if !self.folder.exists() {
            return;
        }
        sites.iter().for_each(Site::power_cut);
        match self.keep_logs(&sites) {
            Ok(()) => eprintln!("rig: logs are in {}", self.logs().unwrap_or_default().display()),
            Err(error) => eprintln!("rig: the logs could not be kept: {error:#}"),
        }
        if std::env::var_os("LIFEBOAT_RIG_KEEP").is_some() && fs::write(self.folder.join(KEPT), "").is_ok() {
            eprintln!("rig: kept {}", self.folder.display());
        } else if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("rig: {} could not be removed: {error}", self.folder.display());
        }
    }

    fn keep_logs(&self, sites: &[Site]) -> Result<()> {
        let logs = self.logs()?;
        let _ = fs::remove_dir_all(&logs); // of the last run
        for site in sites {
            copy_small_files(&site.folder().join("log"), &logs.join(site.name()))?;
        }
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end();
    }
}

/// Makes this rig's folder, after removing what dead rigs left. Short: unix socket paths end at 108 bytes.
fn claim_folder() -> Result<PathBuf> {
    static NUMBER: AtomicU32 = AtomicU32::new(1);
    let base = Path::new(BASE);
    umask(Mode::from_bits_truncate(0o022)); // QEMU's user must get to its guests' disks
    fs::create_dir_all(base).with_context(|| format!("making {BASE}"))?;
    let lock = File::create(base.join(".lock")).context("opening the rig lock")?;
    let _locked = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("taking the rig lock")?;
    sweep(base)?;
    let folder = base.join(format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
    Process::of(std::process::id()).context("reading our own process")?.note(&folder.join(OWNER))?;
    Ok(folder)
}

fn sweep(base: &Path) -> Result<()> {
    for entry in fs::read_dir(base).with_context(|| format!("listing {BASE}"))? {
        let folder = entry.context("listing rigs")?.path();
        let owned = Process::noted(&folder.join(OWNER)).is_some_and(Process::alive);
        if !folder.is_dir() || owned || folder.join(KEPT).exists() {
            continue;
        }
        for site in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?.flatten()
        {
            if let Some(power) = Process::noted(&site.path().join(POWER)).filter(|power| power.alive()) {
                let _ = kill(Pid::from_raw(power.pid), Signal::SIGKILL); // gone meanwhile is as good
            }
        }
        // What runs in its sites dies a moment later, and may write until then.
        eventually(SWEEP_TIME, &format!("removing what a dead rig left in {}", folder.display()), || {
            Ok(fs::remove_dir_all(&folder).is_ok().then_some(()))
        })?;
    }
    Ok(())
}

/// A process that can't be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pid: i32,
    started: u64,
}

impl Process {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may hold anything; the start time is the 20th field after it.
        let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid: i32::try_from(pid).ok()?, started })
    }

    pub(crate) fn alive(self) -> bool {
        u32::try_from(self.pid).ok().and_then(Self::of) == Some(self)
    }

    pub(crate) fn note(self, file: &Path) -> Result<()> {
        fs::write(file, format!("{} {}", self.pid, self.started))
            .with_context(|| format!("writing {}", file.display()))
    }

    fn noted(file: &Path) -> Option<Self> {
        let text = fs::read_to_string(file).ok()?;
        let (pid, started) = text.split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, started: started.parse().ok()? })
    }
}

fn copy_small_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let entry = entry.context("listing logs")?;
        let (path, kind) = (entry.path(), entry.file_type().context("listing logs")?);
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_small_files(&path, &target)?;
        } else if kind.is_file() && entry.metadata().is_ok_and(|data| data.len() <= LOG_BYTES_MAX) {
            fs::copy(&path, &target).with_context(|| format!("keeping {}", path.display()))?;
        }
    }
    Ok(())
}

/// On disk, not on a tmpfs: guests' disks are opened with O_DIRECT.
const BASE: &str = "/var/tmp/lifeboat-rig";
const OWNER: &str = "owner";
const KEPT: &str = "kept";
pub(crate) const POWER: &str = "power";
const SWEEP_TIME: Duration = Duration::from_secs(20);
const LOG_BYTES_MAX: u64 = 16 << 20;
