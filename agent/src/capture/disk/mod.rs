//! Capturing a guest's disks.

use lifeboat::{
    hypervisor::monitor::Monitor,
    id::{PointId, VmId},
    page::{Content, PageRun},
};
use std::{path::PathBuf, sync::Arc};

#[derive(Debug, thiserror::Error)]
#[error("this build captures no disks")]
pub struct DiskError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskTarget {
    pub target: String,
    pub alias: String,
}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    pub target: String,
    pub bytes: u64,
    pub full: bool,
}
pub struct Disks;
impl Disks {
    pub fn attach(_: Arc<dyn Monitor>, _: VmId, specs: &[DiskTarget], _: PathBuf) -> Result<Self, DiskError> {
        if specs.is_empty() { Ok(Self) } else { Err(DiskError) }
    }
    pub fn recover(&mut self, _: Option<PointId>) -> Result<(), DiskError> {
        Ok(())
    }
    pub fn prepare(&mut self, _: PointId) -> Result<(), DiskError> {
        Ok(())
    }
    pub fn mark_actions(&self) -> Vec<serde_json::Value> {
        Vec::new()
    }
    pub fn marked(&mut self) {}
    pub fn images(&self) -> Vec<DiskImage> {
        Vec::new()
    }
    pub async fn open_views(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    pub async fn next(&mut self) -> Result<Option<(usize, Vec<PageRun>, Content)>, DiskError> {
        Ok(None)
    }
    pub async fn close_views(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    pub async fn settle(&mut self, _: PointId) -> Result<(), DiskError> {
        Ok(())
    }
    pub async fn put_back(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    pub async fn detach(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
}
