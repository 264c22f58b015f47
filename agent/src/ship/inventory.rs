//! Which VMs this host has: told to the site, whose groups may have them protected, and again whenever that changes.
//! Promises: at most [`VMS_MAX`] are told, those that run first. Called by `uplink`.

use lifeboat::{
    hypervisor::libvirt::Hypervisor,
    wire::{message::AgentMessage, order::Offered},
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::sync::{broadcast::error::RecvError, mpsc};

/// What a site takes of one host.
pub const VMS_MAX: usize = 1000;
/// libvirt's events tell of changes; some may be missed.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// What changes at once is told at once.
const SETTLE: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub struct Inventory {
    pub hypervisor: Hypervisor,
    /// Only these, by name or UUID; `None`: all that there are.
    pub only: Option<Arc<BTreeSet<String>>>,
}

impl Inventory {
    /// Tells what there is now and from now on, until the link is gone.
    pub async fn tell(self, control: mpsc::Sender<AgentMessage>) {
        let mut events = self.hypervisor.subscribe();
        let mut told = None;
        loop {
            let looking = self.clone();
            let found = tokio::task::spawn_blocking(move || looking.look()).await;
            // A libvirt that does not answer now is asked again.
            if let Ok(Some(vms)) = found
                && told.as_ref() != Some(&vms)
            {
                told = Some(vms.clone());
                if control.send(AgentMessage::Inventory { vms }).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                event = events.recv() => match event {
                    Ok(_) | Err(RecvError::Lagged(_)) => tokio::time::sleep(SETTLE).await,
                    Err(RecvError::Closed) => tokio::time::sleep(LOOK_AGAIN).await,
                },
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = control.closed() => return,
            }
            while events.try_recv().is_ok() {}
        }
    }

    /// Blocks.
    fn look(&self) -> Option<Vec<Offered>> {
        let offered = |domain: &lifeboat::hypervisor::libvirt::Domain| {
            let running = domain.state().is_ok_and(|state| state.is_active());
            Offered { vm: domain.uuid(), name: domain.name().to_owned(), running }
        };
        let is_meant = |vm: &Offered| {
            let named =
                |only: &Arc<BTreeSet<String>>| only.contains(&vm.name) || only.contains(&vm.vm.to_string());
            self.only.as_ref().is_none_or(named)
        };
        let domains = self.hypervisor.domains().ok()?;
        let mut vms: Vec<Offered> = domains.iter().map(offered).filter(is_meant).collect();
        vms.sort_by(|a, b| (!a.running, &a.name, a.vm).cmp(&(!b.running, &b.name, b.vm)));
        vms.truncate(VMS_MAX);
        Some(vms)
    }
}
