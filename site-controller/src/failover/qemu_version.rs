//! Whether a host's QEMU takes a replica's memory and devices. QEMU promises that, within a machine type, of the version that
//! saved them and of later ones (its docs/devel/migration: forward compatibility); an earlier one may, and often does. So it is
//! told, and stands in no failover's way. Blocking (libvirt). Called by `placing`, `readiness` and `drill`.

use crate::restore::Reader;
use lifeboat::{
    format::manifest::{ImageKind, blob},
    hypervisor::{
        libvirt::{Hypervisor, Machine},
        version::QemuVersion,
    },
};

/// Bytes of a version's text at the most.
const VERSION_MAX: u64 = 64;

/// Who saved what a replica goes on from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SavedBy {
    /// It boots from its disks.
    #[default]
    Nobody,
    /// The point does not tell.
    Unknown,
    Qemu(QemuVersion),
}

/// What is known of a host and a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Takes {
    Yes,
    /// The host's QEMU is of an earlier series.
    May {
        saved: QemuVersion,
        here: QemuVersion,
    },
    /// Why they were not compared.
    Unknown(String),
}

impl SavedBy {
    /// Of a point. One that tells anything but a version tells nothing; nor does one that can't be read, which whoever
    /// reads its memory will say.
    pub async fn of(reader: &Reader) -> Self {
        let has = |name| reader.plan().image(ImageKind::Blob, name).is_some();
        if !has(blob::DEVICE_STATE) {
            return Self::Nobody;
        }
        if !has(blob::QEMU_VERSION) {
            return Self::Unknown;
        }
        let told = reader.read_whole(ImageKind::Blob, blob::QEMU_VERSION, VERSION_MAX).await;
        let version = told.ok().and_then(|told| std::str::from_utf8(&told).ok()?.parse().ok());
        version.map_or(Self::Unknown, Self::Qemu)
    }
}

impl Takes {
    /// `machine` is the replica's.
    pub fn of(hypervisor: &Hypervisor, machine: &Machine, saved_by: SavedBy) -> Self {
        let unknown = |why: String| Self::Unknown(why);
        match saved_by {
            SavedBy::Nobody => Self::Yes,
            SavedBy::Unknown => {
                unknown("its newest point does not tell it; install the newest version of the agent".into())
            }
            SavedBy::Qemu(saved) => match hypervisor.qemu_version(machine) {
                Ok(Some(here)) => Self::judged(saved, here),
                Ok(None) => unknown(
                    "libvirt tells that of a host's ordinary QEMU only, and its <emulator> is another".into(),
                ),
                Err(error) => unknown(error.to_string()),
            },
        }
    }

    fn judged(saved: QemuVersion, here: QemuVersion) -> Self {
        if here.is_before(saved) { Self::May { saved, here } } else { Self::Yes }
    }

    pub fn is_doubtful(&self) -> bool {
        matches!(self, Self::May { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        restore::Plan,
        store::{
            sim::SimDisk,
            testing::{self, Cut, Guest},
        },
    };
    use lifeboat::{
        format::{frame::Frame, manifest::Image},
        page::{Content, PAGE, PageGroup, PageRun},
    };
    use std::sync::Arc;

    fn add(cut: &mut Cut, no: u16, name: &str, bytes: &[u8]) {
        let (kind, full) = (ImageKind::Blob, true);
        cut.meta.images.push(Image { no, kind, name: name.into(), bytes: bytes.len() as u64, full });
        let mut page = bytes.to_vec();
        page.resize(PAGE, 0);
        let (runs, content) = (vec![PageRun::new(0, 1)], Content::Bytes(page.into()));
        let group = PageGroup { image: no, runs, content };
        cut.frames.push(Frame::seal(cut.frames.len() as u32, &group, 1).unwrap());
    }

    #[tokio::test]
    async fn a_point_with_memory_tells_who_saved_it_and_what_is_no_version_tells_nothing() {
        let (state, version) = (blob::DEVICE_STATE, blob::QEMU_VERSION);
        let long = "7".repeat(65);
        let cases: [(&[(&str, &str)], SavedBy); 6] = [
            (&[], SavedBy::Nobody),
            (&[(version, "7.2.22")], SavedBy::Nobody),
            (&[(state, "QEVM")], SavedBy::Unknown),
            (&[(state, "QEVM"), (version, "7.2.22")], SavedBy::Qemu(QemuVersion::new(7, 2, 22))),
            (&[(state, "QEVM"), (version, "newest")], SavedBy::Unknown),
            (&[(state, "QEVM"), (version, &long)], SavedBy::Unknown),
        ];
        for (seed, (blobs, expected)) in cases.into_iter().enumerate() {
            let (store, _) = testing::open(Arc::new(SimDisk::new(seed as u64))).await.unwrap();
            let mut guest = Guest::new(seed as u64);
            let mut cut = guest.cut(None);
            for (at, (name, text)) in blobs.iter().enumerate() {
                add(&mut cut, 20 + at as u16, name, text.as_bytes());
            }
            let seq = testing::commit(&store, &guest, &cut).await.unwrap().seq;
            let plan = Plan::of(&store, testing::VM, seq).await.unwrap();
            let reader = Reader::new(store.objects().clone(), Arc::new(plan));
            assert_eq!(SavedBy::of(&reader).await, expected, "{blobs:?}");
        }
    }

    #[test]
    fn an_earlier_series_than_the_source_s_may_refuse_and_any_other_takes_it() {
        let version = QemuVersion::new;
        let of = |here| Takes::judged(version(8, 2, 1), here);
        assert_eq!(of(version(8, 2, 0)), Takes::Yes, "fixes of one series go both ways");
        assert_eq!(of(version(8, 2, 9)), Takes::Yes);
        assert_eq!(of(version(10, 0, 0)), Takes::Yes);
        for here in [version(8, 1, 9), version(7, 2, 22)] {
            assert_eq!(of(here), Takes::May { saved: version(8, 2, 1), here });
        }
    }
}
