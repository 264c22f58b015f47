//! The script as libvirt calls it: every operation, every lease.

use super::*;
use crate::{
    fence::{decide::Lease, lease::Leases},
    protect::holds::{Hold, Holds},
    witness::{files::Files, hold::Until},
};
use lifeboat::{
    boot,
    id::{CutId, PointId, VmId},
    units::Generation,
};
use std::{
    io::Write,
    process::{Command, Stdio},
    time::Duration,
};

const VM: VmId = VmId::from_bytes([0xab; 16]);
const LIVES: [&str; 5] = ["started", "stopped", "release", "reconnect", "attach"];

struct World {
    dir: tempfile::TempDir,
    hook: Hook,
    leases: Leases,
    holds: Holds,
    run: PathBuf,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Quoting is part of what is tried.
        let (state, run) = (dir.path().join("it's state"), dir.path().join("run $HOME"));
        let leases = Leases::open(&state, &run).unwrap();
        let hook = Hook::new(&dir.path().join("hooks"), &state, &run);
        hook.install().unwrap();
        assert_eq!(hook.status().unwrap(), Installed::Yes);
        let holds = Holds::open(&state).unwrap();
        Self { dir, hook, leases, holds, run }
    }

    /// Whether libvirt may go on.
    fn lets(&self, operation: &str) -> bool {
        self.lets_of(operation, "")
    }

    /// The same of a domain with such metadata, as libvirt prints it.
    fn lets_of(&self, operation: &str, metadata: &str) -> bool {
        let mut child = Command::new(self.hook.file())
            .args(["web", operation, "begin", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let xml = format!(
            "<domain type='kvm'>\n  <name>web</name>\n  <uuid>{VM}</uuid>\n{metadata}  <memory unit='KiB'>1</memory>\n</domain>\n"
        );
        // It may end without having read it.
        let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
        let out = child.wait_with_output().unwrap();
        assert!(out.stdout.is_empty(), "it would replace the XML: {out:?}");
        let words = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.success(), words.is_empty(), "{operation}: {words}");
        let way = if self.holds.is_held(VM) { "resume-held" } else { "allow" };
        assert!(words.is_empty() || words.contains(&format!("lifeboat-agent {way} web")), "{words}");
        out.status.success()
    }
}

/// Goal: a protected VM is started with a lease only, and nothing else is ever refused.
#[test]
fn the_hook_refuses_to_start_a_protected_vm_without_a_lease_and_refuses_nothing_else() {
    let world = World::new();
    let starts = ["restore", "prepare", "start"];
    let pass = |world: &World, operations: &[&str]| operations.iter().all(|operation| world.lets(operation));
    let none_pass = |world: &World| starts.iter().all(|start| !world.lets(start));
    assert!(pass(&world, &starts) && pass(&world, &LIVES), "it is not protected");
    world.leases.protect(VM, "web").unwrap();
    assert!(!world.leases.start_was_refused(VM));
    assert!(none_pass(&world) && pass(&world, &LIVES), "there is no lease");
    assert!(world.leases.start_was_refused(VM));
    world.leases.grant(VM, None).unwrap();
    assert!(pass(&world, &starts) && pass(&world, &["migrate"]));
    world.leases.grant(VM, Some(Duration::from_secs(60))).unwrap();
    assert!(pass(&world, &starts));
    world.leases.grant(VM, Some(Duration::ZERO)).unwrap();
    assert!(none_pass(&world), "its time is over");
    world.leases.refuse(VM, Generation(2)).unwrap();
    assert!(none_pass(&world) && !world.lets("migrate") && pass(&world, &LIVES), "it was fenced");
    assert_eq!(world.leases.look(VM, None), Lease::Fenced);
    world.leases.unprotect(VM).unwrap();
    assert!(pass(&world, &starts));
}

/// Goal: what is held for a planned failover is not started by anybody, leases notwithstanding, until the hold is over.
#[test]
fn the_hook_refuses_to_start_a_held_vm_whatever_its_lease_says() {
    let world = World::new();
    world.leases.protect(VM, "web").unwrap();
    world.leases.grant(VM, None).unwrap();
    let hold = Hold { cut: CutId::from_bytes([1; 16]), ran: true, point: PointId::from_bytes([2; 16]) };
    world.holds.save(VM, &hold).unwrap();
    for start in ["restore", "prepare", "start", "migrate"] {
        assert!(!world.lets(start), "{start}");
    }
    assert!(LIVES.iter().all(|operation| world.lets(operation)));
    world.holds.remove(VM).unwrap();
    assert!(world.lets("start"));
}

/// Goal: a replica that a later failover put here starts without anybody's word, and no other copy does.
#[test]
fn a_fenced_vm_is_started_only_as_the_replica_of_a_later_failover() {
    let world = World::new();
    world.leases.protect(VM, "web").unwrap();
    let label = |no: &str| {
        let name = "xmlns:lifeboat=\"urn:lifeboat:replica:1\"";
        format!("  <metadata>\n    <lifeboat:replica {name} generation=\"{no}\"/>\n  </metadata>\n")
    };
    let starts = |metadata: &str| ["restore", "prepare", "start"].map(|start| world.lets_of(start, metadata));
    assert_eq!(starts(&label("4")), [false; 3], "nobody knows what came after it");
    world.leases.refuse(VM, Generation(2)).unwrap();
    for (no, lets) in [("4", true), ("3", true), ("2", false), ("1", false), ("", false), ("x", false)] {
        assert_eq!(starts(&label(no)), [lets; 3], "{no}");
    }
    let described = "  <description>&lt;lifeboat:replica generation=\"4\"/&gt;</description>\n";
    assert_eq!(starts(described), [false; 3]);
    world.leases.refuse(VM, Generation(10)).unwrap();
    assert_eq!((starts(&label("9")), starts(&label("11"))), ([false; 3], [true; 3]), "they are numbers");
    // Of an earlier release.
    fs::write(world.run.join("leases").join(VM.to_string()), "fenced\n").unwrap();
    assert_eq!(starts(&label("4")), [false; 3]);
}

/// Goal: a guest may come in while its agent is down, and nothing else slips in after it.
#[test]
fn a_migration_that_comes_in_needs_no_lease_and_opens_no_door_behind_it() {
    let world = World::new();
    world.leases.protect(VM, "web").unwrap();
    assert!(!world.lets("prepare"));
    assert!(world.lets("migrate") && world.lets("prepare") && world.lets("start"));
    assert!(!world.lets("restore"), "a saved image is not what comes in");
    assert!(world.lets("started") && !world.lets("prepare"));
    // One that was broken off before its end.
    assert!(world.lets("migrate") && world.lets("prepare") && world.lets("release") && !world.lets("start"));
    // One that was broken off before its beginning.
    assert!(world.lets("migrate"));
    let came = world.run.join("incoming").join(VM.to_string());
    let then: i64 = fs::read_to_string(&came).unwrap().trim().parse().unwrap();
    fs::write(&came, format!("{}\n", then - 61)).unwrap();
    assert!(!world.lets("prepare"), "that was a minute ago");
}

#[test]
fn a_hook_of_another_configuration_is_told_from_ours_and_removed_once() {
    let world = World::new();
    let other =
        Hook::new(world.hook.file().ancestors().nth(2).unwrap(), Path::new("/else"), Path::new("/run/x"));
    assert_eq!(other.status().unwrap(), Installed::Differs);
    other.install().unwrap();
    assert_eq!(world.hook.status().unwrap(), Installed::Differs);
    world.hook.remove().unwrap();
    world.hook.remove().unwrap();
    assert_eq!(world.hook.status().unwrap(), Installed::No);
}

/// Method: granted for good by the site; the second that has begun counts as over, and a time of another boot as past.
#[test]
fn a_bound_vm_starts_only_while_the_witness_or_the_site_has_confirmed_it() {
    let world = World::new();
    world.leases.protect(VM, "web").unwrap();
    world.leases.grant(VM, None).unwrap();
    assert!(world.lets("start"));
    let files = Files::open(&world.dir.path().join("it's state"), &world.run).unwrap();
    files.bind(VM).unwrap();
    assert!(!world.lets("start"), "until when is not known");
    let until = |ms: i64| Until { soft: boot::uptime_ms().saturating_add_signed(ms), hard: u64::MAX };
    files.allow(VM, until(60_000)).unwrap();
    assert!(world.lets("start") && files.until(VM).is_some());
    files.allow(VM, until(-1)).unwrap();
    assert!(!world.lets("start") && !world.lets("restore") && world.lets("reconnect"));
    let path = world.run.join("kept").join(VM.to_string());
    std::fs::write(path, format!("{} {} another-boot\n", u64::MAX >> 1, u64::MAX)).unwrap();
    assert!(!world.lets("start") && files.until(VM).is_none());
    files.unbind(VM).unwrap();
    assert!(world.lets("start"));
}
