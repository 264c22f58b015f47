//! A second KVM host of a site: a libvirtd of its own beside the site's, with definitions, logs and guests of its own. It is
//! reached over TCP, as a host elsewhere is, and shares with the site what lies in the site's folder. A power cut of the site
//! ends it with everything else. Calls `site`; called by the tests.

use crate::{Cmd, Guest, Proc, Site, eventually, older_qemu, site, tail};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::{Path, PathBuf},
};

pub struct SecondHost {
    site: Site,
    folder: PathBuf,
    libvirtd: Option<Proc>,
}

impl SecondHost {
    /// Up and answering.
    pub fn new(site: &Site) -> Result<Self> {
        let folder = site.folder().join("second");
        for sub in ["run/lock", "etc", "lib/images", "log/qemu", "cache"] {
            fs::create_dir_all(folder.join(sub)).with_context(|| format!("making {sub} of a second host"))?;
        }
        fs::write(folder.join("etc/qemu.conf"), site::QEMU_CONF)?;
        let listen = format!(
            "listen_tls = 0\nlisten_tcp = 1\nlisten_addr = \"127.0.0.1\"\ntcp_port = \"{PORT}\"\nauth_tcp = \"none\"\n"
        );
        let conf = format!("host_uuid = \"{}\"\n{}{listen}", uuid::Uuid::new_v4(), site::LIBVIRTD_CONF);
        fs::write(folder.join("etc/libvirtd.conf"), conf)?;
        fs::create_dir_all(folder.join("lib/boot"))?;
        for file in fs::read_dir(site.folder().join("lib/boot"))? {
            let file = file?;
            fs::copy(file.path(), folder.join("lib/boot").join(file.file_name()))?;
        }
        let mut host = Self { site: site.clone(), folder, libvirtd: None };
        host.start(None)?;
        Ok(host)
    }

    pub fn uri(&self) -> String {
        format!("qemu+tcp://127.0.0.1:{PORT}/system")
    }

    /// Its libvirtd. A folder that is `hidden` from it is another one there, and empty.
    pub fn start(&mut self, hidden: Option<&Path>) -> Result<()> {
        let mut libvirtd = self.command(hidden).named("second-libvirtd").spawn()?;
        eventually(site::LIBVIRTD_TIME, "the second libvirtd", || {
            if let Some(status) = libvirtd.poll()? {
                bail!("it ended with {status}");
            }
            Ok(self.virsh(["version"]).ok())
        })
        .with_context(|| tail(libvirtd.log_path(), 10))
        .with_context(|| tail(&self.folder.join("log/libvirtd.log"), 10))?;
        self.libvirtd = Some(libvirtd);
        Ok(())
    }

    /// Its guests run on.
    pub fn stop(&mut self) -> Result<()> {
        let mut libvirtd = self.libvirtd.take().context("no second libvirtd runs")?;
        libvirtd.signal(Signal::SIGTERM)?;
        libvirtd.wait(site::LIBVIRTD_TIME)?;
        Ok(())
    }

    /// Its libvirt says that its QEMU is [`older_qemu::SAID`], or no longer.
    pub fn pretend_older_qemu(&mut self, older: bool) -> Result<()> {
        self.stop()?;
        let cache = self.folder.join("cache");
        if older {
            older_qemu::pretend(&cache)?
        } else {
            older_qemu::no_longer(&cache)?
        }
        self.start(None)
    }

    pub fn virsh<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        self.site.virsh_at(&self.uri(), words)
    }

    /// A handle on a domain of this host by name, there or not yet.
    pub fn guest(&self, name: &str) -> Guest {
        let console = self.folder.join(format!("log/qemu/{name}-console.log"));
        Guest::at_second(&self.site, name, console, self.uri())
    }

    fn command(&self, hidden: Option<&Path>) -> Cmd {
        let words = ["--mount", "sh", "-c", FURNISH_AND_RUN, "sh"];
        self.site.command("unshare").args(words).arg(&self.folder).args(hidden)
    }
}

const PORT: u16 = 16_510;

/// In a mount namespace of its own; the process becomes libvirtd.
const FURNISH_AND_RUN: &str = r#"set -e
for own in run:/run etc:/etc/libvirt lib:/var/lib/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
    mount --bind "$1/${own%%:*}" "${own#*:}"
done
if [ -n "$2" ]; then mount -t tmpfs hidden "$2"; fi
exec libvirtd --listen"#;
