//! The link to the site: dials, greets, routes messages to the VMs' actors, carries frames on several streams.
//! Promises: dials again for ever, with back-off; every actor is told when the link comes and goes; nothing is queued
//! without a bound, and what is queued behind everybody's turn is no more than the link needs to be busy. Implements
//! what `protect::link` describes. Started by `daemon`.

use crate::{
    protect::{
        assignments::Assignments,
        link::{LinkEvent, Outbox, Shipment},
        status::Board,
    },
    ship::{
        inventory::Inventory,
        limit::Limits,
        turns::{Door, Turns},
    },
};
use lifeboat::{
    error,
    id::VmId,
    session::sender::FRAMES_HELD_MAX,
    transport::{
        Connection, ControlRecv, ControlSend, RefusalCode, TransportError, TransportSettings, dial,
        pki::AgentIdentity, version::ProtocolVersion,
    },
    units::Generation,
    wire::{
        message::{AgentMessage, SiteMessage},
        order::Part,
    },
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Mutex as AsyncMutex, mpsc, watch},
    task::JoinSet,
};

/// Events that may wait for one actor: every frame it may have in flight, and some talk.
pub const EVENTS_MAX: usize = 2 * FRAMES_HELD_MAX;
/// Data streams of one link: a lost packet holds up only one of them.
const DATA_STREAMS: usize = 4;
const CONTROL_QUEUED: usize = 256;
const BACK_OFF_FIRST: Duration = Duration::from_millis(250);
const BACK_OFF_MAX: Duration = Duration::from_secs(15);
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the bytes in QUIC's hands are fitted to the path.
const FIT_EVERY: Duration = Duration::from_millis(50);
/// Congestion windows that QUIC is given to hold: one on its way, one to grow into.
const FIT_WINDOWS: u64 = 2;
/// Two of the largest frames: less would leave the link idle between them.
const FIT_LEAST: u64 = 512 << 10;

/// Where the site is and how to talk to it.
pub struct Uplink {
    /// `host:port`.
    pub address: String,
    pub identity: AgentIdentity,
    pub settings: TransportSettings,
    pub host: String,
    pub limits: Arc<Limits>,
    pub routes: Routes,
    /// Told to the site, and what its groups say of it.
    pub inventory: Inventory,
    pub assignments: Assignments,
    pub board: Board,
    pub stop: watch::Receiver<bool>,
}

/// Who gets the messages about which VM. Clones share one table.
#[derive(Clone, Default)]
pub struct Routes(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    actors: BTreeMap<VmId, mpsc::Sender<LinkEvent>>,
    up: Option<Up>,
    /// What the site promised last: in answer to which `Alive`, and for how many milliseconds.
    promises: BTreeMap<VmId, (u64, u32)>,
}

/// A link that is up, as actors are told of it.
#[derive(Clone)]
struct Up {
    reads_deltas: bool,
    overlaps: bool,
    places: bool,
    orders: bool,
    promises: bool,
    control: mpsc::Sender<AgentMessage>,
    door: Door,
    window: u64,
    site: String,
}

impl Up {
    fn event(&self, vm: VmId) -> LinkEvent {
        let (control, frames) = (self.control.clone(), self.door.lane(vm));
        let (reads_deltas, overlaps, places, orders) =
            (self.reads_deltas, self.overlaps, self.places, self.orders);
        let outbox = Outbox { reads_deltas, overlaps, places, orders, control, frames };
        LinkEvent::Up { outbox, window: self.window, site: self.site.clone() }
    }
}

impl Routes {
    /// Adds an actor; if the link is up it is told so at once.
    pub fn join(&self, vm: VmId) -> mpsc::Receiver<LinkEvent> {
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let mut table = self.table();
        if let Some(up) = &table.up {
            // An empty channel has room for its first event.
            let _ = events.try_send(up.event(vm));
        }
        table.actors.insert(vm, events);
        inbox
    }

    pub fn leave(&self, vm: VmId) {
        self.table().actors.remove(&vm);
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something that is no actor's to say.
    async fn tell(&self, message: AgentMessage) {
        let control = self.table().up.as_ref().map(|up| up.control.clone());
        if let Some(control) = control {
            let _ = control.send(message).await;
        }
    }

    /// Says that this host writes the VM's history, where the site answers that. Waits for nobody.
    pub fn say_alive(&self, vm: VmId, generation: Generation, no: u64) {
        let up = self.table().up.as_ref().filter(|up| up.promises).map(|up| up.control.clone());
        if let Some(control) = up {
            let _ = control.try_send(AgentMessage::Alive { vm, generation, no });
        }
    }

    /// What the site promised last, for milliseconds from what it answers.
    pub fn promise(&self, vm: VmId) -> Option<(u64, u32)> {
        self.table().promises.get(&vm).copied()
    }

    fn actor(&self, vm: VmId) -> Option<mpsc::Sender<LinkEvent>> {
        self.table().actors.get(&vm).cloned()
    }

    async fn set_up(&self, up: Option<Up>, why: &str) {
        let actors: Vec<_> = {
            let mut table = self.table();
            table.up = up.clone();
            table.actors.iter().map(|(vm, actor)| (*vm, actor.clone())).collect()
        };
        for (vm, actor) in actors {
            let event =
                up.as_ref().map_or_else(|| LinkEvent::Down { why: why.to_owned() }, |up| up.event(vm));
            // An actor that has ended takes no more events.
            let _ = actor.send(event).await;
        }
    }
}

impl Uplink {
    /// Keeps the link up until told to stop.
    pub async fn run(mut self) {
        let mut back_off = BACK_OFF_FIRST;
        let mut said = String::new();
        loop {
            let mut stop = self.stop.clone();
            let ended = tokio::select! {
                ended = self.link(&mut back_off) => ended,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            let Err(error) = ended else { break };
            let why = error::chain(&error);
            if said != why {
                // Each cause is said once; the board always shows the current one.
                tracing::warn!(site = %self.address, %why, "no link to the site");
                said.clone_from(&why);
            }
            self.board.set_link(format!("down: {why}"));
            self.routes.set_up(None, &why).await;
            tokio::select! {
                () = tokio::time::sleep(back_off) => {}
                _ = self.stop.wait_for(|stop| *stop) => break,
            }
            back_off = (back_off * 2).min(BACK_OFF_MAX);
        }
    }

    /// One link, from dialling to its end.
    async fn link(&self, back_off: &mut Duration) -> Result<(), TransportError> {
        let connection = dial(&self.address, &self.identity, &self.settings).await?;
        let (mut send, mut recv) = connection.open_control().await?;
        let hello =
            AgentMessage::Hello { host: self.host.clone(), release: env!("CARGO_PKG_VERSION").to_owned() };
        send.send(&hello).await?;
        let welcome = tokio::time::timeout(GREETING_TIMEOUT, recv.recv::<SiteMessage>())
            .await
            .map_err(|_| TransportError::Lost { why: "the site did not answer the greeting" })??;
        let Some(SiteMessage::Welcome { site, release, window }) = welcome else {
            return Err(TransportError::Protocol("the site did not start with a welcome".into()));
        };
        *back_off = BACK_OFF_FIRST;
        tracing::info!(%site, %release, address = %self.address, "linked to the site");
        self.board.set_link(format!("up: {site}"));
        let (control, control_queue) = mpsc::channel(CONTROL_QUEUED);
        let version = connection.version();
        let (turns, door) = Turns::new(self.limits.clone());
        let up = Up {
            reads_deltas: version.reads_deltas(),
            overlaps: version.overlaps(),
            places: version.knows_places(),
            orders: version.knows_orders(),
            promises: version.knows_promises(),
            control: control.clone(),
            door,
            window,
            site,
        };
        self.routes.set_up(Some(up), "").await;
        let offers = version.knows_orders().then(|| self.inventory.clone().tell(control));
        let ended = self.carry(&connection, send, recv, control_queue, turns, offers).await;
        connection.close(RefusalCode::DONE, "the agent hangs up");
        ended
    }

    /// Moves messages and frames until something breaks.
    async fn carry(
        &self,
        connection: &Connection,
        send: ControlSend,
        recv: ControlRecv,
        control: mpsc::Receiver<AgentMessage>,
        turns: Turns,
        offers: Option<impl Future<Output = ()> + Send + 'static>,
    ) -> Result<(), TransportError> {
        let mut tasks = JoinSet::new();
        if let Some(offers) = offers {
            tasks.spawn(async move {
                offers.await;
                Err(TransportError::Lost { why: "nobody tells which VMs there are" })
            });
        }
        tasks.spawn(write_control(send, control, connection.version()));
        tasks.spawn(route(recv, self.routes.clone(), self.assignments.clone()));
        tasks.spawn(fit(connection.clone(), self.settings.send_window.into()));
        let turns = Arc::new(AsyncMutex::new(turns));
        for _ in 0..DATA_STREAMS {
            tasks.spawn(write_frames(connection.clone(), turns.clone()));
        }
        // The first task that ends takes the link with it; dropping the set stops the others.
        match tasks.join_next().await {
            Some(Ok(Err(error))) => Err(error),
            Some(Err(panic)) => Err(TransportError::Protocol(format!("a task of the link died: {panic}"))),
            Some(Ok(Ok(()))) | None => Err(connection.closed().await),
        }
    }
}

async fn write_control(
    mut send: ControlSend,
    mut queue: mpsc::Receiver<AgentMessage>,
    version: ProtocolVersion,
) -> Result<(), TransportError> {
    while let Some(message) = queue.recv().await {
        let message = if version.tells_consistency() { message } else { message.before_version_5() };
        send.send(&message).await?;
    }
    Ok(())
}

async fn write_frames(connection: Connection, turns: Arc<AsyncMutex<Turns>>) -> Result<(), TransportError> {
    let mut stream = connection.open_data().await?;
    loop {
        let Shipment { vm, point, frame } = turns.lock().await.next().await;
        stream.send(vm, point, &frame).await?;
    }
}

/// Keeps what QUIC holds near to what the path has on its way: a frame that QUIC has taken can't be overtaken by another
/// VM's any more, nor taken back.
async fn fit(connection: Connection, most: u64) -> Result<(), TransportError> {
    loop {
        let window = connection.stats().congestion_window.saturating_mul(FIT_WINDOWS);
        connection.set_send_window(window.clamp(FIT_LEAST, most.max(FIT_LEAST)));
        tokio::time::sleep(FIT_EVERY).await;
    }
}

async fn route(
    mut recv: ControlRecv,
    routes: Routes,
    assignments: Assignments,
) -> Result<(), TransportError> {
    while let Some(message) = recv.recv::<SiteMessage>().await? {
        let Some(vm) = message.vm() else { continue };
        if let SiteMessage::Assign { assignment, .. } = message {
            let assignments = assignments.clone();
            // Remembering it takes a disk.
            let _ = tokio::task::spawn_blocking(move || assignments.set(vm, assignment)).await;
            continue;
        }
        match (routes.actor(vm), message) {
            (_, SiteMessage::Alive { no, for_ms, .. }) => {
                routes.table().promises.insert(vm, (no, for_ms));
            }
            (Some(actor), message) => {
                let _ = actor.send(LinkEvent::Message(message)).await;
            }
            (None, SiteMessage::Cut { cut, .. }) => {
                let part = Part::Out { why: "its host does not protect it".into() };
                routes.tell(AgentMessage::Part { vm, cut, part }).await;
            }
            (None, _) => tracing::debug!(%vm, "a message about a VM that is not protected here (any more)"),
        }
    }
    Err(TransportError::Lost { why: "the site closed the session" })
}
