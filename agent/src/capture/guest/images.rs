//! The images of a point, numbered: memory blocks in stream order, then disks; the small state follows them.
//! Promises: the same guest is numbered alike at the look and at the barrier. Called by both.

use super::failed;
use crate::capture::{disk::DiskImage, memory::RamImage, source::CaptureError};
use lifeboat::format::manifest::{Image, ImageKind};

pub fn number(ram: &[RamImage], disks: Vec<DiskImage>) -> Result<Vec<Image>, CaptureError> {
    let ram = ram.iter().map(|ram| (ImageKind::Ram, ram.block.name.clone(), ram.block.bytes, ram.full));
    let disks = disks.into_iter().map(|disk| (ImageKind::Disk, disk.target, disk.bytes, disk.full));
    let all = ram.chain(disks).enumerate();
    all.map(|(at, (kind, name, bytes, full))| {
        let no = u16::try_from(at);
        let no = no.map_err(|_| failed("the guest has too many memory blocks and disks"))?;
        Ok(Image { no, kind, name, bytes, full })
    })
    .collect()
}
