//! Where things are: cargo's target folder, the binaries built beside us, what `tests/setup.sh` fetched.
//! Promises an error that says what to run when something is missing. Called by every other room.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Cargo's target folder, found from where this program runs, so that every cargo setting is honoured.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where this program is")?;
    let found = exe.ancestors().find(|folder| folder.join(SETUP_WAS_HERE).exists());
    match found {
        Some(folder) => Ok(folder.to_owned()),
        None => bail!("nothing is set up for {}: run tests/setup.sh (`make test` does)", exe.display()),
    }
}

/// A binary of this workspace, of the same build as the program that asks.
pub fn binary(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where this program is")?;
    let mut folder = exe.parent().context("a program has a folder")?;
    if folder.ends_with("deps") {
        folder = folder.parent().context("`deps` has a parent")?;
    }
    let path = folder.join(name);
    if !path.exists() {
        bail!("{} is not built: run `make build`", path.display());
    }
    Ok(path)
}

/// What `tests/setup.sh` fetched and built.
#[derive(Clone, Debug)]
pub struct Assets {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// The same guest, with a guest agent; absent where `tests/setup.sh` was not run since there is one.
    pub agent_initrd: Option<PathBuf>,
    /// QEMU's own migration stream reader; absent when Debian's source package could not be had.
    pub analyze_migration: Option<PathBuf>,
    pub folder: PathBuf,
}

impl Assets {
    pub fn find() -> Result<Self> {
        let folder = target_dir()?.join("rig");
        let (kernel, initrd) = (folder.join("vmlinuz"), folder.join("initrd"));
        for file in [&kernel, &initrd] {
            if !file.exists() {
                bail!("{} is missing: run tests/setup.sh (`make test` does)", file.display());
            }
        }
        let agent_initrd = Some(folder.join("agent-initrd")).filter(|file| file.exists());
        let analyze_migration = Some(folder.join("analyze-migration.py")).filter(|file| file.exists());
        Ok(Self { kernel, initrd, agent_initrd, analyze_migration, folder })
    }
}

/// What `tests/setup.sh` leaves in the target folder of its workspace, whoever made that folder.
const SETUP_WAS_HERE: &str = "rig/setup.lock";
