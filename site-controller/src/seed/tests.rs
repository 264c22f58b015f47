//! Goal: a seed is the disks that lie here, to the byte, and costs what differs. Method: real images, read by Debian's
//! qemu-nbd, into a store on a disk; what the store then restores is compared with what was written.

use super::{
    Order, SeedError, Seeder,
    disks::{self, DiskFile, DiskFormat},
    locks::Hold,
};
use crate::{
    catalog::{CatalogError, Selector, select},
    intake::slot::Slots,
    restore::{Plan, Reader},
    store::{LocalObjects, Objects, PointSummary, Store, testing},
};
use lifeboat::{
    format::manifest::ImageKind, hypervisor::domain_xml::DomainSpec, nbd::Client, page::PAGE, units::ByteSize,
};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};
use tempfile::TempDir;
use tokio::net::UnixStream;

struct World {
    dir: TempDir,
    store: Store,
    slots: Slots,
    seeder: Seeder,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let objects = LocalObjects::open(&dir.path().join("store"), ByteSize(0)).await.unwrap();
        let (store, _) = testing::open(Arc::new(objects) as Arc<dyn Objects>).await.unwrap();
        let (run_dir, scratch_dir) = (dir.path().to_path_buf(), dir.path().to_path_buf());
        let seeder = Seeder { store: store.clone(), here: None, run_dir, scratch_dir };
        Self { slots: Slots::new(store.clone()), dir, store, seeder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn seed(&self, disks: &[DiskFile]) -> Result<super::SeedReport, SeedError> {
        let (vm, name) = (testing::VM, "web".to_owned());
        let order = Order { vm, name, disks: disks.to_vec(), definition: None };
        self.seeder.seed(&self.slots, &order, |_| ()).await
    }

    /// What the newest point holds of an image.
    async fn held(&self, kind: ImageKind, name: &str) -> Vec<u8> {
        let head = self.store.latest(testing::VM).await.unwrap();
        let plan = Plan::of(&self.store, testing::VM, head.seq).await.unwrap();
        let reader = Reader::new(self.store.objects().clone(), Arc::new(plan));
        reader.read_whole(kind, name, 1 << 30).await.unwrap()
    }

    async fn points(&self) -> Vec<PointSummary> {
        self.store.points(Some(testing::VM)).await.unwrap()
    }
}

fn disk(target: &str, path: &Path, format: DiskFormat) -> DiskFile {
    DiskFile { target: target.into(), path: path.to_path_buf(), format }
}

fn qemu_img(words: &[&str], files: &[&Path]) {
    let out = Command::new("qemu-img").args(words).args(files).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// 5 MiB and a bit of noise, with holes.
fn content(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; (5 << 20) + 3 * 512];
    let mut rng = StdRng::seed_from_u64(seed);
    for (at, page) in bytes.chunks_mut(PAGE).enumerate() {
        if at % 7 != 3 && !(300..900).contains(&at) {
            rng.fill_bytes(page);
        }
    }
    bytes
}

/// A process that holds an image open for writing.
async fn writer(path: &Path, socket: &Path) -> Child {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--format", "raw", "--socket"]).arg(socket).arg(path);
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    let stream = loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => break stream,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    // It listens before it has opened the image.
    Client::open(stream, "", &[]).await.unwrap();
    child
}

#[tokio::test]
async fn a_seed_is_the_disks_that_lie_here_and_the_next_one_carries_what_changed() {
    let world = World::new().await;
    let (raw, qcow2) = (world.path("vda.raw"), world.path("vdb.qcow2"));
    let mut bytes = content(1);
    fs::write(&raw, &bytes).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c"], &[&raw, &qcow2]);
    let disks = [disk("vda", &raw, DiskFormat::Raw), disk("vdb", &qcow2, DiskFormat::Qcow2)];
    let before = fs::read(&qcow2).unwrap();
    let first = world.seed(&disks).await.unwrap();
    assert_eq!((first.over, first.seq.0), (None, 1));
    for target in ["vda", "vdb"] {
        assert!(world.held(ImageKind::Disk, target).await == bytes, "{target} is another");
    }
    assert!(fs::read(&raw).unwrap() == bytes && fs::read(&qcow2).unwrap() == before, "files are only read");

    // Three pages become others, one of them zero, one that was a hole.
    let file = fs::OpenOptions::new().write(true).open(&raw).unwrap();
    for (page, byte) in [(1usize, 0xee), (2, 0), (500, 0xdd)] {
        bytes[page * PAGE..(page + 1) * PAGE].fill(byte);
        file.write_all_at(&vec![byte; PAGE], (page * PAGE) as u64).unwrap();
    }
    let second = world.seed(&disks).await.unwrap();
    assert_eq!(second.over, Some(first.point));
    let changed: Vec<u64> = second.disks.iter().map(|disk| disk.changed_bytes / PAGE as u64).collect();
    assert_eq!(changed, [3, 0]);
    assert!(world.held(ImageKind::Disk, "vda").await == bytes);
    assert!(world.held(ImageKind::Disk, "vdb").await == content(1));
    let stored: Vec<u64> = world.points().await.iter().map(|point| point.wire_bytes).collect();
    assert!(stored[1] < stored[0] / 20, "{stored:?}");
}

/// The agent that goes on with it compares its memory with what the point before had.
#[tokio::test]
async fn a_seed_over_an_agents_points_carries_their_memory_along_and_is_not_taken_for_one_of_them() {
    let world = World::new().await;
    let mut guest = testing::Guest::new(3);
    let cut = guest.cut(None);
    testing::commit(&world.store, &guest, &cut).await.unwrap();
    let ram = world.held(ImageKind::Ram, "pc.ram").await;
    let raw = world.path("vda.raw");
    fs::write(&raw, vec![7; 33 * PAGE + 512]).unwrap();
    let report = world.seed(&[disk("vda", &raw, DiskFormat::Raw)]).await.unwrap();
    assert_eq!(report.over, Some(cut.point));
    assert!(world.held(ImageKind::Ram, "pc.ram").await == ram);
    assert!(world.held(ImageKind::Disk, "vda").await == vec![7; 33 * PAGE + 512]);
    let points = world.points().await;
    assert!(points[1].seed && !points[1].has_memory && !points[0].seed);
    let now = lifeboat::units::UnixMs(u64::MAX);
    let found =
        async |given: &str| select(&world.store, testing::VM, &Selector::parse(given, now).unwrap()).await;
    assert!(matches!(found("latest").await, Err(CatalogError::NewestIsSeed { .. })));
    assert_eq!(found(&report.point.to_string()).await.unwrap().point, report.point);
    assert_eq!(found("1s ago").await.unwrap().point, cut.point);
    // A disk of the VM that is left out would be of another instant.
    let other = world.path("vdz.raw");
    fs::write(&other, vec![1; PAGE]).unwrap();
    let refused = world.seed(&[disk("vdz", &other, DiskFormat::Raw)]).await.unwrap_err();
    assert!(refused.to_string().contains("disk vda"), "{refused}");
}

#[tokio::test]
async fn an_image_that_a_qemu_writes_to_is_no_seed_and_none_writes_to_one_that_is_read() {
    let world = World::new().await;
    let raw = world.path("vda.raw");
    fs::write(&raw, vec![1; 1 << 20]).unwrap();
    let mut busy = writer(&raw, &world.path("w")).await;
    let refused = world.seed(&[disk("vda", &raw, DiskFormat::Raw)]).await.unwrap_err();
    assert!(refused.to_string().contains("open for writing"), "{refused}");
    busy.kill().unwrap();
    busy.wait().unwrap();
    assert!(world.points().await.is_empty() && !world.store.is_receiving());
    let hold = Hold::on(&raw).unwrap().expect("a file can be locked");
    let write = || {
        let out = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k"]).arg(&raw).output().unwrap();
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    assert!(write().contains("lock"), "{}", write());
    drop(hold);
    assert_eq!(write(), "");
    world.seed(&[disk("vda", &raw, DiskFormat::Raw)]).await.unwrap();
}

#[tokio::test]
async fn what_can_not_be_read_is_named_and_leaves_nothing() {
    let world = World::new().await;
    let broken = world.path("vda.qcow2");
    fs::write(&broken, b"no qcow2").unwrap();
    let missing = world.path("gone.raw");
    for (path, format, why) in
        [(&broken, DiskFormat::Qcow2, "not in qcow2 format"), (&missing, DiskFormat::Raw, "No such file")]
    {
        let refused = world.seed(&[disk("vda", path, format)]).await.unwrap_err().to_string();
        assert!(refused.contains("disk vda") && refused.contains(&*path.to_string_lossy()), "{refused}");
        assert!(refused.contains(why), "{refused}");
    }
    assert!(world.points().await.is_empty() && !world.store.is_receiving());
    // The VM is free again.
    drop(world.slots.reserve(testing::VM, "a test").await.unwrap());
}

#[test]
fn a_format_is_told_by_name_and_never_by_what_a_guest_wrote() {
    let parsed = |given: &str| DiskFile::parse(given).map(|disk| (disk.target, disk.format));
    assert_eq!(parsed("vda=/a/b.raw"), Ok(("vda".into(), DiskFormat::Raw)));
    assert_eq!(parsed("vda=/a/b"), Ok(("vda".into(), DiskFormat::Raw)));
    assert_eq!(parsed("vdb=/a/b.qcow2"), Ok(("vdb".into(), DiskFormat::Qcow2)));
    assert_eq!(parsed("vdb=qcow2:/dev/vg/b"), Ok(("vdb".into(), DiskFormat::Qcow2)));
    for given in ["vda", "=/a", "vda=b.raw", "v/a=/b", "vda=raw:b", "vda="] {
        assert!(parsed(given).is_err(), "{given}");
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["vdb.qcow2", "vda.raw", "notes.txt", "domain.xml"] {
        fs::write(dir.path().join(name), b"QFI\xfb").unwrap();
    }
    let found = disks::in_folder(dir.path()).unwrap();
    let found: Vec<_> = found.iter().map(|disk| (disk.target.as_str(), disk.format)).collect();
    assert_eq!(found, [("vda", DiskFormat::Raw), ("vdb", DiskFormat::Qcow2)]);
}

#[test]
fn disks_of_a_domain_are_those_it_writes_to_where_they_are_files() {
    let domain = |disks: &str| {
        let xml = format!(
            "<domain type='kvm'><name>web</name><uuid>{}</uuid><memory>1024</memory><devices>{disks}</devices></domain>",
            testing::VM
        );
        disks::of_domain(&DomainSpec::read(&xml).unwrap())
    };
    let disk = |kind: &str, source: &str, more: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source {source}/>\
             <target dev='vda'/>{more}</disk>"
        )
    };
    let found =
        domain(&(disk("qcow2", "file='/x/a'", "") + &disk("raw", "file='/cd'", "<readonly/>"))).unwrap();
    assert_eq!(found, [DiskFile { target: "vda".into(), path: "/x/a".into(), format: DiskFormat::Qcow2 }]);
    for (kind, source) in [("vmdk", "file='/x/a'"), ("raw", "protocol='rbd' name='pool/a'")] {
        assert!(domain(&disk(kind, source, "")).is_err(), "{kind} {source}");
    }
}
