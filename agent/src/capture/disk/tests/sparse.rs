//! Disks of which little is in use: what is empty is not read, and never taken for empty because the guest emptied it since.

use super::rig::{self, Given, MIB, Rig, all, point};
use lifeboat::page::{Content, PAGE};

const GIB: u64 = 1024 * MIB;
const FORMATS: [(&str, &str); 2] = [("vda", "raw"), ("sda", "qcow2")];

fn disks_of(bytes: u64) -> [Given; 2] {
    FORMATS.map(|(id, format)| Given(id, format, bytes))
}

/// Goal: what the guest throws away after the cut is told as it was at the cut, though QEMU says by then that it is zero.
/// Method: every pattern of kept and untouched clusters that QEMU 7.2 is known to mix up, in a first point and in a later
/// one that is asked for stretches of changed blocks.
#[tokio::test]
async fn what_is_emptied_after_the_cut_is_told_as_it_was() {
    let rig = Rig::new(&disks_of(96 * MIB));
    let (mut disks, mut held) = (rig.disks(), Vec::new());
    for (round, basis) in [(1, None), (2, Some(point(1)))] {
        for (id, _) in FORMATS {
            rig.guest(id, &format!("write -P {round} 0 64M"));
            rig.guest(id, "write -z -u 40M 16M");
        }
        rig.cut(&mut disks, point(round), basis);
        assert!(disks.images().iter().all(|image| image.full == basis.is_none()));
        for (id, _) in FORMATS {
            // Kept at both ends of an untouched stretch, at its beginning, at its end, all of it, and parts of clusters.
            for emptied in ["0 64k", "192k 64k", "1M 128k", "3M 64k", "8M 4M", "20484k 8k", "64000k 64k"] {
                rig.guest(id, &format!("discard {emptied}"));
            }
            rig.guest(id, "write -z -u 30M 1M");
            rig.guest(id, "write -P 77 48M 1M");
        }
        let told = rig.read(&mut disks, &mut held).await;
        rig::settle(&mut disks, point(round)).await;
        for held in &held {
            assert!(all(held, 0, 40 * MIB, round) && all(held, 40 * MIB, 56 * MIB, 0));
            assert!(all(held, 56 * MIB, 64 * MIB, round) && all(held, 64 * MIB, 96 * MIB, 0));
        }
        let changed = if basis.is_some() { 64 } else { 48 };
        assert_eq!(told, 2 * changed * MIB, "zeros count where they are a change");
    }
    disks.detach().await.unwrap();
    assert_eq!(rig.traces(), Vec::<String>::new());
}

/// Goal: a disk costs what is in it, not what it could hold; also when all of it is emptied at once, as who makes a file
/// system does. Method: two disks of a tebibyte; what is told of them, in full and as changes, within a test's patience.
#[tokio::test]
async fn a_disk_of_a_tebibyte_costs_what_is_in_it() {
    let rig = Rig::new(&disks_of(1024 * GIB));
    let mut disks = rig.disks();
    for (id, _) in FORMATS {
        for gib in [0, 511, 1023] {
            rig.guest(id, &format!("write -P 5 {gib}G 3M"));
        }
    }
    rig.cut(&mut disks, point(1), None);
    for (id, _) in FORMATS {
        rig.guest(id, "discard 511G 1G");
    }
    disks.open_views().await.unwrap();
    let mut told = [0; 2];
    while let Some((index, runs, content)) = disks.next().await.unwrap() {
        let Content::Bytes(bytes) = content else { panic!("zeros in a full view: {runs:?}") };
        assert!(bytes.iter().all(|byte| *byte == 5));
        told[index] += bytes.len() as u64;
    }
    assert_eq!(told, [9 * MIB; 2]);
    disks.close_views().await.unwrap();
    rig::settle(&mut disks, point(1)).await;

    for (id, _) in FORMATS {
        for gib in (0..1024).step_by(2) {
            rig.guest(id, &format!("discard {gib}G 1G"));
        }
        rig.guest(id, "write -P 6 700G 1M");
    }
    rig.cut(&mut disks, point(2), Some(point(1)));
    assert!(disks.images().iter().all(|image| !image.full));
    disks.open_views().await.unwrap();
    let (mut written, mut emptied) = ([0; 2], [0; 2]);
    while let Some((index, runs, content)) = disks.next().await.unwrap() {
        match content {
            Content::Bytes(bytes) => {
                assert!(bytes.iter().all(|byte| *byte == 6));
                written[index] += bytes.len() as u64;
            }
            Content::Zero => {
                emptied[index] += runs.iter().map(|run| u64::from(run.count) * PAGE as u64).sum::<u64>();
            }
        }
    }
    assert_eq!((written, emptied), ([MIB; 2], [513 * GIB - MIB; 2]));
    disks.close_views().await.unwrap();
    rig::settle(&mut disks, point(2)).await;
}
