//! The lookout: sees that somebody else needs a guest's QEMU, and tells the protection to step aside.
//! libvirt announces no job before it begins. So there are QEMU's own events (a migration, which a save and a dump are as
//! well, block jobs, unplugged devices) and, for what has none, a look every second.
//! A hook of libvirt's would not help: on the host that a guest leaves, it calls none before any of this.
//! Called by the daemon, one task per VM.

use super::{neighbour::Neighbour, saves::Saves};
use crate::capture::others;
use lifeboat::{
    boot,
    hypervisor::libvirt::{Domain, DomainEvent, Happened, Hypervisor},
    id::VmId,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{broadcast, watch},
    time::Instant,
};

/// Between two looks while nothing is known of anybody.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks while somebody is at work.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// What is made of several jobs, or tried again at once, is one thing: we come back only after so long a silence.
const GRACE: Duration = Duration::from_secs(1);

pub async fn watch(
    hypervisor: Hypervisor,
    vm: VmId,
    neighbour: Arc<Neighbour>,
    mut stop: watch::Receiver<bool>,
) {
    let mut events = hypervisor.subscribe();
    let mut look = Look { hypervisor, vm, domain: None, saves: Saves::default() };
    let mut busy_until = None::<Instant>;
    loop {
        let pause = if busy_until.is_some() { LOOK_AGAIN } else { LOOK };
        tokio::select! {
            event = events.recv() => match event {
                Ok(event) if event.vm.is_none_or(|about| about == vm) => note(&neighbour, event, &mut busy_until),
                Ok(_) => continue,
                // Missed some: the look tells.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        neighbour.expire(boot::uptime());
        let looked = tokio::task::spawn_blocking(move || {
            let found = look.look();
            (look, found)
        });
        let Ok((back, found)) = looked.await else { return };
        look = back;
        if let Some(found) = found {
            busy_until = Some(Instant::now() + GRACE);
            neighbour.set_busy(Some(found));
        } else if busy_until.is_some_and(|until| Instant::now() >= until) {
            busy_until = None;
            neighbour.set_busy(None);
        }
    }
}

/// What an event tells by itself.
fn note(neighbour: &Neighbour, event: DomainEvent, busy_until: &mut Option<Instant>) {
    match event.happened {
        Happened::Left => neighbour.set_away(true),
        Happened::Started => neighbour.set_away(false),
        // What we had between the guest and this disk must go, or libvirt can't take the rest away.
        Happened::Unplugged => {
            *busy_until = Some(Instant::now() + GRACE);
            neighbour.set_busy(Some("a device being unplugged".into()));
        }
        Happened::JobChanged
        | Happened::Defined
        | Happened::Undefined
        | Happened::Suspended
        | Happened::Resumed
        | Happened::Stopped
        | Happened::Crashed
        | Happened::Reset
        | Happened::EventsMissed => {}
    }
}

struct Look {
    hypervisor: Hypervisor,
    vm: VmId,
    domain: Option<Domain>,
    saves: Saves,
}

impl Look {
    /// What somebody else is doing, if anything. Whoever can't be asked is taken to do nothing: each step of a cut is
    /// safe against what it meets, and finds out by itself.
    fn look(&mut self) -> Option<String> {
        if self.domain.is_none() {
            self.domain = self.hypervisor.domain_by_uuid(self.vm).ok();
        }
        let domain = self.domain.as_ref()?;
        let somebody = others::somebody(domain);
        if somebody.is_some() {
            self.saves.at_work(domain);
        }
        somebody
    }
}
