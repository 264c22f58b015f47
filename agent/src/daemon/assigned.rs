//! VMs that a group of the site has protected, and that agent.toml does not name: protected as the group says, for as long
//! as it says so. Promises: what it is no longer to protect is left with nothing of ours in it.

use super::{LOOK_AGAIN, Rooms, at_witness, keep_if_fenced, leave, protect};
use crate::{capture::memory::choose::MemoryMode, config::VmConfig};
use lifeboat::{
    id::VmId,
    wire::order::{Assignment, MemoryWish},
};
use std::{collections::BTreeMap, time::Duration};
use tokio::{sync::watch, task::JoinHandle};

/// One VM that is protected because a group says so.
struct Protected {
    memory: MemoryWish,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Whose a VM is.
#[derive(PartialEq)]
enum Whose {
    /// agent.toml names it: it is protected anyway, and its actor hears what the group wishes.
    Configured,
    Ours,
    /// libvirt does not know it, or can't be asked.
    Unknown,
}

/// Runs until the daemon stops.
pub async fn protect_assigned(rooms: Rooms) {
    let mut changes = rooms.assignments.changes();
    let mut stop = rooms.stop.clone();
    let mut protected = BTreeMap::<VmId, Protected>::new();
    loop {
        changes.mark_unchanged();
        let wanted = wanted(&rooms);
        for (vm, held) in std::mem::take(&mut protected) {
            match wanted.get(&vm) {
                // All else is taken up by the actor as it runs. That of a held guest is not disturbed.
                Some(wish)
                    if wish.as_ref().is_none_or(|wish| wish.memory == held.memory)
                        && !held.task.is_finished() =>
                {
                    protected.insert(vm, held);
                }
                wish => {
                    end(held).await;
                    if wish.is_none() {
                        part(&rooms, vm);
                    }
                }
            }
        }
        for (vm, wish) in &wanted {
            if !protected.contains_key(vm) && whose(&rooms, *vm).await == Whose::Ours {
                protected.insert(*vm, begin(&rooms, *vm, wish.as_ref()));
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    for held in protected.into_values() {
        let _ = held.task.await;
    }
}

/// What groups have, and guests that are held: nobody but their actors hears how that ends.
fn wanted(rooms: &Rooms) -> BTreeMap<VmId, Option<Assignment>> {
    let held = rooms.holds.vms().unwrap_or_default();
    let mut wanted: BTreeMap<_, _> = held.into_iter().map(|vm| (vm, None)).collect();
    wanted.extend(rooms.assignments.all().into_iter().map(|(vm, wish)| (vm, Some(wish))));
    wanted
}

/// It is protected no longer.
fn part(rooms: &Rooms, vm: VmId) {
    rooms.board.forget(vm);
    if let Err(error) = keep_if_fenced(rooms, vm, &vm.to_string()) {
        tracing::warn!(%vm, %error, "a VM that is no longer protected stays on the list that libvirt's hook reads");
    }
    at_witness::free(rooms, vm);
    tokio::spawn(leave(rooms.clone(), vm));
}

async fn whose(rooms: &Rooms, vm: VmId) -> Whose {
    let (hypervisor, id) = (rooms.hypervisor.clone(), vm.to_string());
    let domain = tokio::task::spawn_blocking(move || hypervisor.domain_by_uuid(vm)).await;
    let Ok(Ok(domain)) = domain else { return Whose::Unknown };
    let named = |listed: &VmConfig| listed.name == id || listed.name == domain.name();
    if rooms.config.vms.iter().any(named) { Whose::Configured } else { Whose::Ours }
}

fn begin(rooms: &Rooms, vm: VmId, wish: Option<&Assignment>) -> Protected {
    let mut config: VmConfig = rooms.config.for_assigned(&vm.to_string());
    let memory = wish.map_or(MemoryWish::Auto, |wish| wish.memory);
    if let Some(wish) = wish {
        config.interval = Duration::from_millis(wish.interval_ms);
        config.memory = match wish.memory {
            MemoryWish::Auto => MemoryMode::Auto,
            MemoryWish::On => MemoryMode::On,
            MemoryWish::Off => MemoryMode::Off,
        };
    }
    let (stop, stopped) = watch::channel(false);
    let mut rooms = rooms.clone();
    let daemon = std::mem::replace(&mut rooms.stop, stopped);
    let both = stop.clone();
    tokio::spawn(async move {
        let mut daemon = daemon;
        tokio::select! {
            _ = daemon.wait_for(|stop| *stop) => drop(both.send(true)),
            () = both.closed() => {}
        }
    });
    Protected { memory, stop, task: tokio::spawn(protect(rooms, config)) }
}

async fn end(held: Protected) {
    let _ = held.stop.send(true);
    if let Err(panic) = held.task.await {
        tracing::error!(%panic, "the protection of a VM died");
    }
}
