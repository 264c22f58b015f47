//! Names of what we create in QEMU: a fixed prefix tells ours from everybody else's, the rest what it stands for.
//! Promises: valid as node names (31 bytes at the most) and as ids; a mark's name can be read back. No I/O.

use lifeboat::id::{PointId, VmId};
use xxhash_rust::xxh3::xxh3_64;

/// Every node, export, bitmap and fd of ours begins with this, and nobody else's does.
pub(super) const PREFIX: &str = "lifeboat-";
/// Filters that keep old data for a view.
pub(super) const FILTER: &str = "lifeboat-cbw-";
/// An empty node that exists while the NBD server is ours, so that a restarted agent knows whose it is.
pub(super) const SERVER_MARK: &str = "lifeboat-nbd-server";
/// The listening socket on its way into QEMU.
pub(super) const LISTENER: &str = "lifeboat-nbd-listener";

/// The nodes and the export of one disk at one point.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub filter: String,
    pub scratch: String,
    pub access: String,
    pub export: String,
}

impl Names {
    pub fn of(vm: VmId, target: &str, point: PointId) -> Self {
        let hash = xxh3_64(&[vm.as_bytes(), point.as_bytes(), target.as_bytes()].concat());
        Self {
            filter: format!("{FILTER}{hash:016x}"),
            scratch: format!("{PREFIX}buf-{hash:016x}"),
            access: format!("{PREFIX}pit-{hash:016x}"),
            export: format!("{PREFIX}exp-{hash:016x}"),
        }
    }
}

/// What a dirty bitmap of ours stands for: everything written since `point`, to a disk that had `bytes` bytes then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub point: PointId,
    pub bytes: u64,
}

impl Mark {
    pub fn name(&self) -> String {
        format!("{PREFIX}{}-{}", self.point, self.bytes)
    }

    pub fn parse(name: &str) -> Option<Self> {
        let (point, bytes) = name.strip_prefix(PREFIX)?.rsplit_once('-')?;
        Some(Self { point: point.parse().ok()?, bytes: bytes.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_qemu_and_a_mark_can_be_read_back() {
        let (vm, point) = (VmId::from_bytes([7; 16]), PointId::from_bytes([9; 16]));
        let names = Names::of(vm, "a-very-long-target-name-of-a-disk", point);
        for name in [&names.filter, &names.scratch, &names.access, &names.export] {
            assert!(name.len() <= 31 && name.starts_with(PREFIX), "{name}");
        }
        assert_ne!(names.filter, Names::of(vm, "vdb", point).filter);
        let mark = Mark { point, bytes: u64::MAX };
        assert_eq!(Mark::parse(&mark.name()), Some(mark));
        for foreign in ["lifeboat-", "lifeboat-x-1", "backup-1", SERVER_MARK, &names.filter] {
            assert_eq!(Mark::parse(foreign), None, "{foreign}");
        }
    }
}
