//! Wires the witness, where one is configured: who asks it, which VMs are kept, and which are to be freed.

use super::Rooms;
use crate::{
    config::AgentConfig,
    protect::neighbour::Neighbour,
    witness::{
        files::Files,
        keeping::{Given, Keeping},
    },
};
use anyhow::{Context, ensure};
use lifeboat::{
    id::VmId,
    witness::{Witness, config::WitnessConfig, etcd::Etcd},
};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// What all VMs share.
#[derive(Clone)]
pub struct AtWitness {
    witness: Arc<dyn Witness>,
    me: String,
    config: WitnessConfig,
    files: Files,
}

/// `me` is this agent's name.
pub fn open(config: &AgentConfig, me: &str) -> anyhow::Result<Option<AtWitness>> {
    let files =
        Files::open(&config.state_dir, &config.run_dir).context("opening what binds VMs to a witness")?;
    let Some(witness) = &config.witness else {
        let bound = files.all_bound()?;
        ensure!(
            bound.is_empty(),
            "VMs are bound to a witness, and agent.toml has none: the site may fail them over. Write `[witness]` as it was, with \
             `keep = false`, until the log says that they are freed"
        );
        return Ok(None);
    };
    let etcd = Etcd::new(witness).context("the witness")?;
    Ok(Some(AtWitness { witness: Arc::new(etcd), me: me.to_owned(), config: witness.clone(), files }))
}

/// Keeps a VM that is protected here. The task is to be waited for.
pub fn keep(rooms: &Rooms, vm: VmId, neighbour: &Arc<Neighbour>) -> (Option<Arc<Keeping>>, JoinHandle<()>) {
    let Some(at) = &rooms.witness else { return (None, tokio::spawn(async {})) };
    let keeping = Arc::new(Keeping::open(vm, at.files.clone(), at.config.keep));
    let task = keeping.clone().run(given(rooms, at, vm, neighbour.clone()), rooms.stop.clone());
    (Some(keeping), tokio::spawn(task))
}

/// Of those that are bound and not protected any more.
pub fn free_others(rooms: &Rooms, protected: &[&str]) -> anyhow::Result<()> {
    let Some(at) = &rooms.witness else { return Ok(()) };
    for vm in at.files.all_bound()? {
        let named =
            rooms.hypervisor.domain_by_uuid(vm).map(|domain| domain.name().to_owned()).unwrap_or_default();
        if !protected.iter().any(|known| *known == named || *known == vm.to_string()) {
            free(rooms, vm);
        }
    }
    Ok(())
}

/// Has the witness say that the VM is not kept any more.
pub fn free(rooms: &Rooms, vm: VmId) {
    let Some(at) = &rooms.witness else { return };
    let keeping = Arc::new(Keeping::open(vm, at.files.clone(), false));
    let neighbour = Arc::new(Neighbour::open(vm, None));
    tokio::spawn(keeping.free(given(rooms, at, vm, neighbour), rooms.stop.clone()));
}

fn given(rooms: &Rooms, at: &AtWitness, vm: VmId, neighbour: Arc<Neighbour>) -> Given {
    let generations = rooms.generations.clone();
    Given {
        witness: at.witness.clone(),
        me: at.me.clone(),
        ttl: at.config.lease,
        neighbour,
        routes: rooms.routes.clone(),
        generation: Box::new(move || generations.load(vm).ok().flatten()),
    }
}
