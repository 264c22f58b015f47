//! First do no harm: whatever happens to us, the guest's writes succeed.

use super::{
    TWO,
    rig::{self, MIB, Qmp, Rig, all, point},
};
use crate::capture::disk::DiskError;
use lifeboat::hypervisor::monitor::Monitor;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use std::{fs, path::PathBuf};

/// A small file system, gone when dropped.
struct SmallFs(PathBuf);

impl SmallFs {
    fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        mount(Some("none"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=2m")).unwrap();
        Self(path)
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Goal: a full scratch costs the point, never a write. Method: overwrite more than fits while the view is open.
#[tokio::test]
async fn a_full_scratch_breaks_the_view_and_not_the_guest() {
    let rig = Rig::new(&TWO);
    let small = SmallFs::new(rig.dir.path().join("small"));
    let mut disks = rig.disks_at(small.0.clone());
    let mut held = Vec::new();
    for id in ["vda", "sda"] {
        rig.guest(id, "write -P 1 0 8M");
    }
    rig.cut(&mut disks, point(1), None);
    disks.open_views().await.unwrap();
    for id in ["vda", "sda"] {
        rig.guest(id, "write -P 2 0 8M");
    }
    let error = loop {
        match disks.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a broken view was read to its end"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, DiskError::ScratchFull { .. }), "{error}");
    // Also where there is room again by the time we look, old data that was not kept is an error and not new data.
    disks.put_back().await.unwrap();
    rig.guest("vda", "read -P 2 0 8M");
    drop(disks);
    let mut disks = rig.disks();
    rig.cut(&mut disks, point(2), None);
    rig.read(&mut disks, &mut held).await;
    assert!(held.iter().all(|held| all(held, 0, 8 * MIB, 2)));
}

/// Goal: an agent killed at any step harms nobody (QEMU 7.2 would abort if an NBD client of a disk in an iothread hung
/// up), and the next one knows what is owed. Method: drop everything at each step, connections and monitor included.
#[tokio::test]
async fn an_agent_killed_at_any_step_leaves_a_guest_that_writes_and_marks_that_tell() {
    let rig = Rig::new(&TWO);
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    rig.cut(&mut disks, point(1), None);
    rig.read(&mut disks, &mut held).await;
    rig::settle(&mut disks, point(1)).await;
    drop(disks);
    for step in 0..4u8 {
        let at = 64 * u32::from(step);
        let mut disks = rig.disks();
        rig.guest("vda", &format!("write -P 7 {at}k 4k"));
        disks.recover(&[point(1)]).unwrap();
        disks.prepare(point(50 + step)).unwrap();
        if step >= 1 {
            rig.mark(&mut disks);
        }
        if step >= 2 {
            disks.open_views().await.unwrap();
        }
        if step >= 3 {
            assert!(disks.next().await.unwrap().is_some());
        }
        drop(disks);
        // The connections are closed by their tasks' end; a write after that shows whether QEMU took it well.
        tokio::task::yield_now().await;
        for id in ["vda", "sda"] {
            rig.guest(id, &format!("write -P 8 {}k 4k", 2048 + at));
        }
    }
    let mut disks = rig.disks();
    rig.cut(&mut disks, point(2), Some(point(1)));
    assert!(disks.images().iter().all(|image| !image.full));
    assert_eq!(rig.read(&mut disks, &mut held).await, (4 + 8) * 4096);
    disks.detach().await.unwrap();
    assert_eq!(rig.traces(), Vec::<String>::new());
}

/// Goal: a backup that uses QEMU's NBD server is left alone.
#[tokio::test]
async fn somebody_elses_nbd_server_is_never_stopped() {
    let rig = Rig::new(&TWO);
    let addr = json!({ "type": "unix", "data": { "path": rig.dir.path().join("backup.sock") } });
    rig.qmp("nbd-server-start", json!({ "addr": addr }));
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    rig.cut(&mut disks, point(1), None);
    let error = disks.open_views().await.unwrap_err();
    assert!(matches!(error, DiskError::Busy) && !error.is_permanent(), "{error}");
    disks.put_back().await.unwrap();
    disks.detach().await.unwrap();
    assert_eq!(rig.traces(), Vec::<String>::new());
    let again = rig.monitor.execute("nbd-server-start", json!({ "addr": addr }));
    assert!(again.unwrap_err().to_string().contains("already running"));
    rig.qmp("nbd-server-stop", json!({}));
    rig.cut(&mut disks, point(2), None);
    rig.read(&mut disks, &mut held).await;
}

/// Goal: a view that began while the guest ran is refused, because its disks are not of one instant.
#[tokio::test]
async fn views_begun_while_the_guest_runs_are_refused() {
    let rig = Rig::new(&TWO);
    let mut disks = rig.disks();
    disks.recover(&[]).unwrap();
    disks.prepare(point(1)).unwrap();
    rig.qmp("transaction", json!({ "actions": disks.mark_actions() }));
    disks.marked();
    assert!(matches!(disks.open_views().await, Err(DiskError::NotStopped)));
    disks.put_back().await.unwrap();
    assert_eq!(rig.traces(), Vec::<String>::new());
}

/// Goal: the monitor's own connection may end too (it is libvirt's). Method: a second one after the first was closed.
#[tokio::test]
async fn a_lost_monitor_connection_does_not_end_our_clients() {
    let mut rig = Rig::new(&TWO);
    let mut disks = rig.disks();
    rig.cut(&mut disks, point(1), None);
    disks.open_views().await.unwrap();
    drop(disks);
    rig.monitor = std::sync::Arc::new(Qmp::placeholder());
    rig.monitor = std::sync::Arc::new(Qmp::connect(&rig.dir.path().join("qmp")));
    rig.guest("vda", "write -P 1 0 4k");
    rig.disks().detach().await.unwrap();
    assert_eq!(rig.traces(), Vec::<String>::new());
}
