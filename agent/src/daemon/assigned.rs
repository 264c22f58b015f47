//! VMs that a group of the site has protected, and that agent.toml does not name: protected as the group says, for as long
//! as it says so. Promises: what it is no longer to protect is left with nothing of ours in it.

use super::{Rooms, leave, protect};
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

/// Runs until the daemon stops.
pub async fn protect_assigned(rooms: Rooms) {
    let mut changes = rooms.assignments.changes();
    let mut stop = rooms.stop.clone();
    let mut protected = BTreeMap::<VmId, Protected>::new();
    loop {
        changes.mark_unchanged();
        let wanted = rooms.assignments.all();
        for (vm, held) in std::mem::take(&mut protected) {
            match wanted.get(&vm) {
                // All else is taken up by the actor as it runs.
                Some(wish) if wish.memory == held.memory && !held.task.is_finished() => {
                    protected.insert(vm, held);
                }
                wish => {
                    end(held).await;
                    if wish.is_none() && !is_configured(&rooms, vm) {
                        rooms.board.forget(vm);
                        tokio::spawn(leave(rooms.clone(), vm));
                    }
                }
            }
        }
        for (vm, wish) in &wanted {
            if !protected.contains_key(vm) && !is_configured(&rooms, *vm) {
                protected.insert(*vm, begin(&rooms, *vm, wish));
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    for held in protected.into_values() {
        let _ = held.task.await;
    }
}

/// Whether agent.toml names it: it is protected then anyway, and its actor hears what the group wishes.
fn is_configured(rooms: &Rooms, vm: VmId) -> bool {
    let named = |name: &str| rooms.neighbours.find(name).is_some_and(|neighbour| neighbour.vm() == vm);
    let id = vm.to_string();
    rooms.config.vms.iter().any(|configured| configured.name == id || named(&configured.name))
}

fn begin(rooms: &Rooms, vm: VmId, wish: &Assignment) -> Protected {
    let mut config: VmConfig = rooms.config.for_assigned(&vm.to_string());
    config.interval = Duration::from_millis(wish.interval_ms);
    config.memory = match wish.memory {
        MemoryWish::Auto => MemoryMode::Auto,
        MemoryWish::On => MemoryMode::On,
        MemoryWish::Off => MemoryMode::Off,
    };
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
    Protected { memory: wish.memory, stop, task: tokio::spawn(protect(rooms, config)) }
}

async fn end(held: Protected) {
    let _ = held.stop.send(true);
    if let Err(panic) = held.task.await {
        tracing::error!(%panic, "the protection of a VM died");
    }
}
