//! Hardware virtualisation or emulation: whichever this machine really can do.
//! `/dev/kvm` proves nothing (a nested one may run only half of the instructions), so the test guest is
//! booted once. The answer is kept per boot of this machine. Called by `spec`, `site` and whoever prints
//! which it was.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::console::Console;
use crate::paths::Assets;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    Kvm,
    Tcg,
}

impl Accel {
    /// Asks `LIFEBOAT_RIG_ACCEL` (`kvm` or `qemu`), then what was found earlier, then the machine.
    pub fn detect(assets: &Assets) -> Result<Self> {
        if let Ok(wanted) = std::env::var("LIFEBOAT_RIG_ACCEL") {
            return Self::named(&wanted)
                .with_context(|| format!("LIFEBOAT_RIG_ACCEL={wanted}: use kvm or qemu"));
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("which boot this is")?;
        let note = assets.folder.join(format!("accel-{}", boot.trim()));
        if let Some(known) = fs::read_to_string(&note).ok().and_then(|text| Self::named(text.trim())) {
            return Ok(known);
        }
        let found = if boots_under_kvm(assets)? { Self::Kvm } else { Self::Tcg };
        let draft = note.with_extension(std::process::id().to_string());
        fs::write(&draft, found.domain_type())
            .and_then(|()| fs::rename(&draft, &note))
            .context("noting the accelerator")?;
        Ok(found)
    }

    /// As libvirt spells it in `<domain type='…'>`.
    pub fn domain_type(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "qemu",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accel| accel.domain_type() == name)
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "hardware KVM (type='kvm')",
            Self::Tcg => "emulation, TCG (type='qemu')",
        })
    }
}

fn boots_under_kvm(assets: &Assets) -> Result<bool> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(false);
    }
    let log = tempfile::NamedTempFile::new().context("a file for the probe's console")?;
    let mut probe = Command::new("qemu-system-x86_64")
        .args(["-accel", "kvm", "-m", "128", "-nodefaults", "-display", "none", "-no-reboot", "-kernel"])
        .arg(&assets.kernel)
        .arg("-initrd")
        .arg(&assets.initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 lb.pattern_mib=1", "-serial"])
        .arg(format!("file:{}", log.path().display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting qemu-system-x86_64: run tests/setup.sh")?;
    let console = Console::at(log.path());
    let answer = crate::wait::eventually(PROBE_TIME, "a guest under KVM", || {
        if console.last().is_some() {
            return Ok(Some(()));
        }
        match probe.try_wait()? {
            Some(status) => bail!("QEMU ended with {status}"),
            None => Ok(None),
        }
    });
    let _ = probe.kill(); // it may have ended by itself
    probe.wait().context("ending the probe")?;
    Ok(answer.is_ok())
}

const PROBE_TIME: Duration = Duration::from_secs(8);
