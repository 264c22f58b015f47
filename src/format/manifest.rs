//! Manifests: one recovery point, complete. A point exists if, and only if, its manifest does.
//! Promises: the body is digested by its header; each manifest names the digest of the one before it, so that a
//! history can't be changed in the middle unnoticed. File: `FileHeader` (kind manifest), then the postcard body.
//! Version 2 is written; version 1 ([`v1`]) is read.
//! Called by the site's commit, catalogue, restore and verify.

use crate::{
    chunk::digest::Digest,
    format::header::{FileHeader, HeaderError, Kind},
    format::pack::PackRef,
    id::{CutId, PointId, VmId},
    units::{Generation, Seq, UnixMs},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

pub mod v1;

/// Bytes of a manifest's body at the most: refused before it is read.
pub const BODY_MAX: u32 = 64 << 20;
/// Images in one point at the most.
pub const IMAGES_MAX: usize = 1024;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageKind {
    /// A RAM block of QEMU's migration stream, named as QEMU names it. Images of this kind stand in stream order.
    Ram,
    /// A disk, named by its target (`vda`).
    Disk,
    /// Small state that is stored whole with each point; names in [`blob`].
    Blob,
}

/// Names of the blobs that a point holds.
pub mod blob {
    /// The running domain's XML, as libvirt gives it (secure information included).
    pub const DOMAIN_XML: &str = "domain.xml";
    /// The domain's persistent definition; absent for a transient domain.
    pub const DEFINITION_XML: &str = "definition.xml";
    /// The configuration section of a migration stream: the bytes between its version and its first section.
    pub const MACHINE_CONFIG: &str = "machine-config";
    /// Device sections, as `xen-save-devices-state` writes them, without their first 8 bytes; ends with the EOF byte.
    pub const DEVICE_STATE: &str = "device-state";
    /// The point is a seed: disks that the site read itself, not the VM's as it ran at an instant. JSON, for people.
    pub const SEED: &str = "seed";
    /// The point is of the disks of a guest that was off, read from their files. JSON, for people. Whether the guest is to be
    /// off at the site as well is told by [`super::PointMeta::was_running`].
    pub const AT_REST: &str = "at-rest";
    /// The version of the QEMU that saved the device state: text, `7.2.22`. Absent without memory, and where its agent did
    /// not tell yet.
    pub const QEMU_VERSION: &str = "qemu-version";
}

/// One address space of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Number by which the frames of this point name it. Across points an image is known by kind and name.
    pub no: u16,
    pub kind: ImageKind,
    pub name: String,
    pub bytes: u64,
    /// Complete in this point: a page that none of its frames holds is zero. Otherwise it is as in the point before.
    pub full: bool,
}

/// What the agent measured while it cut the point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointStats {
    /// From the guest's stop to its resume, microseconds; 0 where the guest did not run.
    pub pause_us: u64,
    pub memory_changed_bytes: u64,
    pub disk_changed_bytes: u64,
}

/// What a replica finds that is started from the point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The guest goes on where it stood: the point holds its memory and devices.
    Memory,
    /// The guest boots; its file systems were frozen when the disks were taken.
    App,
    /// The guest boots as after a power cut.
    Crash,
}

impl Consistency {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::App => "app",
            Self::Crash => "crash",
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the agent says of a point that it has sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointMeta {
    /// The instant of the point, by the source's clock.
    pub cut_at: UnixMs,
    pub images: Vec<Image>,
    pub consistency: Consistency,
    /// Whether the guest ran when it was cut; a guest that was paused is restored paused. Of one that was off: nobody had
    /// wanted that, so that its replica is to run.
    pub was_running: bool,
    pub stats: PointStats,
    /// The cut of a group that this point is one part of.
    pub cut: Option<CutId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviousRef {
    pub point: PointId,
    /// Digest of the previous manifest's whole file.
    pub manifest: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub vm: VmId,
    pub vm_name: String,
    pub generation: Generation,
    pub point: PointId,
    pub seq: Seq,
    pub previous: Option<PreviousRef>,
    pub committed_at: UnixMs,
    pub meta: PointMeta,
    pub packs: Vec<PackRef>,
    /// Bytes of frames as they came over the link.
    pub wire_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("manifest: {0}")]
    Header(#[from] HeaderError),
    #[error("manifest: its bytes do not match their digest")]
    Corrupt,
    #[error("manifest: {0}")]
    Malformed(String),
}

impl Manifest {
    /// The file's bytes and their digest, by which the next manifest names this one.
    pub fn encode(&self) -> Result<(Vec<u8>, Digest), ManifestError> {
        self.check()?;
        let body = postcard::to_stdvec(self).map_err(|error| ManifestError::Malformed(error.to_string()))?;
        let len = u32::try_from(body.len()).ok().filter(|len| *len <= BODY_MAX);
        let len = len.ok_or_else(|| ManifestError::Malformed("too large".into()))?;
        let header =
            FileHeader { kind: Kind::Manifest, version: 2, body_len: len, body_digest: Digest::of(&body) };
        let mut file = header.encode().to_vec();
        file.extend_from_slice(&body);
        let digest = Digest::of(&file);
        Ok((file, digest))
    }

    pub fn decode(file: &[u8]) -> Result<(Self, Digest), ManifestError> {
        let header = FileHeader::decode(file, Kind::Manifest, 1..=2)?;
        let body = &file[FileHeader::LEN..];
        if header.body_len > BODY_MAX
            || body.len() != header.body_len as usize
            || Digest::of(body) != header.body_digest
        {
            return Err(ManifestError::Corrupt);
        }
        let manifest = match header.version {
            1 => postcard::from_bytes::<v1::Manifest>(body).map(Self::from),
            _ => postcard::from_bytes(body),
        };
        let manifest = manifest.map_err(|error| ManifestError::Malformed(error.to_string()))?;
        manifest.check()?;
        Ok((manifest, Digest::of(file)))
    }

    /// Facts that later code relies on.
    fn check(&self) -> Result<(), ManifestError> {
        self.meta.check().map_err(|why| ManifestError::Malformed(why.into()))?;
        let first = self.previous.is_none();
        if first && self.meta.images.iter().any(|image| !image.full) {
            return Err(ManifestError::Malformed("a first point must hold every image in full".into()));
        }
        Ok(())
    }

    /// Of a guest that was off because somebody wanted it so: its replica is to be off, too.
    pub fn stays_off(&self) -> bool {
        self.image(ImageKind::Blob, blob::AT_REST).is_some()
            && !self.meta.was_running
            && !self.meta.has_memory()
    }

    pub fn image(&self, kind: ImageKind, name: &str) -> Option<&Image> {
        self.meta.images.iter().find(|image| image.kind == kind && image.name == name)
    }
}

impl PointMeta {
    /// Whether the point holds memory and device state, so that it is resumed and not booted.
    pub fn has_memory(&self) -> bool {
        self.consistency == Consistency::Memory
    }

    /// Refuses what no point can be: too many images, numbers or names twice, sizes nobody could address.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.images.is_empty() || self.images.len() > IMAGES_MAX {
            return Err("no images or too many");
        }
        for (at, image) in self.images.iter().enumerate() {
            if image.bytes > 1 << 60 {
                return Err("an image is larger than any disk");
            }
            if image.name.is_empty() || image.name.len() > 255 {
                return Err("an image has no name or one longer than 255 bytes");
            }
            if image.kind == ImageKind::Blob && !image.full {
                return Err("a blob must be stored in full");
            }
            let twin = |other: &&Image| {
                other.no == image.no || (other.kind == image.kind && other.name == image.name)
            };
            if self.images[..at].iter().any(|other| twin(&other)) {
                return Err("two images share a number or a name");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
