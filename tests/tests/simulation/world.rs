//! The world of one seed: who is alive, what happens next, and what must hold.

use crate::{
    lossy_link::{LossyLink, Shipped},
    model_guest::{Instant, ModelGuest, page_of},
};
use lifeboat::{
    clock::{Clock, ManualClock},
    format::manifest::ImageKind,
    id::{PointId, VmId},
    units::{ByteSize, Compression, Generation, UnixMs},
    wire::order::ConsistencyWish,
};
use lifeboat_agent::{
    protect::{
        holds::Holds,
        link::LinkEvent,
        neighbour::Neighbour,
        status::Board,
        vm::{Protection, Settings},
    },
    ship::{
        base_cache::BaseCache,
        budget::{Budget, Lanes},
    },
};
use lifeboat_site_controller::{
    intake::{compare::Comparisons, slot::Slots},
    restore::{Plan, Reader},
    store::{MemoryIndex, Objects, PointSummary, SeededIds, Store, StoreOptions, sim::SimDisk},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

const VM: VmId = VmId::from_bytes([7; 16]);
const ROOMY: u64 = 1 << 40;
const NEVER: u64 = 1 << 60;

pub struct World {
    pub rng: StdRng,
    seed: u64,
    clock: ManualClock,
    guest: ModelGuest,
    disk: SimDisk,
    site: Option<SiteLife>,
    agent: Option<AgentLife>,
    link: Option<LossyLink>,
    /// What the agent keeps on its disk.
    generation: Arc<Mutex<Option<Generation>>>,
    points_made: Arc<Mutex<u64>>,
    lives: u64,
    pub shipped: Shipped,
}

struct SiteLife {
    store: Store,
    slots: Arc<Slots>,
    comparisons: Arc<Comparisons>,
}

struct AgentLife {
    task: JoinHandle<()>,
    events: mpsc::Sender<LinkEvent>,
    stop: watch::Sender<bool>,
}

impl World {
    pub async fn new(seed: u64) -> Self {
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            seed,
            clock: ManualClock::at(UnixMs(1_000_000)),
            guest: ModelGuest::new(),
            disk: SimDisk::new(seed),
            site: None,
            agent: None,
            link: None,
            generation: Arc::default(),
            points_made: Arc::default(),
            lives: 0,
            shipped: Shipped::default(),
        };
        world.disk.set_capacity(ROOMY, 0);
        world.heal().await;
        world
    }

    /// Lets simulated time pass.
    pub async fn pass(&mut self, ms: u64) {
        self.clock.advance(ms);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    /// One thing happens, good or bad.
    pub async fn event(&mut self) {
        match self.rng.random_range(0..100) {
            0..45 => {
                let ms = self.rng.random_range(1..400);
                self.pass(ms).await;
            }
            45..70 => {
                let writes = self.rng.random_range(1..30);
                self.guest.work(&mut self.rng, writes);
            }
            70..78 => self.cut_link().await,
            78..86 => self.link_up().await,
            86..90 => self.kill_agent(),
            90..92 => self.stop_agent().await,
            92..95 => self.start_agent(),
            95..97 => {
                let step = self.rng.random_range(1..12);
                self.disk.cut_at(step);
            }
            97 => {
                let capacity = self.disk.used() + self.rng.random_range(0..40_000);
                self.disk.set_capacity(capacity, 0);
            }
            98 => self.disk.set_capacity(ROOMY, 0),
            _ => self.guest.lose_marks(),
        }
        if !self.disk.is_powered() {
            self.site_returns().await;
        }
    }

    /// Everything works again.
    pub async fn heal(&mut self) {
        self.disk.set_capacity(ROOMY, 0);
        self.disk.cut_at(NEVER);
        if self.site.is_none() || !self.disk.is_powered() {
            self.site_returns().await;
        }
        self.start_agent();
        self.link_up().await;
    }

    /// The site lost its power: it comes back, perhaps losing it again on the way.
    async fn site_returns(&mut self) {
        self.cut_link().await;
        self.site = None;
        for _ in 0..20 {
            if !self.disk.is_powered() {
                self.disk = self.disk.reopen();
            }
            self.lives += 1;
            let ids = Arc::new(SeededIds::new(self.seed ^ (self.lives << 32)));
            let objects: Arc<dyn Objects> = Arc::new(self.disk.clone());
            let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
            let options = StoreOptions { pack_size: ByteSize(64 << 10) };
            let opened = Store::open(objects, clock, ids, Arc::new(MemoryIndex::default()), options).await;
            if let Ok((store, _)) = opened {
                let comparisons = Comparisons::new(store.clone(), std::env::temp_dir());
                self.site = Some(SiteLife { slots: Arc::new(Slots::new(store.clone())), comparisons, store });
                self.check("after the site's return").await;
                return;
            }
        }
        panic!("seed {}: the store can't be opened any more", self.seed);
    }

    fn start_agent(&mut self) {
        if self.agent.as_ref().is_some_and(|agent| !agent.task.is_finished()) {
            return;
        }
        let (events, link) = mpsc::channel(10_000);
        let (stop, stopped) = watch::channel(false);
        let (remembered, made, seed) = (self.generation.clone(), self.points_made.clone(), self.seed);
        let protection = Protection {
            vm: VM,
            name: "sim".into(),
            source: self.guest.source(),
            settings: Settings {
                consistency: ConsistencyWish::default(),
                interval: Duration::from_millis([300, 20][self.rng.random_range(0..2)]),
                max_pause: Duration::from_secs(1),
                compression: Compression::fixed(1),
                lanes: Lanes::new(0),
                budget: Budget::new(Budget::DEFAULT),
                patience: Duration::from_secs(3),
            },
            generation: *self.generation.lock().unwrap(),
            link,
            clock: Arc::new(self.clock.clone()),
            new_point: Box::new(move || {
                let mut made = made.lock().unwrap();
                *made += 1;
                PointId::from_bytes((u128::from(seed) << 64 | u128::from(*made)).to_be_bytes())
            }),
            on_generation: Box::new(move |_, generation| *remembered.lock().unwrap() = Some(generation)),
            neighbour: Arc::new(Neighbour::open(VM, None)),
            board: Board::default(),
            // Of some agents it is too small for all pages, of some it is off.
            bases: Arc::new(BaseCache::new([1 << 20, 200_000, 0][self.rng.random_range(0..3)])),
            wish: watch::channel(None).1,
            holds: Holds::open(&std::env::temp_dir().join("lifeboat-simulation")).unwrap(),
            stop: stopped,
        };
        let task = tokio::spawn(protection.run());
        self.agent = Some(AgentLife { task, events, stop });
        // The link belongs to the agent's process.
        self.link = None;
    }

    fn kill_agent(&mut self) {
        self.link = None;
        if let Some(agent) = self.agent.take() {
            agent.task.abort();
        }
    }

    async fn stop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            let _ = agent.stop.send(true);
            let ended = tokio::time::timeout(Duration::from_secs(60), agent.task).await;
            assert!(ended.is_ok(), "seed {}: the agent did not stop", self.seed);
        }
        self.link = None;
    }

    async fn cut_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.cut().await;
        }
    }

    async fn link_up(&mut self) {
        if let (None, Some(agent), Some(site)) = (&self.link, &self.agent, &self.site) {
            let (events, shipped) = (agent.events.clone(), self.shipped.clone());
            let (slots, comparisons) = (site.slots.clone(), site.comparisons.clone());
            let link = LossyLink::up(VM, events, slots, comparisons, shipped, &mut self.rng).await;
            self.link = Some(link);
        }
    }

    pub async fn raise_generation(&mut self) {
        let site = self.site.as_ref().unwrap();
        let raised = site.store.raise(VM).await.unwrap();
        if let Some(slot) = site.slots.find(VM) {
            slot.fence(raised).await;
        }
    }

    pub fn overlapped(&self) -> u64 {
        self.guest.overlapped()
    }

    pub fn settled(&self) -> Vec<PointId> {
        self.guest.settled()
    }

    pub async fn points(&self) -> Vec<PointId> {
        self.summaries().await.iter().map(|point| point.point).collect()
    }

    async fn summaries(&self) -> Vec<PointSummary> {
        self.site.as_ref().unwrap().store.points(Some(VM)).await.unwrap()
    }

    /// With everything working, a point of the guest as it is now becomes durable within a minute.
    pub async fn catches_up(&mut self) {
        let now = self.guest.now();
        for _ in 0..600 {
            self.pass(100).await;
            if self.guest.settled().last().and_then(|point| self.guest.truth(*point)).as_ref() == Some(&now) {
                return;
            }
        }
        panic!("seed {}: protection did not catch up within a minute", self.seed);
    }

    /// Acknowledged ⇒ found; found ⇒ exact.
    pub async fn check(&self, when: &str) {
        let seed = self.seed;
        let found = self.summaries().await;
        for point in self.guest.settled() {
            let there = found.iter().any(|summary| summary.point == point);
            assert!(there, "seed {seed}, {when}: point {point} was acknowledged and is gone");
        }
        for summary in &found {
            let truth = self.guest.truth(summary.point);
            let truth = truth.unwrap_or_else(|| panic!("seed {seed}, {when}: a point that nobody cut"));
            let restored = self.restore(summary).await;
            assert_eq!(restored, truth, "seed {seed}, {when}: point {} is not what it was", summary.seq);
        }
    }

    async fn restore(&self, point: &PointSummary) -> Instant {
        let objects = self.site.as_ref().unwrap().store.objects().clone();
        let plan = Plan::load(objects.as_ref(), VM, point.seq).await;
        let plan = plan.unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
        let reader = Reader::new(objects, Arc::new(plan));
        Instant {
            memory: values(&reader, ImageKind::Ram, "pc.ram").await,
            disk: values(&reader, ImageKind::Disk, "vda").await,
        }
    }
}

/// An image as the values of its pages; every byte of a page must agree.
async fn values(reader: &Reader, kind: ImageKind, name: &str) -> Vec<u64> {
    let bytes = reader.read_whole(kind, name, 1 << 20).await.unwrap();
    let pages = bytes.chunks(lifeboat::page::PAGE);
    pages
        .map(|page| {
            let value = u64::from_le_bytes(page[..8].try_into().unwrap());
            assert_eq!(page, page_of(value), "a page is mixed from several");
            value
        })
        .collect()
}
