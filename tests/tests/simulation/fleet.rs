//! Twenty guests on one agent: real actors, turns, limits and budget over one narrow link to a real site, in simulated
//! time. The guests, the link and the site's disk are models.

use crate::model_guest::ModelGuest;
use lifeboat::{
    clock::{Clock, SystemClock},
    id::{PointId, VmId},
    units::{BitRate, ByteSize, Compression},
    wire::message::AgentMessage,
};
use lifeboat_agent::{
    protect::{
        holds::Holds,
        link::{LinkEvent, Outbox},
        neighbour::Neighbour,
        pace::Cause,
        status::Board,
        vm::{Protection, Settings},
    },
    ship::{
        base_cache::BaseCache,
        budget::{Budget, Lanes},
        limit::{Limits, Plan},
        turns::Turns,
    },
};
use lifeboat_site_controller::{
    intake::slot::Slots,
    store::{MemoryIndex, Objects, SeededIds, Store, StoreOptions, sim::SimDisk},
};
use rand::{SeedableRng, rngs::StdRng};
use std::{sync::Arc, time::Duration};
use tokio::sync::{Mutex, mpsc, watch};

const VMS: u8 = 20;
/// Bytes a second: of a point's 10 KB it carries a few a second, for all VMs together.
const LINK: u64 = 50_000;
const BUDGET: u64 = 64 << 10;
const FRAME_MOST: u64 = 5_000;

fn vm(no: u8) -> VmId {
    VmId::from_bytes([no; 16])
}

async fn site() -> Arc<Slots> {
    let disk = SimDisk::new(1);
    disk.set_capacity(1 << 40, 0);
    let objects: Arc<dyn Objects> = Arc::new(disk);
    let (clock, ids): (Arc<dyn Clock>, _) = (Arc::new(SystemClock), Arc::new(SeededIds::new(1)));
    let options = StoreOptions { pack_size: ByteSize(64 << 10) };
    let opened = Store::open(objects, clock, ids, Arc::new(MemoryIndex::default()), options).await;
    Arc::new(Slots::new(opened.unwrap().0))
}

/// Moves one VM's control messages to the site and its answers back.
fn speak(slots: &Arc<Slots>, mut told: mpsc::Receiver<AgentMessage>, actor: mpsc::Sender<LinkEvent>) {
    let (replies, mut answers) = mpsc::channel(64);
    let slots = slots.clone();
    tokio::spawn(async move {
        while let Some(message) = told.recv().await {
            match message {
                AgentMessage::Watch { vm, name, generation } => {
                    slots.slot(vm).watch(1, "fleet", name, generation, replies.clone()).await;
                }
                AgentMessage::Begin { vm, generation, point, parent } => {
                    slots.slot(vm).begin("fleet", generation, point, parent, replies.clone()).await;
                }
                AgentMessage::End { vm, point, frames, meta } => {
                    let slot = slots.slot(vm);
                    tokio::spawn(async move { slot.end(point, frames, meta).await });
                }
                AgentMessage::Abort { vm, point } => slots.slot(vm).abort(point).await,
                // These guests have no history that anything could be compared with.
                AgentMessage::Hello { .. }
                | AgentMessage::Report { .. }
                | AgentMessage::EndV1 { .. }
                | AgentMessage::Compare { .. }
                | AgentMessage::Place { .. }
                | AgentMessage::Alive { .. }
                | AgentMessage::Inventory { .. }
                | AgentMessage::Part { .. } => {}
            }
        }
    });
    tokio::spawn(async move {
        while let Some(message) = answers.recv().await {
            if actor.send(LinkEvent::Message(message)).await.is_err() {
                return;
            }
        }
    });
}

/// Goal: twenty VMs that all outrun the link share it evenly, none starves, what is held stays within the budget, and
/// each says that it is link-bound. Method: a minute of simulated time, every page of every guest changing.
#[test]
fn twenty_guests_that_outrun_one_link_share_it_evenly_within_the_budget() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let slots = site().await;
        let plan = Plan { link: Some(BitRate(LINK * 8)), windows: Vec::new() };
        let limits = Arc::new(Limits::new(plan, Arc::new(SystemClock)));
        let (mut turns, door) = Turns::new(limits);
        let (board, budget) = (Board::default(), Budget::new(BUDGET));
        let (_stop, stopped) = watch::channel(false);
        let mut guests = Vec::new();
        for no in 1..=VMS {
            let guest = ModelGuest::new();
            let (events, link) = mpsc::channel(10_000);
            let (control, told) = mpsc::channel(64);
            speak(&slots, told, events.clone());
            let outbox = Outbox {
                reads_deltas: false,
                overlaps: true,
                places: false,
                orders: false,
                control,
                frames: door.lane(vm(no)),
            };
            events.send(LinkEvent::Up { outbox, window: 1 << 20, site: "sim".into() }).await.unwrap();
            let mut made = 0_u128;
            let protection = Protection {
                vm: vm(no),
                name: format!("vm{no:02}"),
                source: guest.source(),
                settings: Settings {
                    consistency: Default::default(),
                    interval: Duration::from_millis(300),
                    max_pause: Duration::from_secs(1),
                    compression: Compression::fixed(1),
                    lanes: Lanes::new(0),
                    budget: budget.clone(),
                    patience: Duration::from_secs(30),
                },
                generation: None,
                neighbour: Arc::new(Neighbour::open(vm(no), None)),
                bases: Arc::new(BaseCache::new(0)),
                link,
                clock: Arc::new(SystemClock),
                new_point: Box::new(move || {
                    made += 1;
                    PointId::from_bytes((u128::from(no) << 64 | made).to_be_bytes())
                }),
                on_generation: Box::new(|_, _| {}),
                wish: watch::channel(None).1,
                holds: Holds::open(&std::env::temp_dir().join("lifeboat-simulation")).unwrap(),
                board: board.clone(),
                stop: stopped.clone(),
            };
            tokio::spawn(protection.run());
            guests.push(guest);
        }
        let carried = Arc::new(Mutex::new(vec![0_u64; usize::from(VMS) + 1]));
        let counted = carried.clone();
        tokio::spawn(async move {
            loop {
                let next = turns.next().await;
                counted.lock().await[usize::from(next.vm.as_bytes()[0])] += next.frame.encoded_len() as u64;
                slots.slot(next.vm).frame(next.point, next.frame).await;
            }
        });
        let mut rng = StdRng::seed_from_u64(1);
        for tenth in 0..600 {
            guests.iter().for_each(|guest| guest.work(&mut rng, 40));
            tokio::time::sleep(Duration::from_millis(100)).await;
            let most = BUDGET + u64::from(VMS) * FRAME_MOST;
            assert!(budget.held() <= most, "{} bytes held at {tenth}", budget.held());
        }
        let carried = carried.lock().await[1..].to_vec();
        let even = carried.iter().sum::<u64>() / u64::from(VMS);
        assert!(even > 60 * LINK / u64::from(VMS) * 9 / 10, "the link was not filled: {carried:?}");
        assert!(carried.iter().all(|bytes| bytes.abs_diff(even) < even / 5), "not even: {carried:?}");
        for status in board.read(SystemClock.now()).vms {
            assert!(status.points_durable >= 3 && status.points_lost == 0, "{status:?}");
            let pace = status.pace.unwrap_or_else(|| panic!("not late? {status:?}"));
            assert_eq!(pace.cause, Cause::LinkBound, "{status:?}");
            // As `pace` promises: what the last lap happened to need may just have been what it got.
            assert!(pace.needs_bits >= pace.has_bits, "{status:?}");
        }
    });
}
