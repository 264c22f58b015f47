//! What is remembered of a claim at the witness: `automatic/<group>.json` in `data_dir`, from before it is made until
//! the failover that it was made for is done. Promises: replaced whole and synced; one that can't be read is an error
//! and never none.

use super::decide::Part;
use crate::group::Group;
use lifeboat::{durable, id::GroupId, units::UnixMs};
use serde::{Deserialize, Serialize};
use std::{fs, io, path::PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It may have been made.
    Intended,
    /// It was: no source takes these VMs back.
    Claimed,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClaimRecord {
    pub version: u32,
    /// The group as it was then.
    pub group: Group,
    /// Tells it from others.
    pub claim: String,
    pub parts: Vec<Part>,
    pub phase: Phase,
    pub at: UnixMs,
}

impl ClaimRecord {
    pub const VERSION: u32 = 1;
}

#[derive(Debug)]
pub struct ClaimBook {
    dir: PathBuf,
}

impl ClaimBook {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    pub fn all(&self) -> io::Result<Vec<ClaimRecord>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|kind| kind != "json") {
                continue;
            }
            let read = serde_json::from_slice::<ClaimRecord>(&fs::read(&path)?).map_err(io::Error::other);
            let record = read.and_then(|record| match record.version {
                ClaimRecord::VERSION => Ok(record),
                other => Err(io::Error::other(format!("version {other}"))),
            });
            found.push(record.map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?);
        }
        Ok(found)
    }

    pub fn save(&self, record: &ClaimRecord) -> io::Result<()> {
        durable::replace(&self.path(record.group.id), &serde_json::to_vec_pretty(record)?, 0o600)
    }

    pub fn remove(&self, group: GroupId) -> io::Result<()> {
        durable::remove(&self.path(group))
    }

    fn path(&self, group: GroupId) -> PathBuf {
        self.dir.join(format!("{group}.json"))
    }
}
