//! One disk of a seed, read through [`ImageFile`]. Promises: no QEMU writes to the file meanwhile ([`super::locks`], or
//! QEMU's own locks for formats other than raw).

use super::{
    SeedError,
    disks::{DiskFile, DiskFormat},
    locks::Hold,
};
use bytes::Bytes;
use lifeboat::nbd::{Beside, ImageFile, ImageFileError, NbdError};
use std::path::Path;

/// See the module.
#[derive(Debug)]
pub(super) struct Image {
    file: DiskFile,
    image: ImageFile,
    _hold: Option<Hold>,
}

impl Image {
    pub async fn open(file: &DiskFile, run_dir: &Path) -> Result<Self, SeedError> {
        let refuse = |why: String| {
            let DiskFile { target, path, .. } = file.clone();
            SeedError::Image { target, path, why }
        };
        let hold = match file.format {
            DiskFormat::Raw => Hold::on(&file.path).map_err(|error| refuse(error.to_string()))?,
            DiskFormat::Qcow2 => None,
        };
        let opened = ImageFile::open(&file.path, file.format.as_str(), Beside::NoWriters, run_dir).await;
        let image = opened.map_err(|error| match error {
            ImageFileError::Refused(why) => refuse(why),
            ImageFileError::Nbd(source) => failed(file, source),
        })?;
        Ok(Self { file: file.clone(), image, _hold: hold })
    }

    pub fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    /// The next of its regions; `Some(None)` if all of it is zero, `None` at the end.
    pub async fn next_region(&mut self) -> Result<Option<Option<Bytes>>, SeedError> {
        self.image.next_region().await.map_err(|source| failed(&self.file, source))
    }
}

fn failed(file: &DiskFile, source: NbdError) -> SeedError {
    SeedError::Nbd { target: file.target.clone(), path: file.path.clone(), source }
}
