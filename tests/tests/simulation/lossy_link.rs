//! A link that delays, reorders between its streams, and is cut at any moment: between one agent's actor and the site's
//! slots, as `ship::uplink` and `intake::session` are in the product.

use lifeboat::{id::VmId, wire::message::AgentMessage};
use lifeboat_agent::protect::link::{LinkEvent, Outbox, Shipment};
use lifeboat_site_controller::intake::{compare::Comparisons, slot::Slots};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinSet,
};

/// Frames in flight that the site may not have taken.
const WINDOW: u64 = 16 << 10;

/// Frames that set out, by codec.
pub type Shipped = Arc<[AtomicU64; 5]>;

/// One link while it is up; dropping it loses everything on its way.
pub struct LossyLink {
    tasks: JoinSet<()>,
    actor: mpsc::Sender<LinkEvent>,
}

impl LossyLink {
    /// `shipped` counts the frames that set out, by codec.
    pub async fn up(
        vm: VmId,
        actor: mpsc::Sender<LinkEvent>,
        slots: Arc<Slots>,
        comparisons: Arc<Comparisons>,
        shipped: Shipped,
        rng: &mut StdRng,
    ) -> Self {
        let counts = shipped;
        let (control, mut told) = mpsc::channel::<AgentMessage>(64);
        let (frames, shipped) = mpsc::channel::<Shipment>(4);
        let (replies, mut answers) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        // Some lines are long.
        let most = [3_000, 20_000, 100_000][rng.random_range(0..3)];
        let overlaps = rng.random_range(0..5) > 0;
        let mut delay = Delay::new(rng, most);
        let (to_site, site_slots) = (replies, slots.clone());
        tasks.spawn(async move {
            while let Some(message) = told.recv().await {
                delay.wait().await;
                let slot = site_slots.slot(vm);
                match message {
                    AgentMessage::Watch { name, generation, .. } => {
                        slot.watch(SESSION, AGENT, name, generation, to_site.clone()).await;
                    }
                    AgentMessage::Begin { generation, point, parent, .. } => {
                        slot.begin(AGENT, generation, point, parent, to_site.clone()).await;
                    }
                    AgentMessage::End { point, frames, meta, .. } => {
                        tokio::spawn(async move { slot.end(point, frames, meta).await });
                    }
                    AgentMessage::Abort { point, .. } => slot.abort(point).await,
                    AgentMessage::Place { place, .. } => {
                        slot.place(SESSION, AGENT, place, to_site.clone()).await;
                    }
                    AgentMessage::Compare { question, .. } => comparisons.ask(vm, question, &to_site).await,
                    AgentMessage::Hello { .. }
                    | AgentMessage::Report { .. }
                    | AgentMessage::EndV1 { .. }
                    | AgentMessage::Alive { .. }
                    | AgentMessage::Inventory { .. }
                    | AgentMessage::Part { .. } => {}
                }
            }
        });
        let shipped = Arc::new(Mutex::new(shipped));
        for _ in 0..3 {
            let (mut delay, shipped, slots) = (Delay::new(rng, most), shipped.clone(), slots.clone());
            let counts = counts.clone();
            tasks.spawn(async move {
                loop {
                    let next = shipped.lock().await.recv().await;
                    let Some(Shipment { vm, point, frame }) = next else { return };
                    counts[frame.head.codec as usize].fetch_add(1, Ordering::Relaxed);
                    delay.wait().await;
                    slots.slot(vm).frame(point, frame).await;
                }
            });
        }
        let mut delay = Delay::new(rng, most);
        let to_actor = actor.clone();
        tasks.spawn(async move {
            while let Some(message) = answers.recv().await {
                delay.wait().await;
                if to_actor.send(LinkEvent::Message(message)).await.is_err() {
                    return;
                }
            }
        });
        let outbox =
            Outbox { reads_deltas: true, overlaps, places: overlaps, orders: false, control, frames };
        let _ = actor.send(LinkEvent::Up { outbox, window: WINDOW, site: "sim".into() }).await;
        Self { tasks, actor }
    }

    /// Cuts the link: whatever was on its way is lost.
    pub async fn cut(mut self) {
        self.tasks.shutdown().await;
        let _ = self.actor.send(LinkEvent::Down { why: "cut".into() }).await;
    }
}

/// There is one agent, and its sessions are not told apart.
const AGENT: &str = "sim";
const SESSION: u64 = 1;

struct Delay(StdRng, u64);

impl Delay {
    /// Of `most` microseconds.
    fn new(rng: &mut StdRng, most: u64) -> Self {
        Self(StdRng::seed_from_u64(rng.random()), most)
    }
    async fn wait(&mut self) {
        tokio::time::sleep(Duration::from_micros(self.0.random_range(0..self.1))).await;
    }
}
