//! What a dead agent left behind: guests that stand, frozen file systems, changed capabilities of QEMU. Called by the agent's
//! start, by `lifeboat-agent release-paused`, and by `server`.

use super::{
    Found, LibvirtRelease, Markers, Release, Released, WatchdogError, What,
    letting_go::{Pace, Task},
};
use lifeboat::id::VmId;
use std::{sync::Arc, time::Duration};

/// Puts back what a dead agent changed in guests' QEMUs, in `tries` tries each, `again` apart: while a migration runs
/// nothing can be changed. What a living agent has changed is left alone.
pub fn put_back_capabilities(releaser: &dyn Release, found: &Found, tries: u32, again: Duration) {
    for vm in found.list() {
        for _ in 0..tries {
            let noted = match found.left_over(vm) {
                Ok(Some(noted)) => noted,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%vm, %error, "what was found in its QEMU can't be read");
                    break;
                }
            };
            match releaser.put_back(vm, &noted) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => tracing::warn!(%vm, %error, "its QEMU's capabilities could not be put back"),
            }
            drop(noted);
            std::thread::sleep(again);
        }
    }
}

fn left_over(markers: &Markers) -> Vec<VmId> {
    markers.list().unwrap_or_else(|error| {
        tracing::warn!(%error, "the folder of pause markers can't be read");
        Vec::new()
    })
}

/// Resumes every guest whose marker a dead agent left behind, and thaws every one whose file systems it may have frozen.
/// Returns what was done for each; a marker stays where it did not work. For the agent's start, and for systemd's
/// `ExecStopPost=`. With `wait` it returns only when nothing that the dead agent had sent can be on its way; otherwise a
/// thread sees to that. Capabilities that a dead agent changed are put back as well.
pub fn release_paused(
    markers: &Markers,
    uri: &str,
    wait: bool,
) -> Vec<(VmId, Result<Released, WatchdogError>)> {
    let found = Found::new(markers.folder().to_owned());
    if !found.list().is_empty() {
        put_back_capabilities(&LibvirtRelease::new(uri.to_owned()), &found, 1, Duration::ZERO);
    }
    let (paused, frozen) = (left_over(markers), left_over(&markers.of(What::Freeze)));
    if paused.is_empty() && frozen.is_empty() {
        return Vec::new();
    }
    let releaser = Arc::new(LibvirtRelease::new(uri.to_owned()));
    let pace = if wait { Pace::short() } else { Pace::usual() };
    let task = |vm: VmId, what: What| {
        let markers = markers.of(what);
        let mark = markers.read(vm);
        Task::new(vm, releaser.clone(), markers, mark, pace)
    };
    let tasks: Vec<(VmId, Task)> = paused.into_iter().map(|vm| (vm, task(vm, What::Pause))).collect();
    let mut done: Vec<_> = tasks.iter().map(|(vm, task)| (*vm, task.release_once())).collect();
    // A guest's agent may take its time: on threads of their own, after the pauses, as none thaws that stands.
    let frozen: Vec<(VmId, Task)> = frozen.into_iter().map(|vm| (vm, task(vm, What::Freeze))).collect();
    if wait {
        let thaw = |(vm, task): &(VmId, Task)| (*vm, task.release_once());
        done.extend(std::thread::scope(|scope| {
            let thawing: Vec<_> = frozen.iter().map(|frozen| scope.spawn(|| thaw(frozen))).collect();
            thawing.into_iter().filter_map(|thread| thread.join().ok()).collect::<Vec<_>>()
        }));
    } else {
        for (_, task) in frozen {
            std::thread::spawn(move || task.see_to_it());
        }
    }
    let lingering: Vec<_> =
        tasks.into_iter().map(|(_, task)| std::thread::spawn(move || task.linger())).collect();
    if wait {
        // Each ends by itself; one that panicked has nothing more to say.
        lingering.into_iter().for_each(|thread| drop(thread.join()));
    }
    done
}
