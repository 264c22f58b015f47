//! A site's power supply: makes the namespaces, furnishes them, and is their PID 1.
//!
//!     rig-site <site folder> <hostname> [kvm]
//!
//! Prints `pid <its PID 1 as the host counts>` and `up`, in any order. Lives until its standard input is closed: the rig holds the
//! other end, so a rig that dies in any way takes its sites along. Killing PID 1 is the power cut: the kernel kills
//! everything inside at once. Called by `rig::Site`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, sethostname};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rig-site: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (folder, hostname, kvm) = match words.as_slice() {
        [folder, hostname] => (PathBuf::from(folder), hostname, false),
        [folder, hostname, kvm] if kvm == "kvm" => (PathBuf::from(folder), hostname, true),
        _ => bail!("usage: rig-site <site folder> <hostname> [kvm]"),
    };
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET;
    unshare(spaces | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
        .context("making namespaces (needs root)")?;
    // SAFETY: this program has one thread, so the child may do anything.
    match unsafe { fork() }.context("forking the site's PID 1")? {
        ForkResult::Parent { child } => {
            say(&format!("pid {child}"))?;
            waitpid(child, None).context("waiting for the site's end")?;
            Ok(())
        }
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGKILL).context("tying PID 1 to its parent")?;
            furnish(&folder, hostname, kvm)?;
            say("up")?;
            io::copy(&mut io::stdin().lock(), &mut io::sink())
                .context("waiting for the rig to let go")?;
            Ok(())
        }
    }
}

fn furnish(folder: &Path, hostname: &str, kvm: bool) -> Result<()> {
    umask(Mode::empty());
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("making mounts private")?;
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/sys/fs/cgroup"),
    ] {
        mount(Some(kind), place, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mounting {place}"))?;
    }
    for (name, place) in OWN {
        let own = folder.join(name);
        mount(Some(&own), *place, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("{} over {place} (run tests/setup.sh)", own.display()))?;
    }
    fs::create_dir_all("/run/lock").context("making /run/lock")?;
    furnish_dev(&folder.join("dev"), kvm)?;
    sethostname(hostname).context("naming the site")?;
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("running ip")?;
    ensure!(
        status.success(),
        "the loopback interface does not come up: {status}"
    );
    // SAFETY: ignoring a signal installs no handler. Ignored, the kernel reaps the orphans that PID 1 inherits.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.context("ignoring SIGCHLD")?;
    Ok(())
}

/// A private /dev. Without kvm unless it works: libvirtd that finds one it can't use asks QEMU again at every parse.
fn furnish_dev(dev: &Path, kvm: bool) -> Result<()> {
    let none: Option<&str> = None;
    mount(
        Some("tmpfs"),
        dev,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .context("mounting a private /dev")?;
    for folder in ["pts", "shm", "net"] {
        fs::create_dir(dev.join(folder)).with_context(|| format!("making /dev/{folder}"))?;
    }
    let kvm = kvm.then_some(("kvm", 10, 232));
    for (name, major, minor) in DEVICES.iter().copied().chain(kvm) {
        mknod(
            &dev.join(name),
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o666),
            makedev(major, minor),
        )
        .with_context(|| format!("making /dev/{name}"))?;
    }
    let links = [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ];
    for (name, target) in links {
        symlink(target, dev.join(name)).with_context(|| format!("linking /dev/{name}"))?;
    }
    let options = Some("newinstance,ptmxmode=0666,mode=620");
    mount(
        Some("devpts"),
        &dev.join("pts"),
        Some("devpts"),
        MsFlags::empty(),
        options,
    )
    .context("mounting /dev/pts")?;
    mount(
        Some("tmpfs"),
        &dev.join("shm"),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .context("mounting /dev/shm")?;
    mount(Some(dev), "/dev", none, MsFlags::MS_MOVE, none)
        .context("moving the private /dev in place")
}

fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("telling the rig")
}

/// What a site has of its own: its place in the site's folder, where it is mounted.
const OWN: &[(&str, &str)] = &[
    ("hosts", "/etc/hosts"),
    ("run", "/run"),
    ("etc", "/etc/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("log/libvirt", "/var/log/libvirt"),
    ("cache", "/var/cache/libvirt"),
];

const DEVICES: &[(&str, u64, u64)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
    ("fuse", 10, 229),
    ("net/tun", 10, 200),
];
