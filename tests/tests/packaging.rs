//! The packages: what is in them; what installing, upgrading, removing and purging them does to a machine.
//! Packs the binaries of this test run; `make deb` packs those of the release profile, all else is equal.
//! The machine is a minimal Debian root that `tests/setup.sh` made, without a network. Needs root.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use rig::{binary, target_dir};

const AGENT: &str = "lifeboat-agent";
const GUARD: &str = "lifeboat-guard";
const SITE: &str = "lifeboat-site-controller";
const OPERATOR: &str = "lifeboat";
const FIRST: &str = "0.1.0-1";
const NEXT: &str = "0.1.0-2";

/// Goal: systemd has nothing to say against the units, and they leave no more open than we decided.
#[test]
fn systemd_accepts_the_units_and_finds_them_confined() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for package in [AGENT, SITE] {
        let source = project().join(format!("packaging/{package}.service"));
        let unit = folder.path().join(format!("{package}.service"));
        // It looks for the programs, which are not installed on this machine.
        let built = binary(package)?;
        let installed = format!("/usr/bin/{package}");
        let text = fs::read_to_string(&source)?;
        ensure!(text.contains(&installed), "{} starts nothing of ours", source.display());
        fs::write(&unit, text.replace(&installed, &built.display().to_string()))?;
        let said = output(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit))?;
        ensure!(said.is_empty(), "{package}: {said}");
        output(
            Command::new("systemd-analyze")
                .args(["security", "--offline=true", "--no-pager"])
                .arg(format!("--threshold={EXPOSURE_MAX}"))
                .arg(&source),
        )?;
    }
    Ok(())
}

/// Goal: each package holds its programs, its unit and its configuration, and names what it needs.
#[test]
fn the_packages_are_complete() -> Result<()> {
    let out = tempfile::tempdir_in(target_dir()?)?;
    let [agent, site] = build(out.path(), FIRST)?;
    let programs =
        [(&agent, AGENT, "agent.toml", vec![AGENT]), (&site, SITE, "site.toml", vec![SITE, OPERATOR])];
    for (deb, package, config, binaries) in programs {
        let held = output(Command::new("dpkg-deb").arg("--contents").arg(deb))?;
        let holds = |mode: &str, path: &str| {
            let line = held.lines().find(|line| line.ends_with(&format!(" ./{path}")));
            line.is_some_and(|line| line.starts_with(&format!("{mode} 0/0 ")))
        };
        for binary in binaries {
            assert!(holds("-rwxr-xr-x", &format!("usr/bin/{binary}")), "{binary}: {held}");
        }
        assert!(holds("-rw-r--r--", &format!("usr/lib/systemd/system/{package}.service")), "{held}");
        assert!(holds("-rw-r--r--", &format!("etc/lifeboat/{config}")), "{held}");
        assert!(holds("-rw-r--r--", &format!("usr/share/doc/{package}/copyright")), "{held}");
        assert!(!held.contains("./var/"), "a package that owns data could remove it: {held}");
        assert_eq!(field(deb, "Version")?, FIRST);
        assert!(field(deb, "Depends")?.contains("libvirt0 (>= 9.0)"));
        assert!(field(deb, "Recommends")?.contains("libvirt-daemon-system"));
        let conffiles = output(Command::new("dpkg-deb").arg("--info").arg(deb).arg("conffiles"))?;
        assert_eq!(conffiles.trim(), format!("/etc/lifeboat/{config}"));
    }
    assert!(field(&agent, "Depends")?.contains("qemu-utils"));
    assert!(field(&site, "Recommends")?.contains("qemu-system-x86"));
    Ok(())
}

/// Goal: on a clean machine both packages install, their programs run, and nothing starts by itself.
#[test]
fn a_clean_machine_takes_both_packages_and_starts_nothing() -> Result<()> {
    let root = Root::new("clean")?;
    root.install(FIRST)?;
    for (path, mode) in [
        ("usr/bin/lifeboat-agent", 0o755),
        ("usr/bin/lifeboat-site-controller", 0o755),
        ("usr/bin/lifeboat", 0o755),
        ("usr/lib/systemd/system/lifeboat-agent.service", 0o644),
        ("usr/lib/systemd/system/lifeboat-guard.service", 0o644),
        ("usr/lib/systemd/system/lifeboat-site-controller.service", 0o644),
        ("etc/lifeboat", 0o750),
        ("etc/lifeboat/agent.toml", 0o644),
        ("etc/lifeboat/site.toml", 0o644),
        ("var/lib/lifeboat", 0o711),
        ("var/lib/lifeboat/replicas", 0o711),
    ] {
        let mode_is =
            fs::metadata(root.at(path)).with_context(|| path.to_owned())?.permissions().mode() & 0o7777;
        assert_eq!(mode_is, mode, "{path} is {mode_is:o}");
    }
    for program in [AGENT, SITE, OPERATOR] {
        root.run(&[program, "--help"])?;
    }
    for package in [AGENT, SITE] {
        assert_eq!(root.enabled(package)?, "disabled");
        let changed = root.run(&["dpkg", "--verify", package])?;
        assert!(changed.is_empty(), "{package} changed its own files: {changed}");
    }
    assert_eq!(root.asked_of_systemd()?, ["daemon-reload"]);
    Ok(())
}

/// Goal: an upgrade keeps what the operator wrote and switched on, and asks only for what already runs to be
/// restarted. Installing the same once more changes nothing.
#[test]
fn an_upgrade_keeps_the_configuration_and_restarts_only_what_runs() -> Result<()> {
    let root = Root::new("upgrade")?;
    root.install(FIRST)?;
    let config = root.at("etc/lifeboat/agent.toml");
    fs::write(&config, "# mine\n")?;
    fs::set_permissions(root.at("etc/lifeboat"), fs::Permissions::from_mode(0o700))?;
    root.systemctl("enable", AGENT)?;
    root.forget_asked()?;

    root.install(NEXT)?;
    assert_eq!(root.version(AGENT)?, NEXT);
    let asked = root.asked_of_systemd()?;
    for unit in [AGENT, GUARD, SITE] {
        assert!(is_asked(&asked, "try-restart", unit), "{asked:?}");
    }
    let others = asked.iter().filter(|line| *line != "daemon-reload" && !line.starts_with("try-restart "));
    assert_eq!(others.count(), 0, "{asked:?}");

    root.run(&["apt-get", "-qq", "-y", "install", "--reinstall", &root.deb(AGENT, NEXT)])?;
    assert_eq!(fs::read_to_string(&config)?, "# mine\n");
    let mode = fs::metadata(root.at("etc/lifeboat"))?.permissions().mode() & 0o777;
    assert_eq!(mode, 0o700, "an upgrade undid the operator's mode");
    assert_eq!(root.enabled(AGENT)?, "enabled");
    assert_eq!(root.enabled(SITE)?, "disabled");
    Ok(())
}

/// Goal: removing keeps the configuration, purging removes it; neither touches recovery points, replicas or
/// identities, and the purge says where they are.
#[test]
fn not_even_a_purge_removes_recovery_points() -> Result<()> {
    let root = Root::new("purge")?;
    root.install(FIRST)?;
    let kept = ["agent/identity.key", "site/packs/1", "replicas/web/vda.qcow2"];
    for file in kept {
        let path = root.at("var/lib/lifeboat").join(file);
        fs::create_dir_all(path.parent().context("a file has a folder")?)?;
        fs::write(&path, file)?;
    }
    root.systemctl("enable", SITE)?;
    root.forget_asked()?;

    root.run(&["apt-get", "-qq", "-y", "remove", AGENT, SITE])?;
    assert!(!root.at("usr/bin/lifeboat-agent").exists());
    assert!(root.at("etc/lifeboat/agent.toml").exists() && root.at("etc/lifeboat/site.toml").exists());
    let asked = root.asked_of_systemd()?;
    for unit in [AGENT, GUARD, SITE] {
        assert!(is_asked(&asked, "stop", unit), "{asked:?}");
    }

    let said = root.run(&["dpkg", "--purge", AGENT, SITE])?;
    assert!(!root.at("etc/lifeboat").exists(), "the configuration is still there");
    let link = root.at("etc/systemd/system/multi-user.target.wants").join(format!("{SITE}.service"));
    assert!(link.symlink_metadata().is_err(), "the unit is still switched on");
    for file in kept {
        let text = fs::read_to_string(root.at("var/lib/lifeboat").join(file));
        assert_eq!(text.ok().as_deref(), Some(file), "a purge touched {file}");
    }
    for folder in ["agent", "site", "replicas"] {
        assert!(said.contains(&format!("rm -r /var/lib/lifeboat/{folder}")), "{said}");
    }
    Ok(())
}

/// Goal: a machine that never took part is left as it was.
#[test]
fn purging_what_was_never_used_leaves_nothing() -> Result<()> {
    let root = Root::new("unused")?;
    root.install(FIRST)?;
    root.run(&["dpkg", "--purge", AGENT, SITE])?;
    for path in ["etc/lifeboat", "var/lib/lifeboat", "usr/share/doc/lifeboat-agent", "usr/bin/lifeboat"] {
        assert!(!root.at(path).exists(), "{path} is left");
    }
    Ok(())
}

/// Whether systemd was asked to do that to the unit, alone or with others.
fn is_asked(asked: &[String], verb: &str, unit: &str) -> bool {
    let unit = format!("{unit}.service");
    asked.iter().any(|line| line.split(' ').next() == Some(verb) && line.split(' ').any(|word| word == unit))
}

/// A minimal Debian in a folder. Gone when dropped; what a killed test left goes with the next one.
/// systemd does not run in it: a recorder answers in place of `systemctl`, as if it did.
struct Root {
    folder: PathBuf,
    _lock: Flock<File>,
}

impl Root {
    fn new(name: &str) -> Result<Self> {
        let rig = target_dir()?.join("rig");
        let base = rig.join("debian-root.tar");
        ensure!(base.exists(), "{} is missing: run tests/setup.sh (`make test` does)", base.display());
        let lock = File::create(rig.join(format!("debian-root-{name}.lock")))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let root = Self { folder: rig.join(format!("debian-root-{name}")), _lock: lock };
        root.remove()?;
        fs::create_dir(&root.folder)?;
        output(Command::new("tar").arg("-C").arg(&root.folder).args(["--numeric-owner", "-xf"]).arg(&base))?;
        fs::create_dir_all(root.at("run/systemd/system"))?;
        let recorder = root.at("usr/bin/systemctl");
        fs::write(&recorder, RECORDER)?;
        fs::set_permissions(&recorder, fs::Permissions::from_mode(0o755))?;
        for version in [FIRST, NEXT] {
            let out = root.at("debs").join(version);
            fs::create_dir_all(&out)?;
            build(&out, version)?;
        }
        Ok(root)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    /// As seen from within.
    fn deb(&self, package: &str, version: &str) -> String {
        format!("/debs/{version}/{package}.deb")
    }

    fn install(&self, version: &str) -> Result<()> {
        let (agent, site) = (self.deb(AGENT, version), self.deb(SITE, version));
        self.run(&["apt-get", "-qq", "-y", "--no-install-recommends", "install", &agent, &site])?;
        Ok(())
    }

    /// Runs it within, without a network; returns all that it printed.
    fn run(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("unshare");
        // Its mounts and processes end with it, however it ends.
        command.args(["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc", "--root"]);
        command.arg(&self.folder).args(words).env_clear();
        command.envs([
            ("PATH", "/usr/sbin:/usr/bin"),
            ("LC_ALL", "C.UTF-8"),
            ("DEBIAN_FRONTEND", "noninteractive"),
        ]);
        output(&mut command)
    }

    /// The real one, on the files of this root.
    fn systemctl(&self, verb: &str, package: &str) -> Result<()> {
        let mut command = Command::new("systemctl");
        output(command.arg("--root").arg(&self.folder).args([verb, &format!("{package}.service")]))?;
        Ok(())
    }

    fn enabled(&self, package: &str) -> Result<String> {
        let mut command = Command::new("systemctl");
        command.arg("--root").arg(&self.folder).args(["is-enabled", &format!("{package}.service")]);
        let said = command.output().context("starting systemctl")?; // not being enabled is no success to it
        Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
    }

    fn version(&self, package: &str) -> Result<String> {
        self.run(&["dpkg-query", "-W", "-f", "${Version}", package])
    }

    /// What the packages asked of systemd, without options and questions, each once.
    fn asked_of_systemd(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.at("asked")).context("nothing was asked of systemd")?;
        let mut asked = text
            .lines()
            .map(|line| line.split(' ').filter(|word| !word.starts_with('-')).collect::<Vec<_>>().join(" "))
            .filter(|line| !line.starts_with("is-") && !line.starts_with("show"))
            .collect::<Vec<_>>();
        asked.sort();
        asked.dedup();
        Ok(asked)
    }

    fn forget_asked(&self) -> Result<()> {
        fs::write(self.at("asked"), "").context("emptying the record")
    }

    fn remove(&self) -> Result<()> {
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder)
                .with_context(|| format!("removing {}", self.folder.display()))?;
        }
        Ok(())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = self.remove(); // the next of its name tries again, and says so
    }
}

/// Packs what this test run has built into `out`, as both packages of a version.
fn build(out: &Path, version: &str) -> Result<[PathBuf; 2]> {
    // cargo-deb packs what it finds under `release`, and would build that itself.
    let staged = tempfile::tempdir_in(target_dir()?)?;
    let release = staged.path().join("release");
    fs::create_dir(&release)?;
    for name in [AGENT, SITE, OPERATOR] {
        let (from, to) = (binary(name)?, release.join(name));
        fs::hard_link(&from, &to)
            .with_context(|| format!("linking {} to {}", from.display(), to.display()))?;
    }
    let pack = |package: &str| {
        let deb = out.join(format!("{package}.deb"));
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(project()).env("CARGO_TARGET_DIR", staged.path());
        command.args(["deb", "--locked", "--offline", "--no-build", "--no-strip", "--fast"]);
        command.args(["--package", package, "--deb-version", version, "--output"]).arg(&deb);
        output(&mut command).map(|_| deb)
    };
    Ok([pack(AGENT)?, pack(SITE)?])
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn field(deb: &Path, name: &str) -> Result<String> {
    let text = output(Command::new("dpkg-deb").arg("--field").arg(deb).arg(name))?;
    Ok(text.trim().to_owned())
}

/// Both outputs of a command that must succeed.
fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if !out.status.success() {
        bail!("{command:?} ended with {}\n{text}", out.status);
    }
    Ok(text)
}

/// systemd's measure of what a unit leaves open, in tenths: 3.0 of 10.
const EXPOSURE_MAX: u32 = 30;
const RECORDER: &str = "#!/bin/sh\necho \"$*\" >>/asked\n";
