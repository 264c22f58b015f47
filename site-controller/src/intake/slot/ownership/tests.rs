//! The rules at work, over a real store: who is admitted, what is thrown away, what outlives a restart.

use super::*;
use crate::{
    intake::slot::Slots,
    store::{MemoryIndex, Objects, SeededIds, Store, StoreOptions, sim::SimDisk},
};
use lifeboat::{
    clock::SystemClock,
    format::manifest::{Consistency, Image, ImageKind, PointMeta, PointStats},
    id::{PointId, VmId},
    units::UnixMs,
};
use tokio::sync::mpsc;

const VM: VmId = VmId::from_bytes([3; 16]);
const RUNS: Place = Place::Here { migrated: false };
const ARRIVED: Place = Place::Here { migrated: true };

/// A site, and its disk over restarts.
struct World {
    disk: SimDisk,
    slots: Slots,
}

impl World {
    async fn open(disk: SimDisk) -> Self {
        let (clock, ids) = (Arc::new(SystemClock), Arc::new(SeededIds::new(7)));
        let objects = Arc::new(disk.clone());
        let opened =
            Store::open(objects, clock, ids, Arc::new(MemoryIndex::default()), StoreOptions::default());
        Self { disk, slots: Slots::new(opened.await.unwrap().0) }
    }

    async fn new() -> Self {
        Self::open(SimDisk::new(1)).await
    }

    async fn restarted(self) -> Self {
        Self::open(self.disk.reopen()).await
    }

    async fn agent(&self, session: u64, name: &'static str) -> Agent {
        let (replies, inbox) = mpsc::channel(64);
        let mut agent = Agent { slot: self.slots.slot(VM), session, name, replies, inbox };
        let replies = agent.replies.clone();
        agent.slot.watch(session, name, "web".into(), None, replies).await;
        assert!(matches!(agent.hears().await, SiteMessage::Vm { .. }));
        agent
    }
}

struct Agent {
    slot: Arc<Slot>,
    session: u64,
    name: &'static str,
    replies: Replies,
    inbox: mpsc::Receiver<SiteMessage>,
}

impl Agent {
    async fn hears(&mut self) -> SiteMessage {
        let told = tokio::time::timeout(std::time::Duration::from_secs(20), self.inbox.recv());
        told.await.unwrap().unwrap()
    }

    async fn says(&mut self, place: Place) -> Option<Claim> {
        let claim = self.slot.place(self.session, self.name, place, self.replies.clone()).await;
        match (&claim, place) {
            (Some(Claim::Granted), _) => assert!(matches!(self.hears().await, SiteMessage::Vm { .. })),
            (Some(Claim::Refused(why)), _) => match self.hears().await {
                SiteMessage::VmRefused { refusal: Refusal::HeldElsewhere { why: told }, .. } => {
                    assert_eq!(*why, told)
                }
                other => panic!("{other:?}"),
            },
            (None, place) => assert!(!matches!(place, Place::Here { .. })),
        }
        claim
    }

    async fn is_granted(&mut self, place: Place) -> bool {
        self.says(place).await == Some(Claim::Granted)
    }

    async fn begins(&mut self, no: u8, over: Option<u8>) -> SiteMessage {
        let parent = over.map(point);
        self.slot.begin(self.name, Generation::FIRST, point(no), parent, self.replies.clone()).await;
        self.hears().await
    }

    /// An empty point, from its beginning to its end.
    async fn commits(&mut self, no: u8, over: Option<u8>) {
        let opened = self.begins(no, over).await;
        assert!(matches!(opened, SiteMessage::Opened { .. }), "{opened:?}");
        self.ends(no).await;
        let durable = self.hears().await;
        assert!(matches!(durable, SiteMessage::Durable { .. }), "{durable:?}");
    }

    async fn ends(&mut self, no: u8) {
        let image = Image { no: 1, kind: ImageKind::Disk, name: "vda".into(), bytes: 4096, full: true };
        let stats = PointStats { pause_us: 0, memory_changed_bytes: 0, disk_changed_bytes: 0 };
        let images = vec![image];
        let meta = PointMeta {
            cut_at: UnixMs(1),
            images,
            consistency: Consistency::Crash,
            was_running: true,
            stats,
            cut: None,
        };
        self.slot.end(point(no), 0, Box::new(meta)).await;
    }
}

fn point(no: u8) -> PointId {
    PointId::from_bytes([no; 16])
}

#[tokio::test]
async fn a_guest_that_left_one_host_and_arrived_at_another_changes_hands_once_and_goes_back() {
    let mut world = World::new().await;
    let (mut one, mut two) = (world.agent(1, "a").await, world.agent(2, "b").await);
    assert!(one.is_granted(RUNS).await);
    one.commits(1, None).await;
    // Its agent has not looked yet.
    assert!(!two.is_granted(ARRIVED).await);
    assert_eq!(one.says(Place::Left).await, None);
    // Who had it is nobody now; what did not arrive by a migration is not it.
    assert!(!one.is_granted(RUNS).await && !two.is_granted(RUNS).await);
    world = world.restarted().await;
    let (mut one, mut two) = (world.agent(1, "a").await, world.agent(2, "b").await);
    assert!(!one.is_granted(RUNS).await);
    assert!(two.is_granted(ARRIVED).await);
    two.commits(2, Some(1)).await;
    assert!(!one.is_granted(RUNS).await && !one.is_granted(ARRIVED).await);
    two.says(Place::Left).await;
    assert!(one.is_granted(ARRIVED).await);
    one.commits(3, Some(2)).await;
    let refused = two.begins(4, Some(3)).await;
    assert!(
        matches!(&refused, SiteMessage::PointRefused { refusal: Refusal::HeldElsewhere { why }, .. } if why.contains("agent a")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_agent_of_a_host_that_is_lost_is_succeeded_by_that_of_the_host_the_guest_arrived_at() {
    let world = World::new().await;
    let mut one = world.agent(1, "a").await;
    assert!(one.is_granted(RUNS).await);
    one.commits(1, None).await;
    world.slots.gone(1);
    let mut two = world.agent(2, "b").await;
    assert!(!two.is_granted(RUNS).await, "it may as well be a second copy");
    assert!(two.is_granted(ARRIVED).await);
    // The first one comes back, with a copy that somebody started.
    let mut one = world.agent(3, "a").await;
    assert!(!one.is_granted(RUNS).await);
    let refused = one.begins(2, Some(1)).await;
    assert!(matches!(refused, SiteMessage::PointRefused { .. }), "{refused:?}");
    two.commits(3, Some(1)).await;
}

/// Goal: what the former owner had begun is not committed after it, even if all of it was there but its end.
#[tokio::test]
async fn what_a_former_owner_had_under_way_is_thrown_away_with_the_change_of_hands() {
    let world = World::new().await;
    let (mut one, mut two) = (world.agent(1, "a").await, world.agent(2, "b").await);
    assert!(one.is_granted(RUNS).await);
    one.commits(1, None).await;
    one.begins(2, Some(1)).await;
    world.slots.gone(1);
    assert!(two.is_granted(ARRIVED).await);
    one.ends(2).await;
    let unknown = two.hears().await;
    assert!(
        matches!(unknown, SiteMessage::PointRefused { refusal: Refusal::UnknownPoint, .. }),
        "{unknown:?}"
    );
    two.commits(3, Some(1)).await;
    let store = &world.slots.slot(VM).store.clone();
    assert_eq!(store.latest(VM).await.unwrap().point, point(3));
    assert_eq!(store.points(Some(VM)).await.unwrap().len(), 2);
}

/// Goal: a point that an agent left half sent when it went away keeps nobody from giving the VM to another; one that is being
/// sent does.
#[tokio::test]
async fn a_point_that_nobody_sends_any_more_does_not_stand_in_the_way_of_a_hand_over() {
    let world = World::new().await;
    let mut one = world.agent(1, "a").await;
    one.commits(1, None).await;
    one.begins(2, Some(1)).await;
    let busy = world.slots.reserve(VM, "a test").await;
    assert!(busy.is_err_and(|why| why.contains("is being received")));
    world.slots.gone(1);
    drop(one);
    drop(world.slots.reserve(VM, "a test").await.unwrap());
    let held = world.slots.reserve_for(VM, "being handed over", Some("a"), false).await.unwrap();
    drop(held);
    // It comes back, and what it had begun is no longer known; it goes on from what is durable.
    let mut one = world.agent(2, "a").await;
    one.ends(2).await;
    let unknown = one.hears().await;
    assert!(
        matches!(unknown, SiteMessage::PointRefused { refusal: Refusal::UnknownPoint, .. }),
        "{unknown:?}"
    );
    one.commits(3, Some(1)).await;
}

#[tokio::test]
async fn an_operator_s_release_lets_anybody_take_over_but_not_from_one_that_has_it_running() {
    let world = World::new().await;
    let (mut one, mut two) = (world.agent(1, "a").await, world.agent(2, "b").await);
    let slot = world.slots.slot(VM);
    assert_eq!(slot.release().await, Ok(None), "nobody has it");
    assert!(one.is_granted(RUNS).await);
    let held = slot.release().await;
    assert!(held.as_ref().is_err_and(|why| why.contains("agent a")), "{held:?}");
    one.says(Place::NotHere).await;
    assert!(!two.is_granted(RUNS).await);
    assert_eq!(slot.release().await, Ok(Some("a".into())));
    let world = world.restarted().await;
    let mut two = world.agent(2, "b").await;
    assert!(two.is_granted(RUNS).await);
}

/// Goal: a VM that is nobody's is not taken by a copy of it that is off from one that may run elsewhere; an owner's, and one
/// that no other host has, are.
#[tokio::test]
async fn a_copy_that_is_off_takes_nothing_that_another_host_may_have_running() {
    let world = World::new().await;
    let mut one = world.agent(1, "a").await;
    one.says(Place::NotHere).await;
    one.commits(1, None).await;
    let (mut two, slot) = (world.agent(2, "b").await, world.slots.slot(VM));
    one.commits(2, Some(1)).await;
    slot.release().await.unwrap();
    let refused = one.begins(3, Some(2)).await;
    assert!(
        matches!(&refused, SiteMessage::PointRefused { refusal: Refusal::HeldElsewhere { why }, .. } if why.contains("agent b")),
        "{refused:?}"
    );
    two.says(Place::NotHere).await;
    assert!(matches!(two.begins(4, Some(2)).await, SiteMessage::PointRefused { .. }));
    assert!(two.is_granted(RUNS).await);
    two.commits(5, Some(2)).await;
}

/// Goal: an agent of an earlier release, which says nothing of places, is served as before, and is not robbed.
#[tokio::test]
async fn an_agent_that_says_nothing_has_what_it_began() {
    let world = World::new().await;
    let (mut old, mut new) = (world.agent(1, "a").await, world.agent(2, "b").await);
    old.commits(1, None).await;
    assert!(!new.is_granted(ARRIVED).await);
    old.commits(2, Some(1)).await;
}

/// Goal: where whose it is can't be read or written, no points are taken of anybody; an operator's word mends it.
#[tokio::test]
async fn nobody_is_admitted_while_the_owner_can_not_be_read() {
    let world = World::new().await;
    assert!(world.agent(1, "a").await.is_granted(RUNS).await);
    world.disk.put_durable(&crate::store::paths::owner(VM, 8), b"?".as_slice().into()).await.unwrap();
    let world = world.restarted().await;
    let mut one = world.agent(1, "a").await;
    let refused = one.begins(1, None).await;
    assert!(
        matches!(refused, SiteMessage::PointRefused { refusal: Refusal::Internal { .. }, .. }),
        "{refused:?}"
    );
    world.slots.slot(VM).release().await.unwrap();
    one.commits(1, None).await;
}

/// Goal: who was fenced goes on only where it is named, and only under the generation that it is named with.
#[tokio::test]
async fn an_agent_that_was_fenced_goes_on_once_the_vm_was_handed_to_it_and_nobody_else_does() {
    let world = World::new().await;
    let mut one = world.agent(1, "a").await;
    assert!(one.is_granted(RUNS).await);
    one.commits(1, None).await;
    let busy = world.slots.reserve(VM, "a test").await;
    assert!(busy.is_err_and(|why| why.contains("agent a")), "it has the guest running");
    let store = one.slot.store.clone();
    let fenced = store.raise(VM).await.unwrap();
    one.says(Place::NotHere).await;

    let watch = async |agent: &mut Agent, generation| {
        let replies = agent.replies.clone();
        agent.slot.watch(agent.session, agent.name, "web".into(), generation, replies).await;
        agent.hears().await
    };
    let is_fenced =
        |said: &SiteMessage| matches!(said, SiteMessage::VmRefused { refusal: Refusal::Fenced { .. }, .. });
    assert!(is_fenced(&watch(&mut one, Some(Generation::FIRST)).await));
    let held = world.slots.reserve(VM, "being handed over").await.unwrap();
    assert_eq!(world.slots.watchers(VM).into_iter().collect::<Vec<_>>(), ["a"]);
    assert!(world.slots.reserve(VM, "again").await.is_err(), "one at a time");
    held.hand_to("a", fenced.next()).await.unwrap();
    // Named, but not under the generation that holds.
    assert!(is_fenced(&watch(&mut one, Some(Generation::FIRST)).await));
    let generation = store.raise_to(VM, fenced.next()).await.unwrap();
    // From here on it is never told that it is fenced, or it would pause the guest; its points wait for the end.
    assert_eq!(watch(&mut one, Some(fenced)).await, SiteMessage::Adopt { vm: VM, generation });
    assert!(matches!(watch(&mut one, Some(generation)).await, SiteMessage::Vm { .. }));
    assert!(!one.is_granted(RUNS).await);
    one.says(Place::NotHere).await;
    held.hand_over("a", generation).await;
    assert_eq!(one.hears().await, SiteMessage::Adopt { vm: VM, generation });

    // It outlives a restart; others are turned away, whatever they have seen.
    let world = world.restarted().await;
    let (replies, inbox) = mpsc::channel(64);
    let mut one = Agent { slot: world.slots.slot(VM), session: 1, name: "a", replies, inbox };
    let (replies, inbox) = mpsc::channel(64);
    let mut two = Agent { slot: world.slots.slot(VM), session: 2, name: "b", replies, inbox };
    for seen in [None, Some(Generation::FIRST), Some(fenced)] {
        assert!(is_fenced(&watch(&mut two, seen).await), "{seen:?}");
        assert_eq!(watch(&mut one, seen).await, SiteMessage::Adopt { vm: VM, generation }, "{seen:?}");
    }
    assert!(matches!(watch(&mut one, Some(generation)).await, SiteMessage::Vm { .. }));
    assert!(one.is_granted(RUNS).await && !two.is_granted(RUNS).await);
    one.slot.begin("a", generation, point(2), Some(point(1)), one.replies.clone()).await;
    assert!(matches!(one.hears().await, SiteMessage::Opened { .. }));
    // Another failover ends it.
    one.slot.abort(point(2)).await;
    world.slots.slot(VM).store.raise(VM).await.unwrap();
    assert!(is_fenced(&watch(&mut one, Some(generation)).await));
}
