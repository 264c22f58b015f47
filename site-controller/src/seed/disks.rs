//! Which files hold a VM's disks: named by an operator, found in a folder of shipped copies, or in the domain's definition.
//! Promises: a format is told by its name or by libvirt, never guessed from the bytes, which a guest may have written: a
//! raw disk that pretends to be qcow2 could name any file of the host as its backing. Pure but for listing a folder.

use super::SeedError;
use lifeboat::hypervisor::domain_xml::DomainSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

impl DiskFormat {
    /// As QEMU's tools call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow2].into_iter().find(|format| format.as_str() == name)
    }

    /// By the file's name: `.qcow2`, or else raw.
    fn of(path: &Path) -> Self {
        if path.extension().is_some_and(|extension| extension == "qcow2") { Self::Qcow2 } else { Self::Raw }
    }
}

/// One disk of a VM, and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskFile {
    /// As the guest's bus calls it (`vda`): by this name it is known in all points.
    pub target: String,
    pub path: PathBuf,
    pub format: DiskFormat,
}

impl DiskFile {
    /// Reads `vda=/path`, or `vda=qcow2:/path` where the file's name does not tell.
    pub fn parse(given: &str) -> Result<Self, String> {
        let refuse = || format!("`{given}` names no disk; write `vda=/path`, or `vda=qcow2:/path`");
        let (target, file) = given.split_once('=').ok_or_else(refuse)?;
        let named = file.split_once(':').and_then(|(name, path)| Some((DiskFormat::named(name)?, path)));
        let path = PathBuf::from(named.map_or(file, |(_, path)| path));
        let format = named.map_or_else(|| DiskFormat::of(&path), |(format, _)| format);
        if !is_target(target) || !path.is_absolute() {
            return Err(refuse());
        }
        Ok(Self { target: target.into(), path, format })
    }
}

/// `vda.raw`, `vdb.qcow2` … in a folder of shipped copies.
pub fn in_folder(dir: &Path) -> Result<Vec<DiskFile>, SeedError> {
    let failed = |error: std::io::Error| SeedError::Disks(format!("{}: {error}", dir.display()));
    if !dir.is_absolute() {
        return Err(SeedError::Disks(format!("{}: name the folder by its whole path", dir.display())));
    }
    let mut disks = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str()).and_then(DiskFormat::named);
        let target = path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| is_target(stem));
        if let (Some(format), Some(target)) = (extension, target) {
            disks.push(DiskFile { target: target.into(), path: path.clone(), format });
        }
    }
    disks.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(disks)
}

/// The writable disks of a domain, by its inactive definition.
pub fn of_domain(spec: &DomainSpec) -> Result<Vec<DiskFile>, SeedError> {
    let file = |disk: &lifeboat::hypervisor::domain_xml::DiskSpec| {
        let found = disk.image_file().map_err(|why| SeedError::Disks(format!("{}: {why}", spec.name)))?;
        let format = if found.1 == DiskFormat::Qcow2.as_str() { DiskFormat::Qcow2 } else { DiskFormat::Raw };
        Ok(DiskFile { target: disk.target.clone(), path: found.0.to_owned(), format })
    };
    spec.replicated_disks().map(file).collect()
}

/// Refuses what can't be the disks of one VM.
pub(super) fn check(disks: &[DiskFile]) -> Result<(), SeedError> {
    let targets: BTreeSet<&str> = disks.iter().map(|disk| disk.target.as_str()).collect();
    if disks.is_empty() || disks.len() > DISKS_MAX {
        return Err(SeedError::Disks(format!("a seed has 1 to {DISKS_MAX} disks, not {}", disks.len())));
    }
    if targets.len() < disks.len() {
        return Err(SeedError::Disks("a disk is named twice".into()));
    }
    match disks.iter().find(|disk| !is_target(&disk.target) || !disk.path.is_absolute()) {
        Some(disk) => {
            let given = format!("{}={}", disk.target, disk.path.display());
            Err(SeedError::Disks(format!("`{given}` names no disk: a target and a whole path are needed")))
        }
        None => Ok(()),
    }
}

fn is_target(name: &str) -> bool {
    (1..=32).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

const DISKS_MAX: usize = 256;
