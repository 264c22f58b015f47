//! Views and marks against a real QEMU: goal first, then what the guest did around the cut, then what the site holds.

mod harm;
pub mod rig;
mod sparse;

use self::rig::{Given, MIB, Rig, all, image, point};
use super::DiskError;
use serde_json::json;

const TWO: [Given; 2] = [Given("vda", "raw", 8 * MIB), Given("sda", "qcow2", 8 * MIB)];

/// Goal: a point is one instant of all disks, in full first and then by what changed.
/// Method: raw and qcow2; write and discard before and after each cut; compare what the site would hold.
#[tokio::test]
async fn a_point_holds_every_disk_as_it_was_at_the_cut() {
    let rig = Rig::new(&TWO);
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    for id in ["vda", "sda"] {
        rig.guest(id, "write -P 1 0 1M");
        rig.guest(id, "write -z 5M 64k");
    }
    rig.cut(&mut disks, point(1), None);
    assert!(disks.images().iter().all(|image| image.full && image.bytes == 8 * MIB));
    for id in ["vda", "sda"] {
        rig.guest(id, "write -P 9 64k 4k");
        rig.guest(id, "write -P 9 4M 512");
        rig.guest(id, "discard 512k 64k");
    }
    let told = rig.read(&mut disks, &mut held).await;
    assert_eq!(told, 2 * MIB, "only what is allocated and not zero is told");
    rig::settle(&mut disks, point(1)).await;
    for held in &held {
        assert!(all(held, 0, MIB, 1) && all(held, MIB, 8 * MIB, 0));
    }

    rig.guest("sda", "write -P 7 6M 1M");
    rig.guest("sda", "discard 6M 512k");
    rig.cut(&mut disks, point(2), Some(point(1)));
    assert!(disks.images().iter().all(|image| !image.full));
    rig.guest("sda", "write -P 8 6M 1M");
    let told = rig.read(&mut disks, &mut held).await;
    assert_eq!(told, 2 * (4096 + 4096 + 65536) + MIB);
    rig::settle(&mut disks, point(2)).await;
    for held in &held {
        assert!(all(held, 64 << 10, 68 << 10, 9) && all(held, 4 * MIB, 4 * MIB + 512, 9));
        assert!(all(held, 512 << 10, 576 << 10, 0) && all(held, 576 << 10, MIB, 1));
    }
    assert!(
        all(&held[1], 6 * MIB, 6 * MIB + (512 << 10), 0) && all(&held[1], 6 * MIB + (512 << 10), 7 * MIB, 7)
    );

    rig.cut(&mut disks, point(3), Some(point(2)));
    assert_eq!(
        rig.read(&mut disks, &mut held).await,
        MIB,
        "what was written after a cut is owed by the next"
    );
    rig::settle(&mut disks, point(3)).await;
    assert!(all(&held[1], 6 * MIB, 7 * MIB, 8));
    disks.detach().await.unwrap();
    assert_eq!(rig.traces(), Vec::<String>::new());
}

/// Goal: nothing is forgotten by a point that failed. Method: give up at each step, repeat, and look for the write.
#[tokio::test]
async fn a_point_that_failed_at_any_step_is_owed_again() {
    let rig = Rig::new(&TWO);
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    rig.cut(&mut disks, point(1), None);
    rig.read(&mut disks, &mut held).await;
    rig::settle(&mut disks, point(1)).await;
    for step in 0..5u8 {
        let byte = 10 + step;
        rig.guest("vda", &format!("write -P {byte} {}k 4k", 64 * u32::from(step)));
        disks.recover(&[point(1)]).unwrap();
        disks.prepare(point(50 + step)).unwrap();
        if step >= 1 {
            rig.mark(&mut disks);
            rig.guest("vda", &format!("write -P {byte} {}k 4k", 1024 + 64 * u32::from(step)));
        }
        if step >= 2 {
            disks.open_views().await.unwrap();
        }
        if step >= 3 {
            assert!(disks.next().await.unwrap().is_some());
        }
        if step >= 4 {
            disks.close_views().await.unwrap();
        }
        disks.put_back().await.unwrap();
        disks.put_back().await.unwrap();
        assert_eq!(rig.bitmaps(), 2, "step {step}: one mark a disk is left");
    }
    rig.cut(&mut disks, point(2), Some(point(1)));
    assert!(disks.images().iter().all(|image| !image.full));
    assert_eq!(rig.read(&mut disks, &mut held).await, 9 * 4096);
    for step in 0..5u8 {
        let at = 65536 * u64::from(step);
        assert!(all(&held[0], at, at + 4096, 10 + step), "step {step}, before its cut");
        assert!(
            step == 0 || all(&held[0], MIB + at, MIB + at + 4096, 10 + step),
            "step {step}, after its cut"
        );
    }
}

/// Goal: a lost acknowledgement costs nothing: the site may hold the later point or the earlier one.
#[tokio::test]
async fn after_a_lost_acknowledgement_either_point_serves_as_the_basis() {
    for (basis, told) in [(1, 2 * 4096), (2, 4096)] {
        let rig = Rig::new(&TWO);
        let (mut disks, mut held) = (rig.disks(), Vec::new());
        rig.cut(&mut disks, point(1), None);
        rig.read(&mut disks, &mut held).await;
        rig::settle(&mut disks, point(1)).await;
        rig.guest("sda", "write -P 1 0 4k");
        rig.cut(&mut disks, point(2), Some(point(1)));
        rig.guest("sda", "write -P 2 64k 4k");
        rig.read(&mut disks, &mut held).await;
        drop(disks); // neither settled nor put back
        let mut disks = rig.disks();
        rig.cut(&mut disks, point(3), Some(point(basis)));
        assert!(disks.images().iter().all(|image| !image.full), "basis {basis}");
        assert_eq!(rig.read(&mut disks, &mut held).await, told, "basis {basis}");
    }
}

/// Goal: points under way cost no block, whichever of them the site turns out to hold. Method: two are under way and a
/// third is cut; then the agent goes on, comes back, or is another one, over each of them.
#[tokio::test]
async fn whichever_point_under_way_is_the_newest_its_successors_blocks_are_owed() {
    // What a point over each basis must tell, in pages: what was written since; and marks of points before it that stay.
    for (basis, told) in [(1, 4), (2, 3), (3, 2), (4, 1)] {
        for (restarted, cut_open) in [(false, false), (false, true), (true, false), (true, true)] {
            let rig = Rig::new(&TWO);
            let (mut disks, mut held) = (rig.disks(), Vec::new());
            rig.cut(&mut disks, point(1), None);
            rig.read(&mut disks, &mut held).await;
            rig::settle(&mut disks, point(1)).await;
            for no in 2..=4u8 {
                rig.guest("sda", &format!("write -P {no} {}k 4k", 64 * u32::from(no)));
                let over: Vec<_> = (1..no).map(point).collect();
                rig.cut_over(&mut disks, point(no), &over);
                assert!(disks.images().iter().all(|image| !image.full));
                assert_eq!(
                    rig.read(&mut disks, &mut held).await,
                    4096,
                    "only what changed since the last one"
                );
                if no < 4 || !cut_open {
                    disks.sent(point(no)).await.unwrap();
                }
            }
            assert_eq!(rig.bitmaps(), 2 * 4, "the marks of all of them are kept");
            rig.guest("sda", "write -P 9 1M 4k");
            if restarted {
                drop(disks);
                disks = rig.disks();
            } else if cut_open {
                disks.put_back().await.unwrap();
                disks.put_back().await.unwrap();
            }
            let lost = basis == 4 && cut_open && !restarted;
            rig.cut(&mut disks, point(5), Some(point(basis)));
            let full = disks.images().iter().filter(|image| image.full).count();
            assert_eq!(
                full,
                if lost { 2 } else { 0 },
                "over {basis}, restarted {restarted}, open {cut_open}"
            );
            let told_now = rig.read(&mut disks, &mut held).await;
            // Where an agent came back, marks that were before the basis can't be told from later ones: more is told.
            assert!(lost || told_now >= told * 4096, "{told_now} over {basis}");
            assert!(lost || restarted || told_now <= 4 * 4096, "{told_now} over {basis}");
            for no in 2..=4 {
                assert!(all(&held[1], 65536 * no, 65536 * no + 4096, no as u8));
            }
            assert!(all(&held[1], MIB, MIB + 4096, 9));
            rig::settle(&mut disks, point(5)).await;
            assert_eq!(rig.bitmaps(), 2, "one mark a disk is left");
        }
    }
}

/// Goal: a basis that our marks know nothing of, or a disk of another size, is never a delta.
#[tokio::test]
async fn a_disk_whose_marks_do_not_tell_goes_in_full() {
    let rig = Rig::new(&TWO);
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    rig.cut(&mut disks, point(1), None);
    rig.read(&mut disks, &mut held).await;
    rig::settle(&mut disks, point(1)).await;
    rig.qmp("block_resize", json!({ "node-name": "node-sda", "size": 9 * MIB + 512 }));
    rig.guest("sda", "write -P 5 9M 512");
    rig.cut(&mut disks, point(2), Some(point(1)));
    let images = disks.images();
    assert!(!images[0].full && images[1].full, "{images:?}");
    rig.read(&mut disks, &mut held).await;
    rig::settle(&mut disks, point(2)).await;
    assert_eq!(held[1].len() as u64, 9 * MIB + 4096, "a last page cut short is padded");
    assert!(all(&held[1], 9 * MIB, 9 * MIB + 512, 5) && all(&held[1], 9 * MIB + 512, 9 * MIB + 4096, 0));
    disks.recover(&[point(77)]).unwrap();
    assert!(disks.images().iter().all(|image| image.full));
    assert_eq!(rig.traces(), Vec::<String>::new());
}

/// Goal: an external snapshot between two points or within one never makes a wrong delta, nor moves the guest off its top.
#[tokio::test]
async fn an_external_snapshot_below_us_is_noticed() {
    let rig = Rig::new(&TWO);
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    rig.cut(&mut disks, point(1), None);
    let overlay = rig.dir.path().join("overlay");
    image("qcow2", &overlay, 8 * MIB);
    rig.qmp(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "top", "backing": null,
                "file": { "driver": "file", "filename": overlay } }),
    );
    rig.qmp("blockdev-snapshot", json!({ "node": "node-sda", "overlay": "top" }));
    rig.guest("sda", "write -P 3 0 4k");
    rig.read(&mut disks, &mut held).await;
    assert!(all(&held[1], 0, 4096, 0));
    rig::settle(&mut disks, point(1)).await;
    let devices = rig.qmp("query-block", json!({})).to_string();
    assert!(devices.contains("\"node-name\":\"top\""), "the guest writes to the new top: {devices}");
    rig.cut(&mut disks, point(2), Some(point(1)));
    assert!(disks.images()[1].full && !disks.images()[0].full);
    rig.read(&mut disks, &mut held).await;
    assert!(all(&held[1], 0, 4096, 3));
}

#[tokio::test]
async fn a_guest_without_disks_needs_nothing_from_qemu() {
    let rig = Rig::new(&[]);
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    rig.cut(&mut disks, point(1), None);
    assert_eq!(rig.read(&mut disks, &mut held).await, 0);
    rig::settle(&mut disks, point(1)).await;
    disks.detach().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_tracked_is_refused_with_the_reason() {
    let rig = Rig::new(&TWO);
    let target = super::DiskTarget { target: "vdz".into(), alias: "virtio-disk25".into() };
    let refused = rig.try_disks(&[target], rig.scratch()).err().unwrap();
    assert!(refused.is_permanent() && matches!(refused, DiskError::Untracked { .. }));
    assert!(refused.to_string().contains("virtio-disk25"), "{refused}");

    let rig = Rig::threaded(&TWO, ",iothread=io0");
    for target in &rig.targets {
        let refused = rig.try_disks(std::slice::from_ref(target), rig.scratch()).err().unwrap();
        assert!(refused.is_permanent() && refused.to_string().contains("iothread"), "{refused}");
    }
}
