//! Why a point, or one image of it, can't be restored.

use crate::store::{PointRef, StoreError};
use lifeboat::id::PackId;
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// What the point needs is not what was written. An older point may not need it.
    #[error(
        "point {} ({}) can't be restored: {what}. Restore an older point; `lifeboat verify` shows which ones are whole",
        point.seq, point.point.short()
    )]
    Broken { point: PointRef, what: String },
    #[error(
        "point {} ({}), image `{image}`: pack {pack}, written with point {}, is damaged at byte {offset} ({what}). Restore an older point; \
         `lifeboat verify` shows which ones are whole",
        point.seq, point.point.short(), written.seq
    )]
    Damaged { point: PointRef, image: String, pack: PackId, written: PointRef, offset: u64, what: String },
    #[error("the point has no image `{0}`")]
    NoImage(String),
    #[error("image `{image}` has {bytes} bytes, more than the {most} that are read into memory")]
    TooLarge { image: String, bytes: u64, most: u64 },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{}: {step} failed", path.display())]
    File {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
}
